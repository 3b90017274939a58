"""Dense weights that are stored packed and decoded when they are fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from infold._library import ops
from infold.config import WEIGHT_DTYPES, FusedConfig
from infold.packed import Header, Packed, float_scales, lay_out, pack, read_header
from infold.storages import storage_key
from infold.tiers.away import call_back, send_away
from infold.tiers.packed_layout import PackedLayout
from infold.tiers.pieces import Layout, Wait, version_of
from infold.tiers.ring import Buffers, host_memory
from infold.tiers.store import Store
from infold.tiers.units import pages

#: A weight is decoded by so many bytes at a time, beside its buffer.
_CHUNK_BYTES = 1 << 20
#: Rows of the tallest tile.
_TILE_ROWS = 64


def can_pack(tensor: Tensor) -> bool:
    """Whether a parameter is a weight that packs: a matrix or more, frozen, of a float dtype, alone in its storage."""
    whole = tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
    plain = type(tensor) is nn.Parameter and not tensor.requires_grad and tensor.dtype in WEIGHT_DTYPES
    return plain and tensor.dim() >= 2 and whole


class _Entry(NamedTuple):
    parameter: nn.Parameter
    header: Header
    #: Where the packed weight begins in the piece's bytes, and what it is from there on.
    start: int
    layout: PackedLayout


class PackedPiece:
    """Lives packed in RAM or on disk; comes decoded, by a thread of its own. What cannot be packed stays where it is.

    Frozen: nothing is written back.
    """

    readable = False

    def __init__(
        self, parameters: Iterable[nn.Parameter], config: FusedConfig, executor: Executor, store: Store | None = None
    ) -> None:
        self._executor = executor
        self._store = store
        weights = list({storage_key(p): p for p in parameters if can_pack(p)}.values())
        self._layout = Layout(weights)
        self._entries: list[_Entry] = []
        packs = [_pack(weight, config) for weight in weights]
        end = 0
        for weight, packed in zip(weights, packs, strict=True):
            layout = PackedLayout(packed)
            self._entries.append(_Entry(weight, read_header(packed, "weight", verify=False), end, layout))
            end += layout.nbytes
        self.stored = pages(end)
        home = host_memory(self.stored)
        for entry, packed in zip(self._entries, packs, strict=True):
            entry.layout.write(packed, home[entry.start :])
        self._home: Tensor | None = home
        if store:
            self._offset = store.reserve(self.stored)
            store.wait(store.write(self._offset, home))
            self._home = None
        self.nbytes = self._layout.nbytes + (self.stored if store else 0)
        self.leave()

    def load(self, ring: Buffers) -> tuple[Tensor, Wait]:
        memory = ring.take(self._layout.nbytes)
        staging = ring.take(self.stored) if self._store else None
        decoded = self._executor.submit(self._decode, memory, *self._begin_read(staging))

        def wait() -> None:
            try:
                decoded.result()
            finally:
                if staging is not None:
                    ring.give(staging)

        return memory, wait

    def save(self, memory: Tensor) -> Wait:
        raise RuntimeError("a weight that is stored packed was written to: it is frozen, and what was written is lost")

    def arrive(self, memory: Tensor) -> None:
        self._layout.bind(memory)
        for entry in self._entries:
            call_back(entry.parameter)

    def leave(self) -> None:
        self._layout.unbind()
        for entry in self._entries:
            send_away(entry.parameter, self._fetcher(entry))

    def version(self) -> int:
        return sum(version_of(entry.parameter) for entry in self._entries)

    def keys(self) -> set[int]:
        return self._layout.keys()

    def touch(self) -> bool:
        return False

    def restore(self) -> None:
        memory = host_memory(self._layout.nbytes)
        try:
            self._decode(memory, *self._begin_read(None))
        except RuntimeError:
            memory.fill_(0xFF)  # as in DiskPiece
            raise
        finally:
            self._layout.restore(memory)
            for entry in self._entries:
                call_back(entry.parameter)
            if self._store:
                self._store.free(self._offset, self.stored)

    def _begin_read(self, staging: Tensor | None) -> tuple[Tensor, Wait]:
        """The packed bytes, and what waits for them."""
        if self._store is None:
            assert self._home is not None
            return self._home, lambda: None
        store = self._store
        staging = host_memory(self.stored) if staging is None else staging
        ticket = store.read(self._offset, staging)
        return staging, lambda: store.wait(ticket)

    def _decode(self, memory: Tensor, packed: Tensor, wait: Wait) -> None:
        wait()
        for entry, (start, size) in zip(self._entries, self._layout.spans, strict=True):
            _decode_into(memory[start : start + size], entry, packed)

    def _fetcher(self, entry: _Entry) -> Callable[[], Tensor]:
        def fetch() -> Tensor:
            packed, wait = self._begin_read(None)
            wait()
            header = entry.header
            dense = torch.empty(header.out_features * header.in_features, dtype=header.dtype)
            _decode_into(dense.view(torch.uint8), entry, packed)
            return dense.view(entry.parameter.shape)

        return fetch


def _pack(weight: Tensor, config: FusedConfig) -> Packed:
    packed = pack(weight.flatten(1), config)
    return lay_out(packed, "fast") if config.layout == "fast" else packed


@torch.no_grad()
def _decode_into(memory: Tensor, entry: _Entry, packed: Tensor) -> None:
    """Decodes some rows after the other: in one piece it would take the dense weight's room a second time."""
    header = entry.header
    payload, directory, tables, scales = entry.layout.view(packed[entry.start :])
    floats = float_scales(scales) if scales.numel() else None
    dense = memory.view(header.dtype).view(header.out_features, header.in_features)
    rows = max(_CHUNK_BYTES // (dense.element_size() * header.in_features) // _TILE_ROWS, 1) * _TILE_ROWS
    for first in range(0, header.out_features, rows):
        indices = torch.arange(first, min(first + rows, header.out_features))
        dense[first : first + rows] = ops.fused_embedding(
            indices,
            payload,
            directory,
            tables,
            floats,
            header.codec,
            header.layout,
            header.out_features,
            header.in_features,
            header.dtype,
        )
