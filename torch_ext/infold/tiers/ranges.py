"""Ranges that nobody has, of memory or of a file."""

from __future__ import annotations

from bisect import bisect


class Ranges:
    """Disjoint ranges, each a start and an end, in order; neighbours are one."""

    def __init__(self, start: int, end: int) -> None:
        self._ranges: list[tuple[int, int]] = []
        self.add(start, end)

    def fitting(self, size: int) -> list[tuple[int, int]]:
        """Those of ``size`` or more."""
        return [(start, end) for start, end in self._ranges if end - start >= size]

    def before(self, end: int) -> int:
        """Where the one that ends there begins; ``end`` if none does."""
        return next((start for start, other in self._ranges if other == end), end)

    def add(self, start: int, end: int) -> None:
        """Adds a range; an empty one is nothing. Raises ValueError where a part of it is in."""
        if start == end:
            return
        at = bisect(self._ranges, (start, end))
        before, after = self._ranges[:at][-1:], self._ranges[at:][:1]
        if any(other > start for _, other in before) or any(other < end for other, _ in after):
            raise ValueError(f"range: expected one that somebody has, got {start} to {end}")
        if at < len(self._ranges) and self._ranges[at][0] == end:
            _, end = self._ranges.pop(at)
        if at > 0 and self._ranges[at - 1][1] == start:
            at -= 1
            start, _ = self._ranges.pop(at)
        self._ranges.insert(at, (start, end))

    def remove(self, start: int, end: int) -> None:
        """Removes a range that lies in one of them."""
        [(low, high)] = [each for each in self._ranges if each[0] <= start < each[1]]
        self._ranges.remove((low, high))
        self.add(low, start)
        self.add(end, high)
