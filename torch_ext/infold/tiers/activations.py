"""Lets what autograd saves for backward wait elsewhere."""

from __future__ import annotations

import math
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from infold.config import WEIGHT_DTYPES
from infold.storages import storage_key
from infold.tiers.pinned import PinnedStash
from infold.tiers.stash import ActivationCounters, ActivationPacking, DiskStash, Entry, Rows, Stash


def offload_activations(
    model: nn.Module | Iterable[Tensor],
    *,
    folder: str | Path | None = None,
    min_bytes: int = 1 << 20,
    limit_bytes: int | None = None,
    buffer_bytes: int = 256 << 20,
    pack: ActivationPacking | None = None,
    depth: int = 32,
    backend: str = "auto",
) -> ActivationOffload:
    """A context manager: what autograd saves inside it waits for its backward on disk, or for a GPU's in pinned memory
    of the host. The backward may come after it.

    model: whose parameters and buffers, and views of them, stay where they are; or just those tensors.
    folder: where the file lies; the default is that of `attach`.
    min_bytes: storages of at least this size are offloaded, each once, however many views of it are saved.
    limit_bytes: of the file, or of the pinned memory of a GPU; a tensor that would exceed it stays where it is.
    buffer_bytes: memory for what is being written or read ahead; a storage that is larger has it to itself.
    pack: ``"lossless"`` packs float32, float16 and bfloat16 tensors before they are written: gradients keep their bits.
        ``"int8"`` rounds them to 255 levels a row (of the dimension that is contiguous), each value by up to half of a
        level, the row's largest magnitude / 127: that changes gradients. Neither on a GPU.
    depth, backend: of `infold.tiers.Store`.

    What is offloaded to disk does not change if the tensor is written to afterwards; on a GPU, that is the error that
    it is without offloading. Nothing notes writes by way of ``tensor.data``, not even PyTorch's version: what is saved
    before and after one waits once, as it was before. Raises ValueError for a wrong argument; a forward or backward in
    it, RuntimeError with the file's name where the disk has no room or fails.
    """
    for name, value in (("min_bytes", min_bytes), ("buffer_bytes", buffer_bytes), ("limit_bytes", limit_bytes or 0)):
        if value < 0:
            raise ValueError(f"{name}: expected zero or more bytes, got {value}")
    if pack is not None and pack not in get_args(ActivationPacking):
        raise ValueError(f"pack: expected one of {', '.join(get_args(ActivationPacking))} or None, got {pack!r}")
    if not isinstance(model, nn.Module):
        model = list(model)
    where = Path(folder or tempfile.gettempdir())
    return ActivationOffload(model, where, max(1, min_bytes), limit_bytes, buffer_bytes, pack, depth, backend)


