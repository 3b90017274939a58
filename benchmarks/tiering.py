"""A model on disk, read past the page cache at each forward, against accelerate's disk offload; and its copy in RAM.

Twelve 4096 x 4096 bfloat16 layers, batch 1, without gradients. A cold forward finds nothing of the model in memory: the
page cache of accelerate's files is dropped before it, and so is Infold's ring. A steady one follows another, and finds
in the ring what the last one left. A plain read is a sequential O_DIRECT read of as many bytes, 8 MiB after 8 MiB: what
the disk gives to a simple loop. The engine alone, reading the same file, is measured by `disk.py`.

Run: python benchmarks/tiering.py [--quick] [--folder DISK] [--rounds N] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import infold
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_module
from harness import Results, parse_arguments
from infold.tiers import Placement, Plan, TierSpec, attach, fingerprint, units
from infold.tiers.ring import host_memory
from infold.tiers.store import Store
from torch import Tensor, nn

RESIDENT = TierSpec("RAM", 0, 1000, resident=True)
DISK = TierSpec("DISK", 100, 1, on_disk=True)
COPIED = TierSpec("COPIED", 10, 10)
CONFIGS = {
    "raw": None,
    "lossless": infold.FusedConfig("lossless", layout="fast"),
    "lossless, compact": infold.FusedConfig("lossless", layout="compact"),
    "ECSQ 4 bits": infold.FusedConfig("ecsq", bits=4, layout="fast"),
    "ECSQ 4 bits, compact": infold.FusedConfig("ecsq", bits=4, layout="compact"),
}
#: Seconds in which a ring fills.
_SETTLE = 0.25


class Contender(NamedTuple):
    """One way to run the model. ``cool`` makes it cold; ``stored`` are the bytes that a forward has to bring."""

    forward: Callable[[], Tensor]
    cool: Callable[[], None]
    stored: int
    close: Callable[[], None]


def main() -> None:
    arguments = parse_arguments(__doc__, _options)
    results = Results(arguments)
    layers, width = (4, 1024) if arguments.quick else (12, 4096)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers)))
    model.requires_grad_(False)
    for layer in model:
        layer.weight.normal_(std=0.02)
    x = torch.randn(1, width, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, torch.inference_mode():
        contenders = _contenders(model, x, Path(folder), arguments.buffers)
        cold = _interleaved(contenders, arguments.rounds, cold=True)
        steady = _interleaved(contenders, arguments.rounds, cold=False)
        read = _plain_read(Path(folder) / "plain", contenders["raw"].stored, arguments.rounds)
        engine = _engine_rate(Path(folder), contenders["raw"].stored, arguments.rounds)
        _report(results, contenders, cold, steady, read, engine)
        for contender in contenders.values():
            contender.close()
    results.write(layers=layers, width=width, cold_ms=cold, steady_ms=steady, plain_read_ms=read)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", help="a folder on the disk to measure (default: that for temporary files)")
    parser.add_argument("--rounds", type=int, default=7, help="forwards of each contender")
    parser.add_argument("--buffers", type=int, default=4, help="layers that Infold's ring holds")


def _contenders(model: nn.Module, x: Tensor, folder: Path, buffers: int) -> dict[str, Contender]:
    made: dict[str, Contender] = {}
    raw = sum(unit.nbytes for unit in units(model))

    offloaded = copy.deepcopy(model)
    disk_offload(offloaded, str(folder / "accelerate"), execution_device=torch.device("cpu"))
    files = sorted((folder / "accelerate").glob("*.dat"))
    made["accelerate"] = Contender(
        lambda: offloaded(x), lambda: _drop(files), raw, lambda: remove_hook_from_module(offloaded, recurse=True)
    )
    in_ram = copy.deepcopy(model)
    cpu_offload(in_ram, execution_device=torch.device("cpu"))
    made["accelerate, RAM"] = Contender(lambda: in_ram(x), _nothing, raw, _nothing)

    def converted(config: infold.FusedConfig | None) -> nn.Module:
        own = copy.deepcopy(model)
        if config is not None:
            infold.convert(own, config, progress=False)
        return own

    def in_memory(name: str, config: infold.FusedConfig | None) -> None:
        own = converted(config)
        made[_resident(name)] = Contender(lambda: own(x), _nothing, 0, _nothing)

    def tiered(name: str, config: infold.FusedConfig | None, tier: TierSpec, **options: Any) -> None:
        own = converted(config)
        found = units(own)
        plan = Plan(
            (RESIDENT, DISK, COPIED),
            {unit.name: Placement(tier.name, unit.nbytes) for unit in found},
            buffers * max(unit.room for unit in found) * (2 if options else 1),
            fingerprint(own),
            "all in one tier",
        )
        handle = attach(own, plan, folder=folder, **options)
        stored = sum(unit.nbytes for unit in found)
        made[name] = Contender(lambda: own(x), handle.refresh, stored, handle.remove)

    for name, config in CONFIGS.items():
        in_memory(name, config)
        tiered(name, config, DISK)
    tiered("lossless, decoded first", None, DISK, materialize=True)
    tiered("RAM", None, RESIDENT)
    tiered("RAM, copied", None, COPIED)
    expected = model(x)
    for name, contender in made.items():
        error = (contender.forward() - expected).float().norm() / expected.float().norm()
        assert error < (0.5 if "ECSQ" in name else 0.05), f"{name}: {error}"
        for _ in range(2):
            contender.forward()
    return made


def _resident(name: str) -> str:
    return f"{name}, everything in memory"


def _nothing() -> None:
    pass


def _drop(files: list[Path]) -> None:
    """Has the system forget what it has cached of files."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _interleaved(contenders: dict[str, Contender], rounds: int, cold: bool) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            if cold:
                contender.cool()
            else:
                contender.forward()
            time.sleep(_SETTLE)
            begun = time.perf_counter()
            contender.forward()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - begun))
            # What it prefetches for a next forward is over before another's begins.
            time.sleep(_SETTLE)
    return {name: statistics.median(values) for name, values in times.items()}


