"""ResNet-50 of random weights, its layers over three tiers by the documents' rule: memory, time, throughput.

The rule: late layers in the fast tier (15% of all bytes), middle ones in the second (60%), early ones in the third
(25%). A convolutional network reads every weight at every forward, wherever it lies: the rule costs time and saves
memory of the fast tier, and outputs keep their bits. Beside the resident model run

- ``rule, copied``: the second tier in RAM, copied before use as to a device (this saves no memory of a CPU's);
- ``rule, disk``: the second and the third tier on disk;
- ``traffic, disk``: as much fast memory, filled by the time model;
- ``rule, emulated``: weights stay, and layers wait as if behind PCIe 4.0 and an NVMe drive (presets), with this
  machine's computing: a GPU that computes in less time would wait for longer.

Times are of runs in turn. Memory is the most that a process of its own holds during forwards beyond what it began with:
weights, ring and activations.

Run: python examples/resnet/resnet50.py [--batch N] [--size N] [--rounds N] [--folder DISK] [--train] [--smoke]
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import infold.tiers as tiers
import torch
import torch.nn.functional as F
from resnets import resnet50
from torch import Tensor, nn

SHARES = (0.15, 0.6, 0.25)
FAST = tiers.TierSpec("fast", 0, 1000, resident=True)
#: As <malloc.h> numbers it.
M_MMAP_THRESHOLD = -3


def plans(model: nn.Module, disk: tiers.TierSpec, ram: tiers.TierSpec) -> dict[str, tiers.Plan]:
    """Each plan by its name."""
    depth = {unit.name: float(place) for place, unit in enumerate(tiers.units(model))}

    def rule(*outer: tiers.TierSpec) -> tiers.Plan:
        return tiers.plan(model, [FAST, *outer], None, "fractions", scores=depth, fractions=SHARES, buffers=3)

    def on_disk(name: str) -> tiers.TierSpec:
        return tiers.TierSpec(name, disk.setup_us, disk.bandwidth_gb_s, on_disk=True, depth=disk.depth)

    by_rule = rule(on_disk("middle"), on_disk("early"))
    fast = by_rule.bytes_by_tier()["fast"] + by_rule.buffer_bytes
    return {
        "rule, copied": rule(tiers.TierSpec("middle", ram.setup_us, ram.bandwidth_gb_s), on_disk("early")),
        "rule, disk": by_rule,
        "traffic, disk": tiers.plan(model, [FAST, on_disk("disk")], {"fast": fast}, "traffic"),
        "rule, emulated": rule(tiers.PRESETS["PCIe4"], tiers.PRESETS["NVMe4"]),
    }


class Runner:
    """One model under one plan, or resident."""

    def __init__(self, name: str, arguments: argparse.Namespace, plan: tiers.Plan | None) -> None:
        self.model = make(arguments)
        self.plan, self.train = plan, arguments.train
        self.handle = None
        if plan is not None:
            mode = "emulated" if name.endswith("emulated") else "real"
            self.handle = tiers.attach(self.model, plan, mode=mode, folder=arguments.folder)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(arguments.batch, 3, arguments.size, arguments.size, generator=generator)

    def run(self) -> Tensor:
        """A forward, or a step of training by plain gradient descent; the logits."""
        if not self.train:
            with torch.inference_mode():
                return self.model(self.images)
        logits = self.model(self.images)
        self.optimizer.zero_grad()
        F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)).backward()
        (self.handle.step if self.handle else _step)(self.optimizer)
        return logits.detach()


def _step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


def make(arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    return resnet50().train(arguments.train)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_of(action: Callable[[], object]) -> int:
    """The most bytes that the process holds meanwhile, looked at every 2 ms."""
    peak, ended = resident(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    action()
    ended.set()
    thread.join()
    return peak


def memory(name: str, arguments: argparse.Namespace, plan: tiers.Plan | None) -> int:
    torch.set_num_threads(arguments.threads)
    # The C library keeps what is freed in smaller pieces; that would be counted as ours.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    begun = resident()
    runner = Runner(name, arguments, plan)
    return peak_of(lambda: [runner.run() for _ in range(2)]) - begun


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process of its own, which has what this one has now, and leaves nothing here."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        sender.send(function(*arguments))
        os._exit(0)  # bringing all weights back would take long

    process = context.Process(target=work)
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the tier on disk keeps its file")
    parser.add_argument("--train", action="store_true", help="steps of training, not forwards")
    parser.add_argument("--smoke", action="store_true", help="one small image, one round, tiers not measured")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.batch, arguments.size, arguments.rounds, arguments.threads = 1, 64, 1, 1
    # Until the last of these processes has ended, this one computes nothing and holds no weights.
    measured = {} if arguments.smoke else apart(tiers.calibrate, arguments.folder)
    disk = measured.get("SSD", tiers.TierSpec("SSD", 100, 2, on_disk=True))
    ram = measured.get("RAM", tiers.TierSpec("RAM", 2, 8))
    print(f"disk {disk.bandwidth_gb_s:.1f} GB/s, copies in RAM {ram.bandwidth_gb_s:.1f} GB/s", flush=True)
    with torch.device("meta"):
        model = resnet50()
    every: dict[str, tiers.Plan | None] = {"resident": None, **plans(model, disk, ram)}
    weights = sum(p.nbytes for p in model.parameters())
    peaks = {
        name: apart(memory, name, arguments, plan) for name, plan in every.items() if not name.endswith("emulated")
    }

    torch.set_num_threads(arguments.threads)
    runners = {name: Runner(name, arguments, plan) for name, plan in every.items()}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(arguments.rounds + 1):
        outputs = {}
        for name, runner in runners.items():
            begun = time.perf_counter()
            outputs[name] = runner.run()
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - begun)
        assert all(torch.equal(output, outputs["resident"]) for output in outputs.values())
    print(f"{weights / 1e6:.1f} MB of weights; batch {arguments.batch} at {arguments.size}²;", end=" ")
    print(f"{'training steps' if arguments.train else 'forwards'}, {arguments.threads} threads; outputs are equal")
    print("| plan | fast tier + ring, MB | saved | peak memory, MB | ms | images/s | overhead |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    base = statistics.median(times["resident"])
    for name, plan in every.items():
        held = weights if plan is None else plan.bytes_by_tier()["fast"]
        ring = 0 if plan is None else plan.buffer_bytes
        took = statistics.median(times[name])
        print(f"| {name} | {held / 1e6:.1f} + {ring / 1e6:.1f} | {1 - (held + ring) / weights:.0%}", end=" ")
        peak = f"{peaks[name] / 1e6:.0f}" if name in peaks else ""
        print(f"| {peak} | {took * 1e3:.0f} | {arguments.batch / took:.2f} | {took / base - 1:+.0%} |")
    for runner in runners.values():
        if runner.handle is not None:
            runner.handle.remove()


if __name__ == "__main__":
    main()
