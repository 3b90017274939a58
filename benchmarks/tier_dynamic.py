"""Tiers that follow importance or use during training, against those of the plan, and against random ones.

`dense` is a small transformer, whose every weight is read at each step: importance (a moving average of each unit's
mean squared gradient) cannot tell what is used. `experts` calls two of twelve layers a step, and which two changes
every 20 steps: here a moving average of uses can. A share of the weights fits in the fast tier, the rest is on disk.
The ways run in turn, for each seed; all have the same losses, bit for bit. A row compares a way's mean step, moves
included, with the static plan's; the first ten steps are left out.

Run: python benchmarks/tier_dynamic.py [--quick] [--threads N] [--folder F] [--seeds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import Results, parse_arguments
from infold.tiers import DynamicTiering, Placement, Plan, TierSpec, attach, fingerprint, units
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

FAST = TierSpec("FAST", 0, 1000, resident=True)
DISK = TierSpec("DISK", 100, 1, on_disk=True)
WAYS = ("static", "dynamic", "random")
#: Steps, steps between re-plans, the share of the weights in the fast tier.
STEPS, EVERY, SHARE = 60, 5, 0.4
EXPERTS, USED, DRIFT = 12, 2, 20


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.last = nn.Linear(256, 256)

    def forward(self, x: Tensor, step: int) -> Tensor:
        return self.last(self.layers(x))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 256)
        self.experts = nn.ModuleList(nn.Linear(256, 4096) for _ in range(EXPERTS))
        self.last = nn.Linear(4096, 256)

    def forward(self, x: Tensor, step: int) -> Tensor:
        hot = random.Random(step // DRIFT).sample(range(EXPERTS), USED)
        h = torch.relu(self.first(x))
        return self.last(torch.relu(sum(self.experts[index](h) for index in hot)))


class GradientAverage:
    """A moving average of the mean squared gradient of each unit."""

    def __init__(self, model: nn.Module) -> None:
        self._units = units(model)
        self.scores = {unit.name: 0.0 for unit in self._units}

    def see(self) -> None:
        for unit in self._units:
            gradients = [p.grad for p in unit.parameters.values() if p.grad is not None]
            if gradients:
                square = sum(float(g.square().sum()) for g in gradients) / sum(g.numel() for g in gradients)
                self.scores[unit.name] += 0.2 * (square - self.scores[unit.name])


class UseAverage:
    """A moving average of how often each unit is called in a step."""

    def __init__(self, model: nn.Module) -> None:
        self._counts = {unit.name: 0 for unit in units(model)}
        self.scores = dict.fromkeys(self._counts, 0.0)
        for unit in units(model):
            for module in unit.modules.values():
                self._watch(module, unit.name)

    def _watch(self, module: nn.Module, name: str) -> RemovableHandle:
        def count(*_: object) -> None:
            self._counts[name] += 1

        return module.register_forward_pre_hook(count)

    def see(self) -> None:
        for name, count in self._counts.items():
            self.scores[name] += 0.3 * (count - self.scores[name])
            self._counts[name] = 0


def layer_order(model: nn.Module) -> Plan:
    """The first layers in the fast tier."""
    found = units(model)
    ring = 2 * max(unit.room for unit in found)
    budget = left = int(SHARE * sum(unit.nbytes for unit in found))
    placements = {}
    for unit in found:
        resident = unit.nbytes <= left
        left -= unit.nbytes if resident else 0
        placements[unit.name] = Placement("FAST" if resident else "DISK", unit.nbytes)
    return Plan(
        (FAST, DISK), placements, ring, fingerprint(model), "layer-order", {"FAST": budget + ring, "DISK": None}
    )


def train(make: Callable[[], nn.Module], way: str, seed: int, steps: int, folder: str) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    average = UseAverage(model) if make is Experts else GradientAverage(model)
    generator, dice = torch.Generator().manual_seed(seed), random.Random(seed)
    times, losses = [], []
    with attach(model, layer_order(model), folder=folder) as handle:

        def scores() -> dict[str, float]:
            return average.scores if way == "dynamic" else {name: dice.random() for name in average.scores}

        total = sum(placement.nbytes for placement in handle.plan.placements.values())
        tiering = DynamicTiering(handle, scores, every=EVERY, max_bytes=total // 4, hysteresis=0.2)
        waited = before = 0.0
        for step in range(steps):
            if step == DRIFT // 2:  # the order of the units is learnt by now
                before = sum(handle.counters.waited.values())
            start = time.perf_counter()
            x = torch.randn(4, 64, 256, generator=generator)
            loss = (model(x, step) - x.roll(1, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            handle.step(optimizer)
            average.see()
            if way != "static":
                tiering.step()
            times.append(time.perf_counter() - start)
            losses.append(float(loss.detach()))
        waited = sum(handle.counters.waited.values()) - before
    counted = times[DRIFT // 2 :]
    return {
        "ms": 1e3 * statistics.fmean(counted),
        "waited_ms": 1e3 * waited / len(counted),
        "moves": sum(len(record.moves) for record in tiering.records),
        "moved_mb": tiering.moved_bytes / 1e6,
        "fetched_mb": handle.counters.bytes_fetched / 1e6 / steps,
        "weights_mb": total / 1e6,
        "losses": losses,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the file of the disk tier lies")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each way")


def main() -> None:
    arguments = parse_arguments(__doc__, add_options)
    results = Results(arguments)
    steps, seeds = (20, 1) if arguments.quick else (STEPS, arguments.seeds)
    for make in (Dense, Experts):
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for seed in range(seeds):
            for way in WAYS:
                runs[way].append(train(make, way, seed, steps, arguments.folder))
            if any(runs[way][-1]["losses"] != runs["static"][-1]["losses"] for way in WAYS):
                raise AssertionError(f"{make.__name__}, seed {seed}: losses depend on where the weights lie")
        for way in WAYS:
            figures = {
                field: statistics.median(run[field] for run in runs[way])
                for field in ("ms", "waited_ms", "moves", "moved_mb", "fetched_mb", "weights_mb")
            }
            results.add(
                f"{make.__name__.lower()}, {figures['weights_mb']:.0f} MB, {way}",
                "static",
                figures["ms"],
                statistics.median(run["ms"] for run in runs["static"]),
                note=f"waits {figures['waited_ms']:.1f} ms and fetches {figures['fetched_mb']:.1f} MB a step; "
                f"{figures['moves']:.0f} moves of {figures['moved_mb']:.0f} MB in all",
                ms_by_seed=[run["ms"] for run in runs[way]],
                waited_ms_by_seed=[run["waited_ms"] for run in runs[way]],
                **{field: value for field, value in figures.items() if field != "ms"},
            )
    results.write(steps=steps, every=EVERY, share=SHARE, seeds=seeds)


if __name__ == "__main__":
    main()
