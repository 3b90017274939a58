"""How long a forward will take under a plan: measured computing and overhead, modelled transfers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infold.activations import call
from infold.report import format_bytes
from infold.tiers.attach import attach
from infold.tiers.plan import Placement, Plan, fingerprint
from infold.tiers.problem import Uses
from infold.tiers.schedule import NO_OVERHEAD, Access, Event, Overhead, Timeline, simulate
from infold.tiers.spec import TierSpec
from infold.tiers.units import pages, units

#: Passes until every one is like the one before: the first starts with an empty ring.
_PASSES = 4


@dataclass(frozen=True)
class Prediction:
    """The times of a plan.

    first: the first pass, of which nothing has been fetched before. timeline: several passes, the last of them steady.
    overhead: of uses and fetches, which the timelines count to computing.
    """

    plan: Plan
    uses: tuple[tuple[str, float], ...]
    first: Timeline
    timeline: Timeline
    overhead: Overhead = NO_OVERHEAD

    @property
    def steady(self) -> tuple[Event, ...]:
        """The events of the last pass."""
        return self.timeline.events[-len(self.uses) :] if self.uses else ()

    @property
    def seconds(self) -> float:
        """Of a steady pass."""
        return self.resident_seconds + self.overhead_seconds + self.exposed_seconds

    @property
    def first_seconds(self) -> float:
        return self.first.seconds

    @property
    def resident_seconds(self) -> float:
        """Of a pass with every weight in place."""
        return math.fsum(seconds for _, seconds in self.uses)

    @property
    def overhead_seconds(self) -> float:
        """What having units brought costs the computing thread in a pass, whether or not it waits for them."""
        return sum(map(self._overhead, self.steady))

    def _overhead(self, event: Event) -> float:
        here = self.plan.specs[event.tier].resident or event.nbytes == 0
        return 0.0 if here else self.overhead.of(event.fetched)

    @property
    def exposed_seconds(self) -> float:
        """What a steady pass waits."""
        return sum(event.wait for event in self.steady)

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """What each link carries in a steady pass: less than in the first where weights stay in the ring."""
        carried = dict.fromkeys(self.plan.specs, 0)
        for event in self.steady:
            carried[event.tier] += event.nbytes if event.fetched else 0
        return carried

    @property
    def transfer_seconds_by_tier(self) -> dict[str, float]:
        """How long each link is busy in a steady pass."""
        busy = dict.fromkeys(self.plan.specs, 0.0)
        for event in self.steady:
            busy[event.tier] += event.transfer_end - event.transfer_start
        return busy

    @property
    def bound_seconds(self) -> float:
        """No schedule of a steady pass that transfers as much is shorter."""
        return max(self.resident_seconds + self.overhead_seconds, *self.transfer_seconds_by_tier.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON: times in seconds, per pass, tier and layer."""
        busy = self.transfer_seconds_by_tier
        return {
            "seconds": self.seconds,
            "first_seconds": self.first_seconds,
            "resident_seconds": self.resident_seconds,
            "overhead_seconds": self.overhead_seconds,
            "exposed_seconds": self.exposed_seconds,
            "bound_seconds": self.bound_seconds,
            "tiers": {
                name: {
                    "bytes": count,
                    "transfer_seconds": busy[name],
                    "exposed_seconds": sum(event.wait for event in self.steady if event.tier == name),
                }
                for name, count in self.bytes_by_tier.items()
            },
            "layers": [
                {
                    "unit": event.unit,
                    "tier": event.tier,
                    "bytes": event.nbytes,
                    "compute_seconds": seconds,
                    "overhead_seconds": self._overhead(event),
                    "transfer_seconds": event.transfer_end - event.transfer_start,
                    "exposed_seconds": event.wait,
                }
                for event, (_, seconds) in zip(self.steady, self.uses, strict=True)
            ],
        }

    def plot(self, path: str | Path) -> None:
        """Draws the first pass and a steady one: computing, each link, and what is waited for. Needs matplotlib."""
        from infold.spectral.plot import figure

        links = [tier.name for tier in self.plan.tiers if not tier.resident]
        rows = ["compute", *links, "exposed wait"]
        drawing = figure(10, 1.2 + 0.9 * len(rows))
        panels = drawing.subplots(1, 2, sharey=True)
        for axes, events, title in zip(
            panels, (self.first.events, self.steady), ("first pass", "steady pass"), strict=True
        ):
            origin = min((event.compute_start - event.wait for event in events), default=0.0)
            spans: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
            for event in events:
                spans["compute"].append((event.compute_start - origin, event.compute_end - event.compute_start))
                if event.fetched:
                    spans[event.tier].append((event.transfer_start - origin, event.transfer_end - event.transfer_start))
                if event.wait > 0:
                    spans["exposed wait"].append((event.compute_start - event.wait - origin, event.wait))
            for place, row in enumerate(rows):
                color = {"compute": "#3b6ea5", "exposed wait": "#b5563c"}.get(row, "#6a9a4b")
                bars = [(1e3 * start, 1e3 * length) for start, length in spans[row]]
                axes.broken_barh(bars, (place - 0.4, 0.8), color=color, edgecolor="white", linewidth=0.3)
            axes.set_xlabel("ms")
            axes.set_title(title)
            axes.set_yticks(range(len(rows)), rows)
        panels[0].invert_yaxis()
        drawing.savefig(path, dpi=120)

    def __str__(self) -> str:
        width = max([len(event.unit) for event in self.steady] + [len("a steady pass")])
        head = (
            f"{'layer':<{width}}  {'tier':<10} {'stored':>10} {'compute ms':>11} {'transfer ms':>12} {'exposed ms':>11}"
        )
        lines = [head, "-" * len(head)]

        def row(name: str, tier: str, nbytes: int, *seconds: float) -> str:
            shown = [f"{1e3 * each:>{space}.3f}" for each, space in zip(seconds, (11, 12, 11), strict=True)]
            return f"{name:<{width}}  {tier:<10} {format_bytes(nbytes):>10} {' '.join(shown)}"

        for event, (_, computing) in zip(self.steady, self.uses, strict=True):
            moving = event.transfer_end - event.transfer_start
            lines.append(row(event.unit, event.tier, event.nbytes, computing, moving, event.wait))
        lines.append("-" * len(head))
        busy = self.transfer_seconds_by_tier
        for name, count in self.bytes_by_tier.items():
            own = [(event, use[1]) for event, use in zip(self.steady, self.uses, strict=True) if event.tier == name]
            computing = sum(seconds for _, seconds in own)
            waiting = sum(event.wait for event, _ in own)
            lines.append(row("in all", name, count, computing, busy[name], waiting))
        lines.append(
            f"a steady pass {1e3 * self.seconds:.3f} ms, the first {1e3 * self.first_seconds:.3f} ms; all resident "
            f"{1e3 * self.resident_seconds:.3f} ms; overhead {1e3 * self.overhead_seconds:.3f} ms, "
            f"{1e6 * self.overhead.use:.1f} us a use and {1e6 * self.overhead.fetch:.1f} a fetch; no schedule below "
            f"{1e3 * self.bound_seconds:.3f} ms"
        )
        return "\n".join(lines)


