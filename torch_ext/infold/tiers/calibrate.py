"""What this machine's tiers do: bandwidths and setup times, measured."""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infold.report import format_bytes
from infold.tiers.spec import TierSpec

#: What one read asks for at most; larger transfers are as many reads, `depth` of them under way.
READ_BYTES = 2**20
#: More than caches hold.
_COLD_BYTES = 2**28


def calibrate(
    folder: str | Path,
    *,
    sizes: Sequence[int] = (2**20, 2**22, 2**24, 2**26),
    file_bytes: int = 2**28,
    depths: Sequence[int] = (1, 2, 4, 8, 16),
    repeats: int = 5,
    progress: Callable[[str], None] | None = None,
) -> dict[str, TierSpec]:
    """Measures the tiers of this machine and fits setup time and bandwidth to transfers of several sizes.

    ``"RAM"``: copies within memory by one thread, for the others compute; resident where there is no GPU. ``"SSD"``:
    reads of a file in ``folder`` past the page cache, at the queue depth that is fastest. With CUDA: ``"HBM"``, copies
    on the device, resident; ``"CPU"``, from pinned host memory; ``"CPU unpinned"``. A transfer is of each of ``sizes``
    bytes, ``repeats`` times or more.
    progress: called with each line of what was measured.

    Raises ValueError for sizes that make no fit, and where the folder's file system refuses O_DIRECT.
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

    def add(name: str, samples: list[tuple[int, float]], resident: bool = False, on_disk: bool = False) -> None:
        setup, bandwidth = fit(samples)
        specs[name] = TierSpec(name, setup * 1e6, bandwidth / 1e9, None, resident, on_disk)
        say(f"{name}: {bandwidth / 1e9:.2f} GB/s, {setup * 1e6:.1f} us setup")

    if cuda:
        device = torch.device("cuda")
        add("HBM", _copies(sizes, repeats, device, Tensor.cuda), resident=True)
        add("CPU", _copies(sizes, repeats, device, Tensor.pin_memory))
        add("CPU unpinned", _copies(sizes, repeats, device))
    add("RAM", _copies(sizes, repeats), resident=not cuda)

    with tempfile.NamedTemporaryFile(dir=folder, prefix=".infold-calibrate-") as file:
        # What does not compress, so that no file system or drive makes it less.
        block = os.urandom(READ_BYTES)
        for start in range(0, file_bytes, READ_BYTES):
            file.write(block[: min(READ_BYTES, file_bytes - start)])
        file.flush()
        os.fsync(file.fileno())
        whole = {}
        for depth in dict.fromkeys(depths):
            seconds = read_seconds(file.name, file_bytes // mmap.PAGESIZE * mmap.PAGESIZE, 1, depth)
            whole[depth] = file_bytes / seconds[0]
            say(f"SSD, {depth} reads of {format_bytes(READ_BYTES)} under way: {whole[depth] / 1e9:.2f} GB/s")
        best = max(whole, key=lambda depth: whole[depth])
        # Small reads are noisy, and cheap to repeat.
        turns = {n: repeats * max(1, 2**24 // n) for n in sizes}
        samples = [(n, statistics.median(read_seconds(file.name, n, turns[n], best))) for n in sizes]
        add("SSD", samples, on_disk=True)
    return specs


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


def read_seconds(path: str | Path, nbytes: int, repeats: int, depth: int) -> list[float]:
    """Seconds of each of ``repeats`` reads of ``nbytes``, one after the other from the start of a file, again from its
    start where it ends: past the page cache, ``depth`` requests under way, into aligned memory.

    Raises ValueError where the file system refuses O_DIRECT, and OSError for a read that fails or is short.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        raise ValueError(f"folder: expected a file system that reads past the page cache, {path}: {error}") from error
    length = os.fstat(descriptor).st_size
    cuts = [*range(0, nbytes, READ_BYTES), nbytes]
    with mmap.mmap(-1, nbytes) as buffer, memoryview(buffer) as memory, ThreadPoolExecutor(depth) as threads:
        try:

            def read(piece: tuple[int, int], base: int) -> None:
                start, end = piece
                with memory[start:end] as part:
                    got = os.preadv(descriptor, [part], base + start)
                if got != end - start:
                    raise OSError(f"{path}: expected {end - start} bytes at {base + start}, got {got}")

            # Pages that are there: else the first read of each waits for the kernel to make it.
            np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1
            times = []
            for turn in range(repeats):
                base = turn * nbytes % max(length - nbytes + 1, 1) // mmap.PAGESIZE * mmap.PAGESIZE
                start = time.perf_counter()
                list(threads.map(lambda piece, base=base: read(piece, base), pairwise(cuts)))
                times.append(time.perf_counter() - start)
            return times
        finally:
            threads.shutdown()
            os.close(descriptor)


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
