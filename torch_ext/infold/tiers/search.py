"""The assignment of units to tiers with the least exposed time."""

from __future__ import annotations

import random
from collections.abc import Sequence

from infold.tiers.packing import Assignment, Packing
from infold.tiers.schedule import fetch, schedule
from infold.tiers.spec import TierSpec

#: Accesses that the local search simulates in all: a second or two.
_EFFORT = 1_500_000
#: It ends after so many tries in a row that bettered nothing.
_PATIENCE = 800


class Exposure:
    """What an assignment costs in the time model.

    uses: the index of each use's unit and the seconds that it computes, in the order of execution of one pass.
    """

    def __init__(self, packing: Packing, tiers: Sequence[TierSpec], uses: Sequence[tuple[int, float]]) -> None:
        self.packing = packing
        self._count = len(tiers)
        # Two passes: what a first one waits for that later ones do not, and what every one does.
        self._order = [unit for unit, _ in uses] * 2
        self._computes = [seconds for _, seconds in uses] * 2
        self._rows = [[fetch(tier, number, size) for number, tier in enumerate(tiers)] for size in packing.sizes]

    def cost(self, assignment: Assignment) -> tuple[float, float] | None:
        """Seconds of two passes, and of their transfers; None for an assignment that does not fit."""
        ring = self.packing.ring(assignment)
        if ring is None:
            return None
        rows = [self._rows[unit][assignment[unit]] for unit in self._order]
        transfers = [row[0] for row in rows]
        times = schedule(
            transfers, [row[1] for row in rows], [row[2] for row in rows], self._computes, self._count, ring
        )
        return (times[-1][3] if times else 0.0), sum(transfers)


def least_exposed(
    packing: Packing, tiers: Sequence[TierSpec], uses: Sequence[tuple[int, float]], seed: int = 0
) -> list[int] | None:
    """The assignment whose two passes take the least time, and then transfer the least; None if none fits.

    Exact where all assignments can be tried (`EXHAUSTIVE`). Else the best of several orders of filling, bettered by
    moving and exchanging units.
    """
    exposure = Exposure(packing, tiers, uses)
    if packing.exhaustible:
        costs = ((exposure.cost(each), each) for each in packing.all())
        best = min(((cost, each) for cost, each in costs if cost is not None), default=None)
        return None if best is None else list(best[1])
    starts = (packing.first_fit(order) for order in _orders(packing, tiers, uses))
    known = [(cost, start) for start in starts if start is not None and (cost := exposure.cost(start)) is not None]
    if not known:
        return None
    cost, assignment = min(known)
    return _climb(exposure, assignment, cost, max(200, _EFFORT // max(1, 2 * len(uses))), random.Random(seed))


def _orders(packing: Packing, tiers: Sequence[TierSpec], uses: Sequence[tuple[int, float]]) -> list[list[int]]:
    """Orders to fill the tiers by, fastest first."""
    units = range(len(packing.sizes))
    times_used = [0] * len(packing.sizes)
    for unit, _ in uses:
        times_used[unit] += 1
    slowest = max(tiers, key=lambda tier: tier.transfer_seconds(1_000_000))
    saved = [
        times_used[unit] * slowest.transfer_seconds(packing.sizes[unit]) / max(1, packing.sizes[unit]) for unit in units
    ]
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


def _climb(
    exposure: Exposure, assignment: list[int], cost: tuple[float, float], tries: int, generator: random.Random
) -> list[int]:
    """Moves a unit, or exchanges two, wherever that is better."""
    tiers = len(exposure.packing.limits)
    idle = 0
    # Those that do not fit cost a tenth of a simulation or less.
    for _ in range(10 * tries):
        other = list(assignment)
        unit = generator.randrange(len(other))
        if generator.random() < 0.5:
            other[unit] = generator.randrange(tiers)
        else:
            second = generator.randrange(len(other))
            other[unit], other[second] = other[second], other[unit]
        if other == assignment or (new := exposure.cost(other)) is None:
            continue
        tries -= 1
        idle += 1
        if new < cost:
            assignment, cost, idle = other, new, 0
        if idle >= _PATIENCE or tries <= 0:
            break
    return assignment
