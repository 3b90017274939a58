"""The scratch file of the disk tier. The engine behind it is Rust (`src/tier`)."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from infold._library import ops
from infold.tiers.ranges import Ranges
from infold.tiers.units import pages


class Store:
    """A preallocated file without a name: it is gone with the process, however that ends. Ranges of it are handed out
    to any thread.

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
        #: Where the file ends.
        self._end = pages(nbytes)
        self._free = Ranges(0, self._end)
        self._lock = threading.Lock()
        #: Bytes that are handed out.
        self.taken = 0
        #: The file as memory, as long as it was then.
        self._map: Tensor | None = None

    def has_room(self, nbytes: int, limit: int | None) -> bool:
        """Whether a file of at most ``limit`` bytes has a range of ``nbytes``; None is no limit."""
        size = pages(nbytes)
        with self._lock:
            return limit is None or bool(self._free.fitting(size)) or self._free.before(self._end) + size <= limit

    def reserve(self, nbytes: int) -> int:
        """The offset of a range of ``nbytes``, rounded up to pages: the first that fits."""
        size = pages(nbytes)
        handle = self._handle  # a closed file has no room, free ranges or not
        with self._lock:
            if not self._free.fitting(size):
                self._grow(handle, self._free.before(self._end) + size - self._end)
            start, _ = self._free.fitting(size)[0]
            self._free.remove(start, start + size)
            self.taken += size
        return start

    def _grow(self, handle: int, needed: int) -> None:
        """Lengthens the file, by no more than what is needed where the disk has no more."""
        wanted = max(needed, self._growth)
        try:
            ops.tier_reserve(handle, wanted)
        except RuntimeError:
            if wanted == needed:
                raise
            wanted = needed
            ops.tier_reserve(handle, wanted)
        self._free.add(self._end, self._end + wanted)
        self._end += wanted

    def free(self, offset: int, nbytes: int) -> None:
        """Takes a range, or a part of one, back."""
        size = pages(nbytes)
        with self._lock:
            self._free.add(offset, offset + size)
            self.taken -= size

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
        end = offset + pages(nbytes)
        if self._map is None or self._map.nbytes < end:
            # All of it, for all ranges: each mapping takes a descriptor. An older one lives as long as its tensors.
            self._map = torch.frombuffer(mmap.mmap(self._handle, self._end), dtype=torch.uint8)
        return self._map[offset:end]

    def stats(self) -> dict[str, int]:
        names = ("bytes_read", "bytes_written", "requests", "unfinished", "uring", "direct")
        return dict(zip(names, ops.tier_stats(self._handle), strict=True))

    def close(self) -> None:
        """Waits for what was begun, and gives the disk's space back once no mapping is left."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            self._map = None
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
