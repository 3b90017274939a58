"""Tiers that are not there: the waits that they would cause, over weights that stay where they are."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from infold.storages import storage_key
from infold.tiers.pieces import Wait
from infold.tiers.ring import Buffers
from infold.tiers.spec import TierSpec
from infold.tiers.units import pages

#: The last part of a wait is spent looking at the clock, for sleeping is not that precise.
_SPIN_SECONDS = 3e-4


def wait_until(moment: float) -> None:
    """Returns at ``moment`` (`time.perf_counter`), to some microseconds."""
    while (left := moment - time.perf_counter()) > 0:
        if left > _SPIN_SECONDS:
            time.sleep(left - _SPIN_SECONDS)


class Link:
    """A tier's way to the device: one transfer after the other, each as long as its specification says."""

    def __init__(self, spec: TierSpec) -> None:
        self._spec = spec
        self._free_at = 0.0

    def transfer(self, nbytes: int) -> Wait:
        """Begins a transfer; the result waits for its end, on the device where that is CUDA."""
        self._free_at = max(self._free_at, time.perf_counter()) + self._spec.transfer_seconds(nbytes)
        end = self._free_at
        return lambda: wait_until(end)


class CudaLink(Link):
    """A link whose transfers delay a stream and not the host: kernels that spin, on a stream of their own."""

    def __init__(self, spec: TierSpec, device: torch.device) -> None:
        super().__init__(spec)
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._cycles_per_second = torch.cuda.get_device_properties(device).clock_rate * 1e3

    def transfer(self, nbytes: int) -> Wait:
        # As a copy would: what has the ring's memory now goes first.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(int(self._spec.transfer_seconds(nbytes) * self._cycles_per_second))  # type: ignore[no-untyped-call]
            done = self._stream.record_event()
        return lambda: torch.cuda.current_stream(self._device).wait_event(done)


class EmulatedPiece:
    """A unit of ``nbytes`` *stored* bytes behind a link."""

    readable = True

    def __init__(self, tensors: Iterable[Tensor], nbytes: int, link: Link) -> None:
        self._keys = set(map(storage_key, tensors))
        self.nbytes = pages(nbytes)
        self._stored = nbytes
        self._link = link

    def load(self, ring: Buffers) -> tuple[Tensor, Wait]:
        return ring.take(self.nbytes), self._link.transfer(self._stored)

    def save(self, memory: Tensor) -> Wait:
        return self._link.transfer(self._stored)

    def arrive(self, memory: Tensor) -> None:
        pass

    def leave(self) -> None:
        pass

    def version(self) -> int:
        return 0

    def keys(self) -> set[int]:
        return self._keys

    def touch(self) -> bool:
        return False

    def restore(self) -> None:
        pass


def no_memory(nbytes: int) -> Tensor:
    """What an emulated ring allocates."""
    return torch.empty(0, dtype=torch.uint8)


def link_for(spec: TierSpec, device: torch.device) -> Link:
    return CudaLink(spec, device) if device.type == "cuda" else Link(spec)
