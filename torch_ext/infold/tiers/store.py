"""The scratch file of the disk tier. The engine behind it is Rust (`src/tier`)."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from infold._library import ops
from infold.tiers.units import pages


class Store:
    """A preallocated file without a name: it is gone with the process, however that ends.

    folder: where it lies. Its file system has to have room for all that is reserved; RuntimeError names it otherwise.
    depth: how many pieces of a transfer the disk is given at a time. backend: ``"uring"``, ``"threads"`` or ``"auto"``.
    growth: bytes that it grows by at least where more is reserved than was at first.
    """

    def __init__(
        self, folder: str | Path, nbytes: int = 0, *, depth: int = 4, backend: str = "auto", growth: int = 64 << 20
    ) -> None:
        self.folder = Path(folder)
        self._descriptor: int | None = ops.tier_open(str(folder), pages(nbytes), depth, backend)
        self._growth = pages(growth)
        self._free: dict[int, list[int]] = {}
        #: What was set aside: where each part begins, and of the last one the bytes that nobody has yet.
        self._parts: list[tuple[int, int]] = [(0, pages(nbytes))] if nbytes else []
        self._fresh = (0, pages(nbytes))
        self._maps: dict[int, Tensor] = {}

    def reserve(self, nbytes: int) -> int:
        """The offset of a range of ``nbytes``, rounded up to pages."""
        size = pages(nbytes)
        if self._free.get(size):
            return self._free[size].pop()
        start, end = self._fresh
        if start + size > end:
            start, end = self._grow(max(size, self._growth), size)
        self._fresh = (start + size, end)
        return start

    def _grow(self, wanted: int, needed: int) -> tuple[int, int]:
        """A further part of the file, of what is needed where the disk has no more."""
        try:
            start = int(ops.tier_reserve(self._handle, wanted))
        except RuntimeError:
            if wanted == needed:
                raise
            return self._grow(needed, needed)
        self._parts.append((start, wanted))
        return start, start + wanted

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

    @torch.inference_mode(False)
    def map(self, offset: int, nbytes: int) -> Tensor:
        """A range as memory, by way of the page cache: slow, but it costs no memory until it is touched.

        What the disk cannot read there is a bus error, as in any mapped file.
        """
        part, size = next((start, size) for start, size in self._parts if start <= offset < start + size)
        if part not in self._maps:
            # One for all ranges in it: each mapping takes a descriptor.
            self._maps[part] = torch.frombuffer(mmap.mmap(self._handle, size, offset=part), dtype=torch.uint8)
        return self._maps[part][offset - part : offset - part + pages(nbytes)]

    def stats(self) -> dict[str, int]:
        names = ("bytes_read", "bytes_written", "requests", "unfinished", "uring", "direct")
        return dict(zip(names, ops.tier_stats(self._handle), strict=True))

    def close(self) -> None:
        """Waits for what was begun, and gives the disk's space back once no mapping is left."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            self._maps.clear()
            ops.tier_close(descriptor)

    def __reduce__(self) -> NoReturn:
        raise TypeError("store: expected not to be copied or saved, for its file has no name")

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()

    @property
    def _handle(self) -> int:
        # The descriptor's number may be another file's by now.
        if self._descriptor is None:
            raise RuntimeError(f"{self.folder}: the tier's file is closed")
        return self._descriptor
