"""Predicted, emulated and real time of a forward, for plans of one model on this machine's tiers.

The tiers are RAM that is computed on where it lies, RAM that is copied by a thread, and a file that is read past the
page cache. The last two are measured first, by the engine's own reads and copies of the sizes that the model has, and
setup time and bandwidth are fitted to them, the next one under way while one is waited for. Sixteen linear layers: 8,
8, 25 and 25 MB of float32, four times.

Each plan has two copies of the model, one attached in real mode and one in emulated mode. They take turns; a turn is a
forward that is not timed, so that the ring is as a running model leaves it, and several that are. The prediction is the
time model with the layers' computing as measured in turn with them on a resident copy.

A row's ratio is emulated over real time. The goal is that no two of the three are more than 10% apart.

Run: OMP_NUM_THREADS=1 python benchmarks/tier_emulation.py --threads 1 [--quick] [--folder DISK] [--batch N]
    [--rounds N] [--json FILE] [--plot docs/figures/tier_emulation.png]
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from harness import Results, parse_arguments
from infold.report import format_bytes
from infold.spectral.plot import figure
from infold.tiers import Handle, Plan, TierSpec, attach, measure_compute, plan, predict, units
from infold.tiers.calibrate import fit
from infold.tiers.pieces import DiskPiece, Piece, RamPiece
from infold.tiers.ring import Ring
from infold.tiers.store import Store
from infold.tiers.units import pages
from torch import Tensor, nn

#: Forwards of a turn that are timed, after one that is not.
TIMED = 3
GOAL = 1.1
RESIDENT = TierSpec("RAM", 0, 1000, resident=True)


class Case(NamedTuple):
    """A plan, and the models that run by it."""

    plan: Plan
    handles: dict[str, Handle]
    times: dict[str, list[float]]


def build(quick: bool) -> nn.Sequential:
    """Widths alternate, so that units differ in size."""
    widths = (512, 256, 512, 768) if quick else (2048, 1024, 2048, 3072)
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in [*zip(widths, [*widths[1:], widths[0]], strict=True)] * 4:
        layers.append(nn.Linear(inputs, outputs, bias=False))
        nn.init.normal_(layers[-1].weight, std=inputs**-0.5)
    return nn.Sequential(*layers).requires_grad_(False)


def measured(
    name: str, sizes: Iterable[int], make: Callable[[Tensor], Piece], turns: int, on_disk: bool = False
) -> TierSpec:
    """A tier from how long it takes the engine's pieces to come, the next one begun before the last is here."""
    samples = []
    for size in sorted(sizes):
        # More than caches hold.
        count = min(32, max(3, 2**27 // size))
        pieces = cycle([make(torch.randint(256, (size,), dtype=torch.uint8)) for _ in range(count)])
        ring = Ring(3 * pages(size))
        waiting = [next(pieces).load(ring) for _ in range(2)]
        ends = []
        # The first ones give memory its pages.
        for _ in range(4 + max(turns, count)):
            memory, wait = waiting.pop(0)
            wait()
            ends.append(time.perf_counter())
            waiting.append(next(pieces).load(ring))
            ring.give(memory)
        for _, wait in waiting:
            wait()
        seconds = (ends[-1] - ends[3]) / (len(ends) - 4)
        samples.append((size, seconds))
        print(f"  {name}, {format_bytes(size)}: {1e3 * seconds:.2f} ms, {size / seconds / 1e9:.2f} GB/s")
    setup, bandwidth = fit(samples)
    return TierSpec(name, setup * 1e6, bandwidth / 1e9, on_disk=on_disk)


def tiers(folder: str, sizes: Iterable[int], turns: int) -> tuple[TierSpec, TierSpec, TierSpec]:
    """Resident RAM, RAM that is copied, and the disk of ``folder``, as they are here."""
    sizes = {size // 2**step for size in sizes for step in range(2)}
    with ThreadPoolExecutor(1) as executor:
        copied = measured("COPIED", sizes, lambda tensor: RamPiece([tensor], executor), turns)
    store = Store(folder, 0, depth=TierSpec.depth)
    try:
        disk = measured("DISK", sizes, lambda tensor: DiskPiece([tensor], store), turns, on_disk=True)
    finally:
        store.close()
    return RESIDENT, copied, disk


def plans(
    model: nn.Module, specs: tuple[TierSpec, TierSpec, TierSpec], uses: list[tuple[str, float]]
) -> dict[str, Plan]:
    """Different in what computes, what is copied and what is read."""
    ram, copied, disk = specs
    total = sum(unit.nbytes for unit in units(model))
    two, half = (ram, disk), {"RAM": total // 2}
    thirds = {"RAM": total * 2 // 5, "COPIED": total * 2 // 5}
    # A model that has not been trained has no importance; any ranking will do.
    scores = {unit.name: random.Random(unit.name).random() for unit in units(model)}
    largest = 3 * max(unit.room for unit in units(model))
    return {
        "all on disk": plan(model, two, {"RAM": largest}, "layer-order", buffers=3),
        "all copied": plan(model, (ram, copied), {"RAM": largest}, "layer-order", buffers=3),
        "half on disk, by layer order": plan(model, two, half, "layer-order"),
        "half on disk, by size": plan(model, two, half, "size"),
        "half on disk, at random": plan(model, two, half, "random", seed=1),
        "half on disk, by traffic": plan(model, two, half, "traffic", compute_seconds=uses),
        "three tiers, 30/50/20": plan(model, specs, objective="fractions", scores=scores),
        "three tiers, at random": plan(model, specs, thirds, "random", seed=2),
        "three tiers, by traffic": plan(model, specs, thirds, "traffic", compute_seconds=uses),
    }


def turn(run: Callable[[], object]) -> float:
    """Seconds of a forward that follows another."""
    run()
    begun = time.perf_counter()
    for _ in range(TIMED):
        run()
    return (time.perf_counter() - begun) / TIMED


def medians(passes: list[list[tuple[str, float]]]) -> list[tuple[str, float]]:
    """Of each use, over the passes."""
    return [(uses[0][0], statistics.median(seconds for _, seconds in uses)) for uses in zip(*passes, strict=True)]


def main() -> None:
    arguments = parse_arguments(__doc__, _options)
    results = Results(arguments)
    model = build(arguments.quick)
    x = torch.randn(arguments.batch, model[0].in_features)
    folder = arguments.folder or tempfile.gettempdir()
    with torch.inference_mode():
        # The first time is for a disk that has been idle.
        for _ in range(2):
            specs = tiers(folder, [unit.nbytes for unit in units(model)], arguments.calibrations)
        for spec in specs[1:]:
            print(f"{spec.name}: {spec.setup_us:.0f} us and {spec.bandwidth_gb_s:.2f} GB/s")
        passes = [measure_compute(model, x)]
        expected = model(x)
        cases = {}
        for name, made in plans(model, specs, passes[0]).items():
            copies = {mode: copy.deepcopy(model) for mode in ("emulated", "real")}
            handles = {mode: attach(own, made, mode=mode, folder=folder) for mode, own in copies.items()}
            for handle in handles.values():
                for _ in range(3):
                    assert torch.equal(handle.model(x), expected)
            cases[name] = Case(made, handles, {mode: [] for mode in handles})
        load = [os.getloadavg()[0]]
        passes = []
        for _ in range(arguments.rounds):
            passes.append(measure_compute(model, x, repeats=TIMED))
            for case in cases.values():
                for mode, handle in case.handles.items():
                    case.times[mode].append(turn(lambda own=handle.model: own(x)))
        load.append(os.getloadavg()[0])
        again = tiers(folder, [unit.nbytes for unit in units(model)], arguments.calibrations)
    uses = medians(passes)
    rows = {name: report(results, name, case, uses, model) for name, case in cases.items()}
    print(f"load of the machine: {load[0]:.1f} at the start, {load[1]:.1f} at the end")
    for case in cases.values():
        for handle in case.handles.values():
            handle.remove()
    if arguments.plot:
        draw(rows, arguments.plot)
    described = [{spec.name: spec.__dict__ for spec in each} for each in (specs, again)]
    results.write(batch=arguments.batch, tiers=described[0], tiers_afterwards=described[1], load=load)


def report(
    results: Results, name: str, case: Case, uses: list[tuple[str, float]], model: nn.Module
) -> dict[str, float]:
    prediction = predict(model, case.plan, compute_seconds=uses)
    times = {mode: 1e3 * statistics.median(values) for mode, values in case.times.items()}
    times = {"predicted": 1e3 * prediction.seconds, **times}
    apart = max(times.values()) / min(times.values())
    results.add(
        name,
        "real",
        times["emulated"],
        times["real"],
        floor_ms=1e3 * prediction.resident_seconds,
        note=f"predicted {times['predicted']:.1f}; at most {100 * (apart - 1):.0f}% apart"
        + (", over 10%" if apart > GOAL else ""),
        predicted_ms=times["predicted"],
        exposed_ms=1e3 * prediction.exposed_seconds,
        apart=apart,
        bytes_by_tier=case.plan.bytes_by_tier(),
        buffer_bytes=case.plan.buffer_bytes,
        real_ms_by_round=[1e3 * seconds for seconds in case.times["real"]],
        emulated_ms_by_round=[1e3 * seconds for seconds in case.times["emulated"]],
    )
    return times


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    drawing = figure(9, 0.55 * len(rows) + 1.2)
    axes = drawing.add_subplot()
    for offset, mode in enumerate(("predicted", "emulated", "real")):
        places = [index + 0.27 * (offset - 1) for index in range(len(rows))]
        axes.barh(places, [row[mode] for row in rows.values()], height=0.25, label=mode)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a forward")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", help="a folder on the disk to measure (default: that for temporary files)")
    parser.add_argument("--batch", type=int, default=16, help="rows of the input")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each plan and mode")
    parser.add_argument("--calibrations", type=int, default=15, help="transfers of each size that tiers are fitted to")
    parser.add_argument("--plot", type=Path, help="draw the table into this file")


if __name__ == "__main__":
    main()