def predict(
    model: nn.Module,
    plan: Plan,
    inputs: Any = None,
    *,
    compute_seconds: Uses | None = None,
    overhead: Overhead | None = None,
    distance: int | None = None,
    repeats: int = 3,
) -> Prediction:
    """Times a forward under a plan.

    inputs: a batch to time the resident model's layers with: a mapping is passed as keywords, a tuple or list as
        positional arguments, anything else alone. compute_seconds: each use's unit and seconds, instead, as
        `measure_compute` gives them. distance: as in `simulate`.
    overhead: what uses and fetches cost the computing thread beside waiting. The default is `measure_overhead` where
        layers are timed on the CPU, and else none: a GPU does not wait for it as long as the host is ahead.

    Raises ValueError if neither is given, for an overhead below zero, and if the plan is not of this model's units.
    """
    if compute_seconds is None:
        if inputs is None:
            raise ValueError("inputs: expected a batch or compute_seconds, got neither")
        compute_seconds = measure_compute(model, inputs, repeats=repeats)
        if overhead is None and not _on_cuda(model):
            overhead = measure_overhead()
    overhead = overhead or NO_OVERHEAD
    uses = tuple(compute_seconds)
    accesses = plan.accesses(uses)
    first, several = (
        simulate(each, plan.specs, buffer_bytes=plan.buffer_bytes, distance=distance, overhead=overhead)
        for each in (accesses, accesses * _PASSES)
    )
    return Prediction(plan, uses, first, several, overhead)