def _plain_read(path: Path, nbytes: int, rounds: int) -> float:
    """Milliseconds of a plain sequential read past the page cache, 8 MiB at a time."""
    memory = mmap.mmap(-1, 8 << 20)
    memory.write(os.urandom(1 << 20) * 8)
    with path.open("wb") as file:
        for _ in range(-(-nbytes // len(memory))):
            file.write(memory)
        os.fsync(file.fileno())
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        read = 0
        while read < nbytes:
            read += os.preadv(descriptor, [memory], read)
        times.append(1e3 * (time.perf_counter() - begun) * nbytes / read)
    os.close(descriptor)
    path.unlink()
    return statistics.median(times)


def _engine_rate(folder: Path, nbytes: int, rounds: int) -> float:
    """Bytes a millisecond of the engine, two requests of 32 MiB outstanding."""
    size = 32 << 20
    count = -(-nbytes // size)
    store = Store(folder, count * size, depth=DISK.depth)
    buffers = [host_memory(size) for _ in range(3)]
    buffers[0].random_()
    for index in range(count):
        store.wait(store.write(index * size, buffers[0]))
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        tickets: list[int] = []
        for index in range(count):
            if len(tickets) == 2:
                store.wait(tickets.pop(0))
            tickets.append(store.read(index * size, buffers[index % 3]))
        for ticket in tickets:
            store.wait(ticket)
        times.append(1e3 * (time.perf_counter() - begun))
    store.close()
    return count * size / statistics.median(times)


def _report(
    results: Results,
    contenders: dict[str, Contender],
    cold: dict[str, float],
    steady: dict[str, float],
    read: float,
    engine_rate: float,
) -> None:
    """engine_rate: bytes a millisecond that the engine reads when nothing computes."""
    rate = contenders["raw"].stored / read
    print(f"plain O_DIRECT read: {rate / 1e6:.2f} GB/s; the engine alone: {engine_rate / 1e6:.2f} GB/s")
    goals = {"raw": 1.1, "lossless": 1.7, "ECSQ 4 bits": 4.0}
    for name in (*CONFIGS, "lossless, decoded first"):
        floor = contenders[name].stored / rate
        results.add(f"disk, cold: {name}", "accelerate, cold", cold[name], cold["accelerate"], goals.get(name), floor)
        results.add(f"disk, steady: {name}", "accelerate, cold", steady[name], cold["accelerate"], None, floor)
    results.add("disk, cold: raw", "plain read", cold["raw"], read, 0.95)
    for name in CONFIGS:
        bound = max(cold[_resident(name)], contenders[name].stored / engine_rate)
        results.add(f"disk, cold: {name}", "bound", cold[name], bound, 1 / 1.1, note="max(compute, transfer)")
    results.add("RAM", "accelerate, warm", steady["RAM"], steady["accelerate"], 4.0, steady[_resident("raw")])
    results.add(
        "RAM, copied", "accelerate, warm", steady["RAM, copied"], steady["accelerate"], None, steady[_resident("raw")]
    )
    results.add("RAM", "accelerate's RAM", steady["RAM"], steady["accelerate, RAM"], None, steady[_resident("raw")])


if __name__ == "__main__":
    main()
