"""What this machine's tiers do: bandwidths and setup times, measured."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infold.tiers.ring import host_memory
from infold.tiers.spec import TierSpec
from infold.tiers.store import Store
from infold.tiers.units import PAGE, pages

#: Of the transfers that are timed; the file to read is no smaller than the largest.
SIZES = (2**20, 2**22, 2**24, 2**26)
#: What the file to read is written by.
_BLOCK_BYTES = 2**24
#: More than caches hold.
_COLD_BYTES = 2**28
#: The share of the fastest rate that counts as full.
_FULL = 0.95


def calibrate(
    folder: str | Path,
    *,
    sizes: Sequence[int] = SIZES,
    file_bytes: int = 2**28,
    depths: Sequence[int] = (1, 2, 4, 8, 16, 32),
    repeats: int = 5,
    progress: Callable[[str], None] | None = None,
) -> dict[str, TierSpec]:
    """Measures the tiers of this machine and fits setup time and bandwidth to transfers of several sizes.

    ``"RAM"``: copies within memory by one thread, for the others compute; resident where there is no GPU. ``"SSD"``:
    reads of a `Store` in ``folder``, at the least queue depth within 5% of the fastest, which the tier then has. With
    CUDA: ``"HBM"``, copies on the device, resident; ``"CPU"``, from pinned host memory; ``"CPU unpinned"``. A transfer
    is of each of ``sizes`` bytes, ``repeats`` times or more.
    progress: called with each line of what was measured.

    Raises ValueError for sizes that make no fit, and RuntimeError where the folder has no room for the file.
    """
    sizes = sorted(set(sizes))
    if len(sizes) < 2 or sizes[0] < mmap.PAGESIZE or any(size % mmap.PAGESIZE for size in sizes):
        raise ValueError(f"sizes: expected two or more, in whole pages of {mmap.PAGESIZE} bytes, got {sizes}")
    if file_bytes < sizes[-1]:
        raise ValueError(f"file_bytes: expected at least the largest of sizes, {sizes[-1]}, got {file_bytes}")
    if not depths or min(depths) < 1 or repeats < 1:
        raise ValueError(f"depths, repeats: expected one or more, got {list(depths)} and {repeats}")
    say = progress or (lambda line: None)
    cuda = torch.cuda.is_available()
    specs: dict[str, TierSpec] = {}

    def add(name: str, samples: list[tuple[int, float]], **options: Any) -> None:
        setup, bandwidth = fit(samples)
        specs[name] = TierSpec(name, setup * 1e6, bandwidth / 1e9, **options)
        say(f"{name}: {bandwidth / 1e9:.2f} GB/s, {setup * 1e6:.1f} us setup")

    if cuda:
        device = torch.device("cuda")
        add("HBM", _copies(sizes, repeats, device, Tensor.cuda), resident=True)
        add("CPU", _copies(sizes, repeats, device, Tensor.pin_memory))
        add("CPU unpinned", _copies(sizes, repeats, device))
    add("RAM", _copies(sizes, repeats), resident=not cuda)

    stores = {depth: _written(folder, file_bytes, depth) for depth in dict.fromkeys(depths)}
    rates = {}
    for depth, store in stores.items():
        rates[depth] = file_bytes / read_seconds(store, file_bytes, file_bytes, 1)[0]
        say(f"SSD, {depth} requests under way: {rates[depth] / 1e9:.2f} GB/s")
    # The least that does: what is read ahead is in the way of what is waited for.
    best = min(depth for depth, rate in rates.items() if rate >= _FULL * max(rates.values()))
    # Small reads are noisy, and cheap to repeat.
    turns = {n: repeats * max(1, 2**24 // n) for n in sizes}
    samples = [(n, statistics.median(read_seconds(stores[best], file_bytes, n, turns[n]))) for n in sizes]
    for store in stores.values():
        store.close()
    add("SSD", samples, on_disk=True, depth=best)
    return specs


def _written(folder: str | Path, nbytes: int, depth: int) -> Store:
    """A store that is full of what does not compress, so that no file system or drive makes it less."""
    store = Store(folder, nbytes, depth=depth)
    block = host_memory(_BLOCK_BYTES)
    block.copy_(torch.frombuffer(bytearray(os.urandom(len(block))), dtype=torch.uint8))
    for start in range(0, pages(nbytes), len(block)):
        store.wait(store.write(start, block[: min(len(block), pages(nbytes) - start)]))
    return store


def read_seconds(store: Store, file_bytes: int, nbytes: int, repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` reads of ``nbytes``, one after the other from the start of a store of
    ``file_bytes``, again from its start where it ends.
    """
    memory = host_memory(nbytes)
    memory.fill_(1)  # pages that are there: else the first read waits for the kernel to make them
    times = []
    for turn in range(repeats):
        offset = turn * nbytes % max(file_bytes - nbytes + 1, 1) // PAGE * PAGE
        start = time.perf_counter()
        store.wait(store.read(offset, memory))
        times.append(time.perf_counter() - start)
    return times


def fit(samples: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Setup seconds and bytes a second of transfers (bytes, seconds): least squares of the relative error.

    Where the line would start below zero it starts at zero, and it has a slope even if larger transfers are no slower.
    """
    nbytes, seconds = np.array([n for n, _ in samples], float), np.array([s for _, s in samples], float)
    weighted = np.stack([1 / seconds, nbytes / seconds], axis=1)
    (setup, slope), *_ = np.linalg.lstsq(weighted, np.ones(len(samples)), rcond=None)
    if setup < 0 or slope <= 0:
        setup = 0.0
        slope = (nbytes / seconds).sum() / ((nbytes / seconds) ** 2).sum()
    return float(setup), float(1 / slope)


def _memory(nbytes: int, device: torch.device | None = None) -> Tensor:
    return torch.ones(nbytes, dtype=torch.uint8, device=device)


def _copies(
    sizes: Sequence[int],
    repeats: int,
    target_at: torch.device | None = None,
    source: Callable[[Tensor], Tensor] = Tensor.cpu,
) -> list[tuple[int, float]]:
    """(bytes, seconds) of copies out of memory that no cache holds: the least disturbed of each size.

    source: puts a host tensor where the copies come from.
    """
    data = source(_memory(max(_COLD_BYTES, 2 * sizes[-1])))
    targets = {nbytes: _memory(nbytes, target_at) for nbytes in sizes}
    seconds: dict[int, list[float]] = {nbytes: [] for nbytes in sizes}
    place = 0
    # The first round warms up: threads start, targets get their pages.
    for _ in range(repeats + 1):
        for nbytes, target in targets.items():
            place = place + nbytes if place + 2 * nbytes <= data.numel() else 0
            start = time.perf_counter()
            if target.is_cuda:
                target.copy_(data[place : place + nbytes], non_blocking=True)
                torch.cuda.synchronize()
            else:
                np.copyto(target.numpy(), data[place : place + nbytes].numpy())
            seconds[nbytes].append(time.perf_counter() - start)
    return [(nbytes, min(each[1:])) for nbytes, each in seconds.items()]
