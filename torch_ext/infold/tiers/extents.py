"""Ranges of a file of bounded size."""

from __future__ import annotations

import threading
from bisect import insort

from infold.tiers.store import Store
from infold.tiers.units import pages


class Extents:
    """Hands out ranges of a store, the first that fits; neighbours that come back are one again.

    limit: bytes that the file never exceeds, None for no limit. Safe to call from several threads.
    """

    def __init__(self, store: Store, limit: int | None) -> None:
        self._store, self._limit = store, limit
        self._lock = threading.Lock()
        self._free: list[tuple[int, int]] = []  # start and end, in order
        self._end = 0
        #: Bytes that are handed out.
        self.taken = 0

    def reserve(self, nbytes: int) -> int | None:
        """The offset of ``nbytes``, rounded up to pages; None where the limit leaves no such range.

        Raises RuntimeError where the disk has no room.
        """
        size = pages(nbytes)
        with self._lock:
            fitting = (index for index, (start, end) in enumerate(self._free) if end - start >= size)
            index = next(fitting, len(self._free))
            if index == len(self._free):
                # The file grows by what its last free range lacks.
                index -= bool(self._free) and self._free[-1][1] == self._end
                begin = self._free[index][0] if index < len(self._free) else self._end
                if self._limit is not None and begin + size > self._limit:
                    return None
                self._store.reserve(begin + size - self._end)
                self._end = begin + size
                self._free[index:] = [(begin, self._end)]
            start, end = self._free[index]
            self._free[index : index + 1] = [(start + size, end)] if start + size < end else []
            self.taken += size
            return start

    def free(self, offset: int, nbytes: int) -> None:
        """Takes a range, or the end of one, back."""
        start, end = offset, offset + pages(nbytes)
        if start == end:
            return
        with self._lock:
            self.taken -= end - start
            insort(self._free, (start, end))
            joined: list[tuple[int, int]] = []
            for start, end in self._free:
                if joined and joined[-1][1] == start:
                    joined[-1] = (joined[-1][0], end)
                else:
                    joined.append((start, end))
            self._free = joined