def measure_compute(model: nn.Module, inputs: Any, *, repeats: int = 3) -> list[tuple[str, float]]:
    """Each use of a unit in a forward of the resident model, in order, and the median seconds until the next one.

    A pass is cut where a module that owns weights is called, so what lies between such modules counts to the one before
    it, what lies before the first to the first, and the sum is the whole pass. A module that is called twice is there
    twice. ``inputs`` are as for `predict`; one more pass warms up.

    Raises ValueError if passes call modules in different orders.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected one or more, got {repeats}")
    clock = _clock(model)
    marks: list[tuple[str, Any]] = []

    def hook(unit: str) -> Callable[..., None]:
        return lambda module, arguments: marks.append((unit, clock()))

    handles = [
        module.register_forward_pre_hook(hook(unit.name)) for unit in units(model) for module in unit.modules.values()
    ]
    passes: list[list[tuple[str, float]]] = []
    try:
        for _ in range(repeats + 1):
            marks.clear()
            start = clock()
            with torch.no_grad():
                call(model, inputs)
            times = [start, *(mark for _, mark in marks[1:]), clock()]
            passes.append([(name, _between(*ends)) for (name, _), ends in zip(marks, pairwise(times), strict=False)])
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in passes[0]]
    if any([name for name, _ in each] != names for each in passes):
        raise ValueError("model: expected every pass to call the same modules in the same order, they differ")
    return [(name, statistics.median(each[index][1] for each in passes[1:])) for index, name in enumerate(names)]


def measure_overhead(*, count: int = 32, repeats: int = 20) -> Overhead:
    """What a use of a unit that is away, and a fetch, take on this machine's CPU beside waiting: medians of `attach`
    over ``count`` tiny layers in RAM, once with a ring that holds them all and once with one that holds a few.
    """
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(count))).requires_grad_(False)
    found = units(model)
    tiers = (TierSpec("here", 0, 1, resident=True), TierSpec("away", 0, 1))
    placements = {unit.name: Placement("away", unit.nbytes) for unit in found}
    x = torch.zeros(1, 1)

    def seconds(waited: Callable[[], float] = lambda: 0.0) -> float:
        """Of a layer."""
        times = []
        # The first passes teach the order of the layers.
        for _ in range(3 + repeats):
            before = waited()
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start - (waited() - before))
        return statistics.median(times) / count

    def attached(held: int) -> float:
        plan = Plan(tiers, placements, held * found[0].room, fingerprint(model), "all away")
        with attach(model, plan) as handle:
            return seconds(lambda: sum(handle.counters.waited.values()))

    with torch.inference_mode():
        resident, here, fetched = seconds(), attached(count), attached(4)
    return Overhead(max(0.0, here - resident), max(0.0, fetched - here))


@dataclass(frozen=True)
class Stream:
    """A model that streams from a tier for every token: all that is not resident is read each time."""

    tier: TierSpec
    bits: float
    weight_bytes: int
    resident_bytes: int
    seconds_per_token: float

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds_per_token


def stream(
    parameters: float, bits: float, tier: TierSpec, *, device_bytes: int, layers: int = 120, buffers: int = 2
) -> Stream:
    """What the time model says of a dense model whose every weight is read for every token, one sequence at a time.

    The weights are cut into ``layers`` equal parts, of which the device holds as many as leave room for the ring;
    activations and the KV cache take none of ``device_bytes``, computing takes no time, and ``tier`` holds the rest: no
    real machine is faster.

    Raises ValueError if the ring does not fit.
    """
    if not (0 < parameters * bits < math.inf and layers >= 1):
        raise ValueError(f"parameters: expected a positive number, got {parameters} of {bits} bits in {layers} layers")
    nbytes = math.ceil(parameters * bits / 8 / layers)
    ring = buffers * pages(nbytes)
    if ring > device_bytes:
        raise ValueError(f"device_bytes: expected at least {ring} for {buffers} buffers, got {device_bytes}")
    resident = min(layers, (device_bytes - ring) // nbytes)
    # Spread evenly: the link is what counts, but so it never idles behind a run of resident layers.
    here = {round(index * layers / resident) for index in range(resident)} if resident else set()
    device = TierSpec("device", 0, 1, resident=True)
    accesses = [Access(str(index), "device" if index in here else tier.name, nbytes, 0.0) for index in range(layers)]
    specs = {"device": device, tier.name: tier}
    times = [simulate(accesses * count, specs, buffer_bytes=ring).seconds for count in (2, 3)]
    return Stream(tier, bits, nbytes * layers, nbytes * len(here), times[1] - times[0])


def _on_cuda(model: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in model.parameters())


def _clock(model: nn.Module) -> Callable[[], Any]:
    if not _on_cuda(model):
        return time.perf_counter

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    return mark


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3
