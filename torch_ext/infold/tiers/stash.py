"""Where activations wait for their backward: a file, with the latest of them in memory as long as there is room."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from infold._library import ops
from infold.config import FusedConfig
from infold.packed import Packed, float_scales, pack, read_header
from infold.tiers.packed_layout import PackedLayout, as_bytes
from infold.tiers.ring import Ring, host_memory
from infold.tiers.store import Store
from infold.tiers.units import pages

ActivationPacking = Literal["lossless", "int8"]


@dataclass
class ActivationCounters:
    """What was done with saved tensors.

    offloaded: storages taken in; shared: uses of one that was in already. kept: tensors of the size to offload that
        there was no room for. bytes_offloaded, bytes_stored: of the storages, and of what was written for them.
    fetches: reads, of which ``demanded`` began only when they were needed.
    waited: seconds that computing stood still for the disk.
    """

    offloaded: int = 0
    shared: int = 0
    kept: int = 0
    bytes_offloaded: int = 0
    bytes_stored: int = 0
    fetches: int = 0
    demanded: int = 0
    waited: float = 0.0


class Rows(NamedTuple):
    """How a storage is a matrix of floats, and whether its numbers may be rounded: all of them are in use then."""

    dtype: torch.dtype
    columns: int
    rounded: bool


class Entry:
    """A storage in a stash. ``number`` counts the entries; ``users`` are the saved tensors that lie in it."""

    def __init__(self, number: int, nbytes: int) -> None:
        self.number, self.nbytes = number, nbytes
        self.users = 0
        #: The storage's bytes, or where they are being read to, while they are here.
        self.memory: Tensor | None = None
        #: The key of the storage that a backward was given last.
        self.given: int | None = None


class Stash(Protocol):
    """Takes storages in and gives their bytes back. Its caller sees to it that one thread at a time is in it."""

    @property
    def nbytes(self) -> int:
        """Bytes that are taken."""
        ...

    @property
    def entries(self) -> int:
        """How many somebody needs."""
        ...

    @property
    def leaving(self) -> int:
        """How many were dropped and have something under way."""
        ...

    def put(self, source: Tensor, saved: Tensor, rows: Rows | None) -> Entry | None:
        """Takes a storage's bytes in, of which ``saved`` is a view; None where there is no room for them."""
        ...

    def get(self, entry: Entry) -> Tensor:
        """The bytes, not to be written to."""
        ...

    def drop(self, entry: Entry) -> None:
        """Nobody needs the entry any more. What is under way for it is not waited for."""
        ...

    def has_idle(self) -> bool:
        """Whether `reap` would free anything."""
        ...

    def reap(self) -> None:
        """Frees what dropped entries had, where nothing of theirs is under way."""
        ...

    def settle(self) -> None:
        """Waits for what dropped entries have under way, and frees it."""
        ...

    def close(self) -> None:
        """Called when all is reaped."""
        ...


class _DiskEntry(Entry):
    offset: int
    saving: Future[None]
    loading: Future[None] | None = None
    #: How the file's bytes are packed. None: as they are.
    layout: PackedLayout | None = None
    stored: int

    @property
    def idle(self) -> bool:
        return self.saving.done() and (self.loading is None or self.loading.done())


