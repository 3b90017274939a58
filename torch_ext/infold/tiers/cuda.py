"""Pieces whose parameters are computed on a GPU: copied there on a stream of their own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor

from infold.tiers.away import call_back, send_away
from infold.tiers.pieces import Layout, Wait, read_last, version_of
from infold.tiers.ring import Buffers, host_memory
from infold.tiers.store import Store
from infold.tiers.units import pages


def device_memory(device: torch.device) -> Callable[[int], Tensor]:
    """What a ring on a GPU allocates."""

    @torch.inference_mode(False)
    def allocate(nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    return allocate


class Lane:
    """A GPU's pieces share it: a stream for copies, a thread, and pinned memory to read from disk into."""

    def __init__(self, device: torch.device, executor: Executor) -> None:
        self.device = device
        self.executor = executor
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._staging: Tensor | None = None

    def staging(self, nbytes: int) -> Tensor:
        """For the thread alone."""
        if self._staging is None or self._staging.nbytes < nbytes:
            self._staging = None
            self._staging = pinned(nbytes)
        return self._staging[: pages(nbytes)]


class CudaPiece:
    """Lives in pinned memory, or on disk; comes to the GPU's ring.

    While it is away its parameters have no memory on the GPU; whoever reaches for one outside its module gets a copy.
    """

    readable = False

    def __init__(self, tensors: Iterable[Tensor], lane: Lane, store: Store | None = None) -> None:
        self._tensors = list(tensors)
        self._lane = lane
        self._store = store
        self._layout = Layout(self._tensors)
        self.nbytes = self._layout.nbytes
        home = host_memory(self.nbytes) if store else pinned(self.nbytes)
        self._layout.copy_to(home)
        self._home = None if store else home
        if store:
            self._offset = store.reserve(self.nbytes)
            store.wait(store.write(self._offset, home))
        self.leave()

    def load(self, ring: Buffers) -> tuple[Tensor, Wait]:
        memory = ring.take(self.nbytes)
        # What used this memory last is queued already, and has to be over first.
        self._lane.stream.wait_stream(torch.cuda.current_stream(self._lane.device))
        copied = self._lane.executor.submit(self._copy, memory)

        def wait() -> None:
            torch.cuda.current_stream(self._lane.device).wait_event(copied.result())

        return memory, wait

    def save(self, memory: Tensor) -> Wait:
        """Writes all of it back, and waits for the device."""
        home = host_memory(self.nbytes) if self._home is None else self._home
        home.copy_(memory)
        if self._store is None:
            return lambda: None
        store, ticket = self._store, self._store.write(self._offset, home)
        return lambda: store.wait(ticket)

    def arrive(self, memory: Tensor) -> None:
        self._layout.bind(memory)
        for tensor in self._tensors:
            call_back(tensor)

    def leave(self) -> None:
        self._layout.unbind()
        for tensor in self._tensors:
            send_away(tensor, self._fetcher(tensor))

    def version(self) -> int:
        return sum(map(version_of, self._tensors))

    def keys(self) -> set[int]:
        return self._layout.keys()

    def touch(self) -> bool:
        return True  # all of it is written back in any case

    def restore(self) -> None:
        memory = host_memory(self.nbytes) if self._home is None else self._home
        failure = read_last(memory, lambda: self._read(memory))
        self._layout.restore(memory.to(self._lane.device))
        for tensor in self._tensors:
            call_back(tensor)
        if self._store:
            self._store.free(self._offset, self.nbytes)
        if failure:
            raise failure

    def _read(self, staging: Tensor) -> Tensor:
        """The piece in host memory: its own, or ``staging``."""
        if self._store is None:
            assert self._home is not None
            return self._home
        self._store.wait(self._store.read(self._offset, staging))
        return staging

    @torch.inference_mode(False)
    def _copy(self, memory: Tensor) -> torch.cuda.Event:
        """Runs on the lane's thread: a read from disk keeps nobody else waiting."""
        host = self._home if self._home is not None else self._read(self._lane.staging(self.nbytes))
        with torch.cuda.stream(self._lane.stream):
            memory.copy_(host, non_blocking=True)
            event: torch.cuda.Event = self._lane.stream.record_event()
        if self._home is None:
            event.synchronize()  # the next one is read into the same memory
        return event

    def _fetcher(self, tensor: Tensor) -> Callable[[], Tensor]:
        def fetch() -> Tensor:
            return self._layout.view(tensor, self._read(host_memory(self.nbytes))).to(self._lane.device, copy=True)

        return fetch


@torch.inference_mode(False)
def pinned(nbytes: int) -> Tensor:
    """Host memory that the GPU copies from by itself.

    Page-aligned, for direct reads; PyTorch's own would round its size up to a power of two.
    """
    memory = host_memory(nbytes)
    driver: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = driver.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(code) != 0:
        raise RuntimeError(f"cudaHostRegister: expected to pin {memory.nbytes} bytes, got error {int(code)}")
    weakref.finalize(memory, driver.cudaHostUnregister, memory.data_ptr())
    return memory
