"""A unit's parameters away from where they are computed on: where they live, how they come and go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Executor
from typing import Protocol

import torch
from torch import Tensor

from infold._library import ops
from infold.storages import storage_key
from infold.tiers.ring import Buffers, host_memory
from infold.tiers.store import Store
from infold.tiers.units import PAGE, aligned, pages, room

#: Returns when a transfer is done, and raises what it ended with.
Wait = Callable[[], None]


def _nothing() -> None:
    pass


def read_last(memory: Tensor, read: Callable[[], object]) -> RuntimeError | None:
    """Reads a piece into memory before it is restored for good; what that failed with, to be raised once it is.

    What is lost is not-a-number then, which is seen; whatever else is there might not be. An interrupt raises at once.
    """
    try:
        read()
    except RuntimeError as error:
        memory.fill_(0xFF)
        return error
    return None


class Layout:
    """The distinct storages of some tensors, side by side in one range of memory.

    Holds the storages and not the tensors' own: views of them that autograd saved see whatever memory is bound.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        distinct = {storage_key(tensor): tensor.detach() for tensor in tensors}
        self._spans: list[tuple[Tensor, int, int]] = []
        end = 0
        for tensor in distinct.values():
            size = tensor.untyped_storage().nbytes()
            self._spans.append((tensor, end, size))
            end += aligned(size)
        self.nbytes = room(size for _, _, size in self._spans)

    def copy_to(self, memory: Tensor) -> None:
        for tensor, start, size in self._spans:
            memory[start : start + size].copy_(_bytes(tensor))

    def bind(self, memory: Tensor) -> None:
        """Makes the storages lie in ``memory``, without copying."""
        for tensor, start, size in self._spans:
            ops.tier_bind(tensor, memory[start : start + size])

    def unbind(self) -> None:
        """Leaves the storages without memory."""
        for tensor, _, _ in self._spans:
            ops.tier_bind(tensor, None)

    def page_ranges(self, storages: Collection[int]) -> list[tuple[int, int]]:
        """The whole pages that hold these storages, by `storage_key`."""
        ranges: list[tuple[int, int]] = []
        for tensor, start, size in self._spans:
            if storage_key(tensor) in storages:
                first, last = start // PAGE * PAGE, pages(start + size)
                if ranges and first <= ranges[-1][1]:
                    first = ranges.pop()[0]
                ranges.append((first, last))
        return ranges

    def view(self, tensor: Tensor, memory: Tensor) -> Tensor:
        """A tensor of one of these storages as it lies in ``memory``, with any memory of its own left aside."""
        [start] = [start for other, start, _ in self._spans if storage_key(other) == storage_key(tensor)]
        # Where a piece ends is a whole page, and so whole items. `as_strided` counts from where the storage begins.
        part = memory[start:].view(tensor.dtype)
        return part.as_strided(tensor.shape, tensor.stride(), part.storage_offset() + tensor.storage_offset())

    def keys(self) -> set[int]:
        return {storage_key(tensor) for tensor, _, _ in self._spans}

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each storage begins in the range, and its bytes."""
        return [(start, size) for _, start, size in self._spans]

    def restore(self, memory: Tensor) -> None:
        """Gives each storage memory of its own, with what ``memory`` holds."""
        for tensor, start, size in self._spans:
            ops.tier_bind(tensor, memory[start : start + size].clone())


def version_of(tensor: Tensor) -> int:
    """Changes with every write that PyTorch notes; it notes none to what was made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's whole storage as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


class Piece(Protocol):
    """What the engine moves.

    nbytes: the room that it takes while it is here. readable: whether its storages have memory also while it is not.
    """

    nbytes: int
    readable: bool

    def load(self, ring: Buffers) -> tuple[Tensor, Wait]:
        """Begins to fetch: the memory, taken from the ring, and what waits until it is filled."""
        ...

    def save(self, memory: Tensor) -> Wait:
        """Begins to write back what has changed in ``memory``."""
        ...

    def arrive(self, memory: Tensor) -> None:
        """The parameters are in ``memory`` from now on."""
        ...

    def leave(self) -> None:
        """The parameters are at home again."""
        ...

    def version(self) -> int:
        """Changes with every write to the parameters that PyTorch knows of."""
        ...

    def keys(self) -> set[int]:
        """Of its storages (`storage_key`)."""
        ...

    def touch(self) -> bool:
        """Takes all of it for changed, whatever `version` says; whether it can change at all."""
        ...

    def restore(self) -> None:
        """Puts the parameters into plain memory for good."""
        ...


