"""The time model (math.md §8): when each weight is fetched and each layer computes, and what of the fetching shows.

Fetches are issued in the order in which units are used. A fetch waits until the layer ``distance`` uses before it is
reached and the ring of buffers has room, then for its tier's link, which carries one transfer at a time; it takes
``TierSpec.transfer_seconds``. A layer computes when the one before has ended and its own weight has come. A weight
stays until another needs its room: those that have computed go in the order of use, and what is still there when it is
used again is not fetched. What the computing thread does for units that are away (`Overhead`) counts to the layer's
computing; a fetch is paid for at the use that it is for, where the engine pays a little before. `predict`, the
``traffic`` objective of `plan` and `LearnedPolicy` all use this model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from infold.tiers.spec import TierSpec
from infold.tiers.units import pages


class Access(NamedTuple):
    """One use of a unit: the bytes that its tier stores, and how long its layer computes."""

    unit: str
    tier: str
    nbytes: int
    compute_seconds: float


class Overhead(NamedTuple):
    """Seconds of the computing thread, beside waiting: of each use of a unit that is away, and of each fetch."""

    use: float = 0.0
    fetch: float = 0.0

    def of(self, fetched: bool) -> float:
        """Of one use of a unit that is away."""
        return self.use + self.fetch if fetched else self.use


NO_OVERHEAD = Overhead()


class Event(NamedTuple):
    """What became of an access, in seconds from the start.

    Where nothing is fetched, the transfer starts and ends when the layer is reached.
    """

    unit: str
    tier: str
    nbytes: int
    transfer_start: float
    transfer_end: float
    compute_start: float
    compute_end: float
    #: How long the layer waited for its weight after the one before had computed.
    wait: float

    @property
    def fetched(self) -> bool:
        return self.transfer_end > self.transfer_start


@dataclass(frozen=True)
class Timeline:
    """A simulated run: its events in order of use, and their sums."""

    events: tuple[Event, ...]
    seconds: float
    #: With the overhead.
    compute_seconds: float
    #: Σ waits: ``seconds`` less ``compute_seconds``.
    exposed_seconds: float
    #: What each tier's link carried; a resident tier carries nothing.
    bytes_by_tier: dict[str, int]
    #: How long each tier's link was busy.
    transfer_seconds_by_tier: dict[str, float]

    @property
    def bound_seconds(self) -> float:
        """No schedule is shorter: the larger of the computing and the busiest link."""
        return max(self.compute_seconds, *self.transfer_seconds_by_tier.values(), 0.0)


def simulate(
    accesses: Sequence[Access],
    specs: Mapping[str, TierSpec],
    *,
    buffer_bytes: int,
    distance: int | None = None,
    overhead: Overhead = NO_OVERHEAD,
) -> Timeline:
    """Schedules the accesses in their order. A steady state is the accesses of a pass several times over.

    specs: each tier by its name. buffer_bytes: the ring in which fetched weights lie, each in whole `PAGE`s.
    distance: a fetch is issued no sooner than the layer so many uses before it is reached; None
    leaves that to the ring. overhead: what `measure_overhead` gives.

    Raises ValueError for an unknown tier, a weight that the ring cannot hold, and times and sizes below zero.
    """
    if distance is not None and distance < 0:
        raise ValueError(f"distance: expected zero or more uses, got {distance}")
    if buffer_bytes < 0:
        raise ValueError(f"buffer_bytes: expected zero or more, got {buffer_bytes}")
    check_overhead(overhead)
    transfers, links, sizes = [], [], []
    numbers = {name: number for number, name in enumerate(specs)}
    for unit, tier, nbytes, seconds in accesses:
        if tier not in numbers:
            raise ValueError(f"{unit}: expected one of the tiers {', '.join(specs)}, got {tier!r}")
        if nbytes < 0:
            raise ValueError(f"{unit}: nbytes: expected zero or more, got {nbytes}")
        if not (seconds >= 0 and math.isfinite(seconds)):
            raise ValueError(f"{unit}: compute_seconds: expected zero or more, got {seconds}")
        transfer, link, size = fetch(specs[tier], numbers[tier], nbytes)
        if size > buffer_bytes:
            raise ValueError(f"{unit}: expected at most buffer_bytes = {buffer_bytes}, got {size} bytes to fetch")
        transfers.append(transfer)
        links.append(link)
        sizes.append(size)
    numbered: dict[tuple[str, str], int] = {}
    units = [numbered.setdefault(access[:2], len(numbered)) for access in accesses]
    computes = [access.compute_seconds for access in accesses]
    times = schedule(units, transfers, links, sizes, computes, len(specs), buffer_bytes, distance, overhead)
    events: list[Event] = []
    spent = list(computes)
    carried = dict.fromkeys(specs, 0)
    busy = dict.fromkeys(specs, 0.0)
    before = 0.0
    for access, transfer, link, (start, end, begin, done) in zip(accesses, transfers, links, times, strict=True):
        events.append(Event(access.unit, access.tier, access.nbytes, start, end, begin, done, begin - before))
        if link >= 0:
            spent.append(overhead.of(events[-1].fetched))
        if events[-1].fetched:
            carried[access.tier] += access.nbytes
            busy[access.tier] += transfer
        before = done
    computing = math.fsum(spent)
    exposed = math.fsum(event.wait for event in events)
    return Timeline(tuple(events), before, computing, exposed, carried, busy)


def check_overhead(overhead: Overhead) -> None:
    """Raises ValueError for seconds below zero."""
    if not all(0 <= seconds < math.inf for seconds in overhead):
        raise ValueError(f"overhead: expected zero or more seconds, got {tuple(overhead)}")


def fetch(spec: TierSpec, link: int, nbytes: int) -> tuple[float, int, int]:
    """What `schedule` is to know of a unit in a tier: seconds of its transfer, its link, and its bytes in the ring."""
    if spec.resident or nbytes == 0:
        return 0.0, -1, 0
    return spec.transfer_seconds(nbytes), link, pages(nbytes)


def schedule(
    units: Sequence[int],
    transfers: Sequence[float],
    links: Sequence[int],
    sizes: Sequence[int],
    computes: Sequence[float],
    link_count: int,
    buffer_bytes: int,
    distance: int | None = None,
    overhead: Overhead = NO_OVERHEAD,
) -> list[tuple[float, float, float, float]]:
    """`simulate` on plain numbers, for searches that call it thousands of times: nothing is checked.

    Of each access: the unit's number, its `fetch` (link -1: nothing is fetched) and the seconds that it computes.
    Returns the start and end of each transfer, which are the same where there is none, and of each computation.
    """
    times: list[tuple[float, float, float, float]] = []
    free_at = [0.0] * link_count
    issued = ended = 0.0
    used = 0
    using, fetching = overhead
    held: dict[int, int] = {}  # what is in the ring, in the order of its last use → that use
    for index, (unit, transfer, link, size, compute) in enumerate(
        zip(units, transfers, links, sizes, computes, strict=True)
    ):
        start = arrived = ended
        if link >= 0 and held.pop(unit, None) is None:
            if distance is not None and index > distance:
                issued = max(issued, times[index - distance - 1][3])
            while used + size > buffer_bytes:
                # The engine lets go of what is not in use as soon as a fetch wants room: in the order of use.
                use = held.pop(next(iter(held)))
                used -= sizes[use]
                issued = max(issued, times[use][3])
            used += size
            start = max(issued, free_at[link])
            arrived = free_at[link] = start + transfer
            compute += fetching
        if link >= 0:
            compute += using
            held[unit] = index
        begin = max(ended, arrived)
        ended = begin + compute
        times.append((start, arrived, begin, ended))
    return times
