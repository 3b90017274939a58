"""The assignment of units to tiers with the least exposed time."""

from __future__ import annotations

import random
from collections.abc import Sequence

from infold.tiers.packing import Assignment, Packing
from infold.tiers.schedule import NO_OVERHEAD, Overhead, fetch, schedule
from infold.tiers.spec import TierSpec

#: Accesses that the local search simulates in all: a few seconds.
_EFFORT = 4_000_000
#: It ends after so many tries in a row that bettered nothing.
_PATIENCE = 3000
#: Of the largest weights, as many less one are tried as resident from the start.
_KEPT = 4
#: One search accepts nothing worse, then another at first what is worse by this share.
_WORSE = (0.0, 0.01)

Cost = tuple[float, float]


class Exposure:
    """What an assignment costs in the time model.

    uses: the index of each use's unit and the seconds that it computes, in the order of execution of one pass.
    overhead: as in `simulate`.
    """

    def __init__(
        self,
        packing: Packing,
        tiers: Sequence[TierSpec],
        uses: Sequence[tuple[int, float]],
        overhead: Overhead = NO_OVERHEAD,
    ) -> None:
        self.packing = packing
        self._overhead = overhead
        self._count = len(tiers)
        # Two passes: what a first one waits for that later ones do not, and what every one does.
        self._order = [unit for unit, _ in uses] * 2
        self._computes = [seconds for _, seconds in uses] * 2
        self._rows = [[fetch(tier, number, size) for number, tier in enumerate(tiers)] for size in packing.sizes]

    def cost(self, assignment: Assignment) -> Cost | None:
        """Seconds of two passes, and of their transfers; None for an assignment that does not fit."""
        ring = self.packing.ring(assignment)
        if ring is None:
            return None
        rows = [self._rows[unit][assignment[unit]] for unit in self._order]
        transfers = [row[0] for row in rows]
        links, sizes = [row[1] for row in rows], [row[2] for row in rows]
        times = schedule(
            self._order, transfers, links, sizes, self._computes, self._count, ring, overhead=self._overhead
        )
        return (times[-1][3] if times else 0.0), sum(transfers)


def least_exposed(
    packing: Packing,
    tiers: Sequence[TierSpec],
    uses: Sequence[tuple[int, float]],
    seed: int = 0,
    overhead: Overhead = NO_OVERHEAD,
) -> list[int] | None:
    """The assignment whose two passes take the least time, and then transfer the least; None if none fits.

    Exact where all assignments can be tried (`EXHAUSTIVE`). Else the best of several orders of filling, bettered by
    moving and exchanging units (threshold accepting: Dueck & Scheuer 1990).
    """
    exposure = Exposure(packing, tiers, uses, overhead)
    if packing.exhaustible:
        costs = ((exposure.cost(each), each) for each in packing.all())
        least = min(((cost, each) for cost, each in costs if cost is not None), default=None)
        return None if least is None else list(least[1])
    starts = (
        packing.first_fit(order, kept) for order in _orders(packing, tiers, uses, overhead) for kept in range(_KEPT)
    )
    known = [(cost, start) for start in starts if start is not None and (cost := exposure.cost(start)) is not None]
    if not known:
        return None
    best = min(known)
    for worse in _WORSE:
        tries = max(200, _EFFORT // (len(_WORSE) * 2 * max(1, len(uses))))
        best = _wander(exposure, best, worse, tries, random.Random(seed))
    return best[1]


def _orders(
    packing: Packing, tiers: Sequence[TierSpec], uses: Sequence[tuple[int, float]], overhead: Overhead
) -> list[list[int]]:
    """Orders to fill the tiers by, fastest first."""
    units = range(len(packing.sizes))
    times_used = [0] * len(packing.sizes)
    for unit, _ in uses:
        times_used[unit] += 1
    slowest = max(tiers, key=lambda tier: tier.transfer_seconds(1_000_000))
    seconds = [slowest.transfer_seconds(size) + overhead.of(fetched=True) for size in packing.sizes]
    saved = [times_used[unit] * seconds[unit] / max(1, packing.sizes[unit]) for unit in units]
    golden = (5**0.5 - 1) / 2
    return [
        list(units),
        list(reversed(units)),
        sorted(units, key=lambda unit: packing.sizes[unit]),
        sorted(units, key=lambda unit: -packing.sizes[unit]),
        sorted(units, key=lambda unit: -saved[unit]),
        # Any first part of it is spread evenly over the model: each transfer then has layers to hide behind.
        sorted(units, key=lambda unit: unit * golden % 1),
    ]


def _wander(
    exposure: Exposure, best: tuple[Cost, list[int]], worse: float, tries: int, generator: random.Random
) -> tuple[Cost, list[int]]:
    """Moves a unit, or exchanges a few, wherever that is better or, by a share that shrinks to 0, worse."""
    tiers = len(exposure.packing.limits)
    cost, assignment = best
    total, idle = tries, 0
    # Those that do not fit cost a tenth of a simulation or less.
    for _ in range(10 * tries):
        other = list(assignment)
        chosen = [generator.randrange(len(other)) for _ in range(generator.choice((1, 2, 2, 3)))]
        if len(chosen) == 1:
            other[chosen[0]] = generator.randrange(tiers)
        else:
            for to, source in zip(chosen, [*chosen[1:], chosen[0]], strict=True):
                other[to] = assignment[source]
        if other == assignment or (new := exposure.cost(other)) is None:
            continue
        tries -= 1
        idle += 1
        if new[0] <= cost[0] * (1 + worse * tries / total):
            cost, assignment = new, other
        if new < best[0]:
            best, idle = (new, other), 0
        if idle >= _PATIENCE or tries <= 0:
            break
    return best