class _HomePiece(ABC):
    """Has a home that can be read as memory: whoever reads or writes a parameter outside its module does so there.

    Only what has changed is written back: of a frozen weight's trained bias, the bias.
    """

    readable = True

    def __init__(self, tensors: Iterable[Tensor], home: Callable[[int], Tensor]) -> None:
        self._tensors = list(tensors)
        self._layout = Layout(self._tensors)
        self.nbytes = self._layout.nbytes
        self._home = home(self.nbytes)
        self._versions = self._versions_now()
        self._unsaved: set[int] = set()

    def arrive(self, memory: Tensor) -> None:
        self._layout.bind(memory)
        self._versions = self._versions_now()

    def leave(self) -> None:
        self._layout.bind(self._home)

    def version(self) -> int:
        return sum(self._versions_now())

    def save(self, memory: Tensor) -> Wait:
        now = self._versions_now()
        for tensor, before, after in zip(self._tensors, self._versions, now, strict=True):
            if before != after:
                self._unsaved.add(storage_key(tensor))
        self._versions = now
        waits = [self._write(memory, start, end) for start, end in self._layout.page_ranges(self._unsaved)]

        def wait() -> None:
            for begun in waits:
                begun()
            self._unsaved.clear()

        return wait

    def keys(self) -> set[int]:
        return self._layout.keys()

    def touch(self) -> bool:
        self._unsaved.update(map(storage_key, self._tensors))
        return True

    def restore(self) -> None:
        self._layout.restore(self._home)

    def _versions_now(self) -> list[int]:
        return [version_of(tensor) for tensor in self._tensors]

    @abstractmethod
    def _write(self, memory: Tensor, start: int, end: int) -> Wait:
        """Begins to write a range home."""


class RamPiece(_HomePiece):
    """Lives in RAM, and is copied by a thread of its own."""

    def __init__(self, tensors: Iterable[Tensor], executor: Executor) -> None:
        super().__init__(tensors, host_memory)
        self._executor = executor
        self._layout.copy_to(self._home)
        self.leave()

    def load(self, ring: Buffers) -> tuple[Tensor, Wait]:
        memory = ring.take(self.nbytes)
        copied = self._executor.submit(memory.copy_, self._home)

        def wait() -> None:
            copied.result()

        return memory, wait

    def _write(self, memory: Tensor, start: int, end: int) -> Wait:
        self._home[start:end].copy_(memory[start:end])
        return _nothing


class DiskPiece(_HomePiece):
    """Lives in a range of the disk tier's file. Its home is that range by way of the page cache, which nobody touches
    but who reaches for a parameter outside its module.
    """

    def __init__(self, tensors: Iterable[Tensor], store: Store) -> None:
        self._store = store

        def reserve(nbytes: int) -> Tensor:
            self._offset = store.reserve(nbytes)
            return store.map(self._offset, nbytes)

        super().__init__(tensors, reserve)
        staging = host_memory(self.nbytes)
        self._layout.copy_to(staging)
        store.wait(store.write(self._offset, staging))
        self.leave()

    def load(self, ring: Buffers) -> tuple[Tensor, Wait]:
        memory = ring.take(self.nbytes)
        ticket = self._store.read(self._offset, memory)
        return memory, lambda: self._store.wait(ticket)

    def restore(self) -> None:
        memory = host_memory(self.nbytes)
        failure = read_last(memory, lambda: self._store.wait(self._store.read(self._offset, memory)))
        self._layout.restore(memory)
        self._store.free(self._offset, self.nbytes)
        if failure:
            raise failure

    def _write(self, memory: Tensor, start: int, end: int) -> Wait:
        ticket = self._store.write(self._offset + start, memory[start:end])
        return lambda: self._store.wait(ticket)
