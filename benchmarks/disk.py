"""Sequential reads of a file past the page cache: a plain loop of preadv, and the disk engine with two requests ahead.

    python benchmarks/disk.py --folder DIR

Prints MB/s (1e6 bytes) of each pass, alternating, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import time
from collections import deque

import torch
from infold._library import ops
from torch import Tensor

PLAIN, REQUEST, AHEAD = 8 << 20, 32 << 20, 2
HUGE = 2 << 20


def pages(nbytes: int) -> Tensor:
    """Memory in huge pages where the system has them: the disk then moves more at a time."""
    memory = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    return whole[start : start + nbytes].fill_(1)


def plain(store: int, nbytes: int, buffers: list[Tensor]) -> None:
    """Into the same memory as the engine: a small buffer that stays in the processor's cache is faster to fill."""
    parts = [memoryview(part.numpy()) for buffer in buffers for part in buffer.split(PLAIN)]
    for index, offset in enumerate(range(0, nbytes, PLAIN)):
        if os.preadv(store, [parts[index % len(parts)]], offset) != PLAIN:
            raise RuntimeError("short read")


def engine(store: int, nbytes: int, buffers: list[Tensor]) -> None:
    tickets: deque[int] = deque()
    for index, offset in enumerate(range(0, nbytes, REQUEST)):
        tickets.append(ops.tier_read(store, offset, buffers[index % len(buffers)]))
        if len(tickets) > AHEAD:
            ops.tier_wait(store, tickets.popleft())
    for ticket in tickets:
        ops.tier_wait(store, ticket)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", default=".")
    parser.add_argument("--mib", type=int, default=1024, help="size of the file, a multiple of 32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--backend", default="auto", choices=["auto", "uring", "threads"])
    args = parser.parse_args()

    nbytes = args.mib << 20
    store = ops.tier_open(args.folder, nbytes, args.depth, args.backend)
    buffers = [pages(REQUEST) for _ in range(AHEAD + 1)]
    for offset in range(0, nbytes, REQUEST):
        ops.tier_wait(store, ops.tier_write(store, offset, buffers[0]))
    rates: dict[str, list[float]] = {"preadv": [], "engine": []}
    for _ in range(args.rounds):
        for name, run in (
            ("preadv", lambda: plain(store, nbytes, buffers)),
            ("engine", lambda: engine(store, nbytes, buffers)),
        ):
            start = time.perf_counter()
            run()
            rates[name].append(nbytes / 1e6 / (time.perf_counter() - start))
    for name, measured in rates.items():
        print(f"{name}: median {statistics.median(measured):.0f} MB/s of", *(f"{rate:.0f}" for rate in measured))
    print(f"ratio {statistics.median(rates['engine']) / statistics.median(rates['preadv']):.3f}")
    *_, uring, direct = ops.tier_stats(store)
    print(f"io_uring: {bool(uring)}, past the page cache: {bool(direct)}")
    ops.tier_close(store)


if __name__ == "__main__":
    main()
