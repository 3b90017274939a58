"""One piece of memory that weights of any size are fetched into: none of it goes back to the system in between."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from infold.tiers.ranges import Ranges
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
        self._holes = Ranges(0, capacity // PAGE * PAGE)
        self._taken: dict[int, tuple[int, int]] = {}

    @property
    def taken(self) -> int:
        """Bytes that are in use."""
        return sum(end - start for start, end in self._taken.values())

    def has_room(self, nbytes: int) -> bool:
        """Whether there is a hole for ``nbytes``: less than that may be free in all."""
        return bool(self._holes.fitting(pages(nbytes)))

    def take(self, nbytes: int) -> Tensor:
        """Memory of ``nbytes``, rounded up to pages; beside the arena where it has no room."""
        size = pages(nbytes)
        fitting = self._holes.fitting(size)
        if not fitting:
            return self._allocate(size)
        if self._memory is None:
            self._memory = self._allocate(self.capacity)
        start, end = min(fitting, key=lambda hole: hole[1] - hole[0])
        if 4 * size >= self.capacity:
            # Large ranges from the end and small ones from the beginning: what small ones leave then joins.
            start = end - size
        self._holes.remove(start, start + size)
        memory = self._memory[start : start + size]
        self._taken[id(memory)] = (start, start + size)
        return memory

    def give(self, memory: Tensor) -> None:
        """Takes memory back; what lay beside the arena is its holder's."""
        self._holes.add(*self._taken.pop(id(memory), (0, 0)))

    def clear(self) -> None:
        """Returns the memory to the system, once nobody has any of it."""
        self._memory = None