class DiskStash:
    """A file, written and read by two threads. Entries are wanted in the reverse of the order that they came in.

    limit: bytes of the file. buffer_bytes: memory for copies that are written, kept or read ahead; one storage that is
    larger has what it needs. While it packs or unpacks, each thread needs some more.
    """

    def __init__(
        self,
        folder: Path,
        counters: ActivationCounters,
        notify: Callable[[], None],
        limit: int | None,
        buffer_bytes: int,
        packing: ActivationPacking | None,
        depth: int,
        backend: str,
    ) -> None:
        self._store = Store(folder, depth=depth, backend=backend, growth=0)
        self._limit = limit
        self._ring = Ring(buffer_bytes)
        self._executor = ThreadPoolExecutor(2, "infold-activations")
        self._counters, self._notify, self._packing = counters, notify, packing
        self._entries: dict[int, _DiskEntry] = {}
        self._leaving: list[_DiskEntry] = []
        self._count = 0
        self._counting = threading.Lock()

    @property
    def nbytes(self) -> int:
        return self._store.taken

    @property
    def entries(self) -> int:
        return len(self._entries)

    @property
    def leaving(self) -> int:
        return len(self._leaving)

    def put(self, source: Tensor, saved: Tensor, rows: Rows | None) -> Entry | None:
        if not self._store.has_room(source.nbytes, self._limit):
            return None
        offset = self._store.reserve(source.nbytes)
        entry = _DiskEntry(self._count, source.nbytes)
        self._count += 1
        entry.offset, entry.stored = offset, pages(entry.nbytes)
        try:
            self._make_room(entry.nbytes, entry.number, at_once=False)
        except BaseException:
            self._store.free(offset, entry.stored)
            raise
        entry.memory = self._ring.take(entry.nbytes)
        # Copied now: whoever writes to the tensor later does not change what was saved.
        entry.memory[: entry.nbytes].copy_(source)
        self._entries[entry.number] = entry
        entry.saving = self._executor.submit(self._save, entry, entry.memory, rows)
        return entry

    def get(self, entry: Entry) -> Tensor:
        assert isinstance(entry, _DiskEntry)
        if entry.memory is None:
            self._make_room(entry.nbytes, entry.number, at_once=False)
            self._fetch(entry)
            self._counters.demanded += 1
        assert entry.memory is not None
        if entry.loading is not None:
            error = self._await(entry.loading)
            entry.loading = None
            if error is not None:
                self._let_go(entry)
                raise error
        elif self._packing == "int8":
            self._await(entry.saving)  # which rounds
        memory = entry.memory
        self._prefetch(entry.number)
        return memory

    def drop(self, entry: Entry) -> None:
        assert isinstance(entry, _DiskEntry)
        del self._entries[entry.number]
        self._leaving.append(entry)
        for future in (entry.saving, entry.loading):
            if future is not None and not future.cancel():
                future.add_done_callback(lambda _: self._notify())

    def has_idle(self) -> bool:
        return any(entry.idle for entry in tuple(self._leaving))

    def reap(self) -> None:
        for entry in [entry for entry in self._leaving if entry.idle]:
            self._leaving.remove(entry)
            if entry.memory is not None:
                self._let_go(entry)
            self._store.free(entry.offset, entry.stored)

    def settle(self) -> None:
        wait([future for entry in self._leaving for future in (entry.saving, entry.loading) if future is not None])
        self.reap()

    def close(self) -> None:
        # One of its own threads may be here.
        self._executor.shutdown(wait=False)
        self._store.close()

    def _let_go(self, entry: Entry) -> None:
        memory, entry.memory = entry.memory, None
        assert memory is not None
        # A gradient may be a view of what was saved: such memory is not used again. One more asks here.
        alone = torch._C._storage_Use_Count(memory.untyped_storage()._cdata) <= 2
        self._ring.give(memory, keep=alone)

    def _make_room(self, nbytes: int, number: int, *, at_once: bool) -> bool:
        """Lets copies go that the file has, until ``nbytes`` for the entry of that number fit or nothing is left, and
        says whether they do. Those first that come after it, for they were used, then those that are wanted last.

        at_once: waits for nothing, and leaves what comes before.
        """
        if self._ring.has_room(nbytes):
            return True
        for entry in sorted(self._entries.values(), key=lambda entry: (entry.number < number, entry.number)):
            if entry.memory is None or (at_once and (entry.number < number or not entry.idle)):
                continue
            error = self._await(entry.saving)
            if entry.loading is not None:
                error = error or self._await(entry.loading)
            if error is not None and at_once:
                continue
            if error is not None:
                raise error  # what failed to be written is here still
            entry.loading = None
            self._let_go(entry)
            if self._ring.has_room(nbytes):
                return True
        return False

    def _prefetch(self, number: int) -> None:
        """Begins to read what came before, the latest first, as far as there is room."""
        for entry in reversed(tuple(self._entries.values())):
            if entry.number < number and entry.memory is None:
                if not self._make_room(entry.nbytes, number + 1, at_once=True):
                    return
                self._fetch(entry)

    def _fetch(self, entry: _DiskEntry) -> None:
        entry.memory = self._ring.take(entry.nbytes)
        entry.loading = self._executor.submit(self._load, entry, entry.memory)
        self._counters.fetches += 1

    def _await(self, future: Future[None]) -> BaseException | None:
        begun = time.perf_counter()
        error = future.exception()
        self._counters.waited += time.perf_counter() - begun
        return error

    # --- in the threads ---

    def _save(self, entry: _DiskEntry, memory: Tensor, rows: Rows | None) -> None:
        packed = self._pack(memory[: entry.nbytes], rows) if self._packing and rows else None
        if packed is not None and pages((layout := PackedLayout(packed)).nbytes) < pages(entry.nbytes):
            entry.layout = layout
            if rows and rows.rounded:
                # Gradients do not depend on whether the disk was in time.
                memory[: entry.nbytes].copy_(as_bytes(_unpack(packed)))
            memory = host_memory(layout.nbytes)
            layout.write(packed, memory)
            self._store.free(entry.offset + memory.nbytes, entry.stored - memory.nbytes)
            entry.stored = memory.nbytes
        self._store.wait(self._store.write(entry.offset, memory))
        with self._counting:
            self._counters.bytes_stored += memory.nbytes

    def _pack(self, data: Tensor, rows: Rows) -> Packed:
        matrix = data.view(rows.dtype).view(-1, rows.columns)
        if rows.rounded:
            try:
                return pack(matrix, FusedConfig("int8"))
            except ValueError:
                pass  # an infinity or NaN has no level
        return pack(matrix, FusedConfig("lossless"))

    def _load(self, entry: _DiskEntry, memory: Tensor) -> None:
        if entry.layout is None:
            self._store.wait(self._store.read(entry.offset, memory))
            return
        stored = host_memory(entry.stored)
        self._store.wait(self._store.read(entry.offset, stored))
        memory[: entry.nbytes].copy_(as_bytes(_unpack(entry.layout.view(stored))))


def _unpack(packed: Packed) -> Tensor:
    header = read_header(packed, "activation", verify=False)
    given = float_scales(packed.scales) if packed.scales.numel() else None
    layout = (header.codec, header.layout, header.out_features, header.in_features, header.dtype)
    dense: Tensor = ops.unpack.default(*packed[:3], given, *layout)
    return dense
