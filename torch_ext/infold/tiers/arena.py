"""One piece of memory that weights of any size are fetched into: none of it goes back to the system in between."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from infold.tiers.units import PAGE, pages


class Arena:
    """Hands out ranges of ``capacity`` bytes. A range is taken from the smallest hole that it fits, so that large holes
    last; neighbouring holes join.
    """

    def __init__(self, capacity: int, allocate: Callable[[int], Tensor]) -> None:
        """``allocate`` makes the memory, at the first `take`."""
        self.capacity = capacity
        self._allocate = allocate
        self._memory: Tensor | None = None
        self._holes = {0: capacity // PAGE * PAGE}  # where each begins, and its bytes
        self._taken: dict[int, tuple[int, int]] = {}

    @property
    def taken(self) -> int:
        """Bytes that are in use."""
        return sum(size for _, size in self._taken.values())

    def has_room(self, nbytes: int) -> bool:
        """Whether there is a hole for ``nbytes``: less than that may be free in all."""
        size = pages(nbytes)
        return any(hole >= size for hole in self._holes.values())

    def take(self, nbytes: int) -> Tensor:
        """Memory of ``nbytes``, rounded up to pages; beside the arena where it has no room."""
        size = pages(nbytes)
        fitting = [(hole, start) for start, hole in self._holes.items() if hole >= size]
        if not fitting:
            return self._allocate(size)
        if self._memory is None:
            self._memory = self._allocate(self.capacity)
        hole, start = min(fitting)
        del self._holes[start]
        rest = start + size
        if 4 * size >= self.capacity:
            # Large ranges from the end and small ones from the beginning: what small ones leave then joins.
            start, rest = start + hole - size, start
        if hole > size:
            self._holes[rest] = hole - size
        memory = self._memory[start : start + size]
        self._taken[id(memory)] = (start, size)
        return memory

    def give(self, memory: Tensor) -> None:
        """Takes memory back; what lay beside the arena is its holder's."""
        start, size = self._taken.pop(id(memory), (0, 0))
        if not size:
            return
        for other, hole in list(self._holes.items()):
            if other + hole == start:
                start, size = other, size + hole
                del self._holes[other]
            elif start + size == other:
                size += hole
                del self._holes[other]
        self._holes[start] = size

    def clear(self) -> None:
        """Returns the memory to the system, once nobody has any of it."""
        self._memory = None
