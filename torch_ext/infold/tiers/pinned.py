"""Where a GPU's activations wait for their backward: pinned memory of the host, by way of a stream of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from infold.tiers.stash import ActivationCounters, Entry, Rows


class _PinnedEntry(Entry):
    home: Tensor
    #: What it is copied from, until that is done, and its version when that began.
    source: tuple[Tensor, int] | None
    copied: torch.cuda.Event
    arrived: torch.cuda.Event
    spoilt = False

    def look(self) -> None:
        """Lets the source go once it is copied. Whoever wrote to it meanwhile may have overtaken the copy."""
        if self.source is not None and self.copied.query():  # type: ignore[no-untyped-call]
            saved, version = self.source
            self.spoilt = saved._version != version
            self.source = None


class PinnedStash:
    """Entries are wanted in the reverse of the order that they came in; up to ``buffer_bytes`` are read ahead."""

    def __init__(
        self, device: torch.device, counters: ActivationCounters, limit: int | None, buffer_bytes: int
    ) -> None:
        self._device, self._counters, self._limit = device, counters, limit
        self._buffer_bytes = buffer_bytes
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._entries: dict[int, _PinnedEntry] = {}
        self._count = 0
        self.nbytes = 0

    @property
    def entries(self) -> int:
        return len(self._entries)

    @property
    def leaving(self) -> int:
        return 0

    def put(self, source: Tensor, saved: Tensor, rows: Rows | None) -> Entry | None:
        for entry in self._entries.values():
            entry.look()
        if self._limit is not None and self.nbytes + source.nbytes > self._limit:
            return None
        entry = _PinnedEntry(self._count, source.nbytes)
        self._count += 1
        entry.home = torch.empty(source.nbytes, dtype=torch.uint8, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            entry.home.copy_(source, non_blocking=True)
            entry.copied = self._stream.record_event()
        source.record_stream(self._stream)
        entry.source = saved.detach(), saved._version
        self.nbytes += entry.nbytes
        self._counters.bytes_stored += entry.nbytes
        self._entries[entry.number] = entry
        return entry

    def get(self, entry: Entry) -> Tensor:
        assert isinstance(entry, _PinnedEntry)
        entry.look()
        if entry.spoilt or (entry.source is not None and entry.source[0]._version != entry.source[1]):
            raise RuntimeError("a tensor that its gradient needs was written to while it was offloaded")
        if entry.memory is None:
            self._fetch(entry)
            self._counters.demanded += 1
        torch.cuda.current_stream(self._device).wait_event(entry.arrived)
        memory, entry.memory = entry.memory, None  # the graph's from now on
        assert memory is not None
        room = self._buffer_bytes - sum(other.nbytes for other in self._entries.values() if other.memory is not None)
        for earlier in reversed(tuple(self._entries.values())):
            if earlier.number < entry.number and earlier.memory is None:
                room -= earlier.nbytes
                if room < 0:
                    break
                self._fetch(earlier)
        return memory

    def _fetch(self, entry: _PinnedEntry) -> None:
        # Allocated on the current stream, for there it is used and freed.
        entry.memory = torch.empty(entry.nbytes, dtype=torch.uint8, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            entry.memory.copy_(entry.home, non_blocking=True)
            entry.arrived = self._stream.record_event()
        entry.memory.record_stream(self._stream)
        self._counters.fetches += 1

    def drop(self, entry: Entry) -> None:
        del self._entries[entry.number]
        self.nbytes -= entry.nbytes

    def has_idle(self) -> bool:
        return False

    def reap(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def close(self) -> None:
        self._stream.synchronize()