class _Kept:
    """A saved tensor that stays. PyTorch itself does not look for writes to what hooks have packed.

    Detached, which shares the version: a result that its own node holds would never be freed.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def unpack(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"{self._tensor.dtype} tensor of shape {tuple(self._tensor.shape)} is at version "
                f"{self._tensor._version}; expected version {self._version}"
            )
        return self._tensor


class _Away:
    """A saved tensor as a view of a stashed storage, which is dropped with the last of them."""

    def __init__(self, owner: ActivationOffload, stash: Stash, entry: Entry, tensor: Tensor) -> None:
        self.owner, self.stash, self.entry = owner, stash, entry
        self.dtype = tensor.dtype
        self.geometry = tensor.storage_offset(), tensor.size(), tensor.stride()

    def view(self, memory: Tensor) -> Tensor:
        tensor = torch.empty(0, dtype=self.dtype, device=memory.device)
        return tensor.set_(memory.untyped_storage(), *self.geometry)

    def __del__(self) -> None:
        # The garbage collector may be here in the middle of anything, and in any thread.
        self.owner._dropped.append((self.stash, self.entry))
        self.owner._drain()


#: A storage as it was: its address, the tensor's version and dtype, the address and number of its bytes.
_Key = tuple[int, int, torch.dtype, int, int]


class ActivationOffload:
    """What `offload_activations` returns. May be entered many times, and is meant to be around many steps: its file is
    closed when it is left and no graph needs it any more.
    """

    def __init__(
        self,
        model: nn.Module | list[Tensor],
        folder: Path,
        min_bytes: int,
        limit_bytes: int | None,
        buffer_bytes: int,
        packing: ActivationPacking | None,
        depth: int,
        backend: str,
    ) -> None:
        self._model, self._folder, self._min_bytes, self._limit = model, folder, min_bytes, limit_bytes
        self._buffer_bytes, self._packing, self._depth, self._backend = buffer_bytes, packing, depth, backend
        self.counters = ActivationCounters()
        self._entered: list[saved_tensors_hooks] = []
        self._staying: set[int] = set()
        self._stashes: dict[torch.device, Stash] = {}
        self._known: dict[_Key, tuple[StorageWeakRef, Entry]] = {}
        self._keys: dict[Entry, list[_Key]] = {}
        self._given: dict[int, tuple[Entry, int]] = {}
        self._dropped: deque[tuple[Stash, Entry]] = deque()
        self._lock = threading.Lock()

    @property
    def stashed_bytes(self) -> int:
        """What the graphs that are alive have stashed."""
        with self._alone():
            for stash in self._stashes.values():
                stash.settle()
            return sum(stash.nbytes for stash in self._stashes.values())

    def __enter__(self) -> ActivationOffload:
        model = self._model
        tensors = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else model
        self._staying = {storage_key(tensor) for tensor in tensors if tensor.layout == torch.strided}
        hooks = saved_tensors_hooks(self._pack, _unpack)
        hooks.__enter__()
        self._entered.append(hooks)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered.pop().__exit__()
        with self._alone():
            for stash in self._stashes.values():
                stash.settle()

    def _pack(self, tensor: Tensor) -> _Kept | _Away:
        if not _is_plain(tensor):
            return _Kept(tensor)
        storage = tensor.untyped_storage()
        if storage.nbytes() < self._min_bytes or storage._cdata in self._staying:
            return _Kept(tensor)
        with self._alone():
            stash = self._stash(tensor.device)
            entry = self._find(tensor)
            if entry is None:
                source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                entry = stash.put(source, tensor, _rows(tensor, self._packing) if self._packing else None)
                if entry is None:
                    self.counters.kept += 1
                    return _Kept(tensor)
                self.counters.offloaded += 1
                self.counters.bytes_offloaded += entry.nbytes
                key = _key(tensor)
                self._known[key] = StorageWeakRef(storage), entry  # type: ignore[no-untyped-call]
                self._keys[entry] = [key]
            else:
                self.counters.shared += 1
            entry.users += 1
            return _Away(self, stash, entry, tensor)

    def _find(self, tensor: Tensor) -> Entry | None:
        """The entry that has a tensor's storage as it is."""
        # The weak reference keeps the storage's address from being another's.
        found = self._known.get(_key(tensor))
        if found is not None and not found[0].expired():  # type: ignore[no-untyped-call]
            return found[1]
        # Or it is what backward was given, and saves again for a derivative of higher order.
        entry, version = self._given.get(storage_key(tensor), (None, 0))
        if entry is None or entry.memory is None or storage_key(entry.memory) != storage_key(tensor):
            return None
        return entry if version == tensor._version else None

    def _fetch(self, away: _Away) -> Tensor:
        with self._alone():
            memory = away.stash.get(away.entry)
            tensor = away.view(memory)
            if away.entry.given is not None:
                self._given.pop(away.entry.given, None)
            away.entry.given = storage_key(memory)
            self._given[away.entry.given] = away.entry, tensor._version
            return tensor

    def _stash(self, device: torch.device) -> Stash:
        if device not in self._stashes:
            self._stashes[device] = (
                PinnedStash(device, self.counters, self._limit, self._buffer_bytes)
                if device.type == "cuda"
                else DiskStash(
                    self._folder,
                    self.counters,
                    self._drain,
                    self._limit,
                    self._buffer_bytes,
                    self._packing,
                    self._depth,
                    self._backend,
                )
            )
        return self._stashes[device]

    # --- what graphs let go ---

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._drain()
        try:
            with self._lock:
                yield
        finally:
            self._drain()

    def _drain(self) -> None:
        """Frees what nobody needs any more, and waits for nothing; whoever is inside does it when they leave."""
        while self._has_work() and self._lock.acquire(blocking=False):
            try:
                while self._dropped:
                    self._release(*self._dropped.popleft())
                for stash in self._stashes.values():
                    stash.reap()
                if self._is_over():
                    for stash in self._stashes.values():
                        stash.close()
                    self._stashes.clear()
                    self._given.clear()
            finally:
                self._lock.release()

    def _has_work(self) -> bool:
        return bool(self._dropped) or self._is_over() or any(s.has_idle() for s in tuple(self._stashes.values()))

    def _is_over(self) -> bool:
        stashes = tuple(self._stashes.values())
        return bool(stashes) and not self._entered and not any(stash.entries or stash.leaving for stash in stashes)

    def _release(self, stash: Stash, entry: Entry) -> None:
        entry.users -= 1
        if entry.users == 0:
            for key in self._keys.pop(entry):
                self._known.pop(key, None)
            if entry.given is not None:
                self._given.pop(entry.given, None)
            stash.drop(entry)


def _unpack(packed: Any) -> Tensor:
    tensor: Tensor = packed.unpack() if isinstance(packed, _Kept) else packed.owner._fetch(packed)
    return tensor


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but numbers in a storage."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized or tensor._is_zerotensor())
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._is_functional_tensor(tensor)
    )


def _key(tensor: Tensor) -> _Key:
    storage = tensor.untyped_storage()
    return storage._cdata, tensor._version, tensor.dtype, storage.data_ptr(), storage.nbytes()


def _rows(tensor: Tensor, packing: ActivationPacking) -> Rows | None:
    """How to pack a tensor's storage; None for what is not packed."""
    storage = tensor.untyped_storage()
    if tensor.dtype not in WEIGHT_DTYPES or storage.nbytes() % tensor.element_size():
        return None
    count = storage.nbytes() // tensor.element_size()
    order = sorted(range(tensor.dim()), key=lambda dim: tensor.stride(dim), reverse=True)
    dense = tensor.numel() == count and tensor.permute(order).is_contiguous()
    if packing == "int8" and dense and order:
        return Rows(tensor.dtype, tensor.size(order[-1]), True)
    # Rows do not matter to what keeps every bit, but one that is very long takes ten times as long to pack.
    columns = math.gcd(count, 1024)
    return Rows(tensor.dtype, columns if columns >= 16 else count, False)
