"""The scratch file of the disk tier. The engine behind it is Rust (`src/tier`)."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from infold._library import ops
from infold.tiers.units import pages


class Store:
    """A preallocated file without a name: it is gone with the process, however that ends.

    folder: where it lies. Its file system has to have room for all that is reserved; RuntimeError names it otherwise.
    depth: how many pieces of a transfer the disk is given at a time. backend: ``"uring"``, ``"threads"`` or ``"auto"``.
    """

    def __init__(self, folder: str | Path, nbytes: int = 0, *, depth: int = 8, backend: str = "auto") -> None:
        self.folder = Path(folder)
        self._handle: int = ops.tier_open(str(folder), pages(nbytes), depth, backend)
        self._free: dict[int, list[int]] = {}
        self._fresh = [0, pages(nbytes)]  # of what was preallocated, the part that nobody has yet
        self._closed = False

    def reserve(self, nbytes: int) -> int:
        """The offset of a range of ``nbytes``, rounded up to pages."""
        size = pages(nbytes)
        if self._free.get(size):
            return self._free[size].pop()
        start, end = self._fresh
        if start + size <= end:
            self._fresh[0] += size
            return start
        return int(ops.tier_reserve(self._handle, size))

    def free(self, offset: int, nbytes: int) -> None:
        """Takes a range back, for another of its size."""
        self._free.setdefault(pages(nbytes), []).append(offset)

    def read(self, offset: int, out: Tensor) -> int:
        """Begins to read into page-aligned uint8 memory; the result is for `wait`."""
        return int(ops.tier_read(self._handle, offset, out))

    def write(self, offset: int, data: Tensor) -> int:
        return int(ops.tier_write(self._handle, offset, data))

    def wait(self, ticket: int) -> None:
        """Returns when a read or write is done; raises what it ended with, which names the file."""
        ops.tier_wait(self._handle, ticket)

    def map(self, offset: int, nbytes: int) -> Tensor:
        """The range as memory, by way of the page cache: slow, but it costs no memory until it is touched."""
        return torch.frombuffer(mmap.mmap(self._handle, pages(nbytes), offset=offset), dtype=torch.uint8)

    def stats(self) -> dict[str, int]:
        names = ("bytes_read", "bytes_written", "requests", "unfinished", "uring", "direct")
        return dict(zip(names, ops.tier_stats(self._handle), strict=True))

    def close(self) -> None:
        """Waits for what was begun, and gives the disk's space back once no mapping is left."""
        if not self._closed:
            self._closed = True
            ops.tier_close(self._handle)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()
