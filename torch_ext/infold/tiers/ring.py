"""Buffers that weights are fetched into: page-aligned, used again, of bounded total size."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from infold.tiers.units import PAGE, pages

#: Below it, the system has no huge page to give.
_HUGE_PAGE = 2 << 20


@torch.inference_mode(False)
def host_memory(nbytes: int) -> Tensor:
    """A page-aligned uint8 tensor of whole pages, in huge ones where there are any: a direct transfer then pins few.

    Its memory returns to the system with it.
    """
    size = max(pages(nbytes), PAGE)
    huge = size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
    # Room to begin with a huge page: what is never touched takes no memory.
    memory = mmap.mmap(-1, size + _HUGE_PAGE if huge else size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_PAGE if huge else 0
    if huge:
        end = start + size // _HUGE_PAGE * _HUGE_PAGE
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, end - start)
            # A huge page here would take more memory than was asked for.
            memory.madvise(mmap.MADV_NOHUGEPAGE, end)
    # No view: who takes the storage is to find these bytes there, and no other holder.
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)


class Buffers(Protocol):
    """Memory of at most ``capacity`` bytes in all that weights are fetched into."""

    capacity: int

    @property
    def taken(self) -> int:
        """Bytes that are in use."""
        ...

    def has_room(self, nbytes: int) -> bool: ...

    def take(self, nbytes: int) -> Tensor:
        """Memory of ``nbytes``, rounded up to pages. The caller has asked `has_room`."""
        ...

    def give(self, memory: Tensor) -> None:
        """Takes memory back."""
        ...

    def clear(self) -> None:
        """Returns to the system what is not in use."""
        ...


class Ring:
    """Hands out memory of at most ``capacity`` bytes in all; what comes back is used again for the same size."""

    def __init__(self, capacity: int, allocate: Callable[[int], Tensor] = host_memory) -> None:
        self.capacity = capacity
        self._allocate = allocate
        self._free: dict[int, list[Tensor]] = {}
        self._free_bytes = 0
        self._taken: dict[int, int] = {}

    @property
    def taken(self) -> int:
        """Bytes that are in use."""
        return sum(self._taken.values())

    def has_room(self, nbytes: int) -> bool:
        return self.taken + pages(nbytes) <= self.capacity

    def take(self, nbytes: int) -> Tensor:
        """Memory of ``nbytes``, rounded up to pages. The caller has asked `has_room`."""
        size = pages(nbytes)
        kept = self._free.get(size)
        if kept:
            memory = kept.pop()
            self._free_bytes -= size
        else:
            while self._free_bytes and self.taken + self._free_bytes + size > self.capacity:
                self._drop()
            memory = self._allocate(size)
        self._taken[id(memory)] = size
        return memory

    def give(self, memory: Tensor, *, keep: bool = True) -> None:
        """Takes memory back; ``keep`` is whether it is one of the ring's own."""
        size = self._taken.pop(id(memory))
        if keep:
            self._free.setdefault(size, []).append(memory)
            self._free_bytes += size

    def clear(self) -> None:
        """Returns to the system what is not in use."""
        self._free.clear()
        self._free_bytes = 0

    def _drop(self) -> None:
        size = next(size for size, kept in self._free.items() if kept)
        self._free[size].pop()
        self._free_bytes -= size
