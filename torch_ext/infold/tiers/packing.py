"""Sizes into budgets: which assignments of units to tiers fit, the ring of buffers counted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import nlargest

from infold.tiers.units import PAGE

#: As many assignments are tried one by one where a rule is to be exact.
EXHAUSTIVE = 2**13

#: The index of each unit's tier.
Assignment = Sequence[int]


@dataclass(frozen=True)
class Packing:
    """The budgets that an assignment keeps.

    sizes: bytes of each unit, as stored. rooms: in a buffer. limits: of each tier, None for no limit. resident: tiers
    that nothing is fetched from. buffers: how many of the largest weights to fetch the ring holds, if the first tier
    has room for so many.
    """

    sizes: tuple[int, ...]
    rooms: tuple[int, ...]
    limits: tuple[int | None, ...]
    resident: tuple[bool, ...]
    buffers: int

    @property
    def exhaustible(self) -> bool:
        """Whether all assignments can be tried."""
        return math.prod([len(self.limits)] * min(len(self.sizes), 64)) <= EXHAUSTIVE

    def all(self) -> itertools.product[tuple[int, ...]]:
        """Every assignment, those that do not fit among them."""
        return itertools.product(range(len(self.limits)), repeat=len(self.sizes))

    def held(self, assignment: Assignment) -> list[int]:
        """Bytes in each tier, without the ring."""
        held = [0] * len(self.limits)
        for size, tier in zip(self.sizes, assignment, strict=True):
            held[tier] += size
        return held

    def wanted(self, assignment: Assignment, buffers: int) -> int:
        """The ring that holds so many of the largest weights to fetch, and so any as many that follow each other."""
        fetched = (room for room, tier in zip(self.rooms, assignment, strict=True) if not self.resident[tier])
        return sum(nlargest(buffers, fetched))

    def ring(self, assignment: Assignment) -> int | None:
        """Bytes of the ring under an assignment; None if that does not fit."""
        held = self.held(assignment)
        if any(limit is not None and count > limit for count, limit in zip(held, self.limits, strict=True)):
            return None
        ring = self.wanted(assignment, self.buffers)
        if self.limits[0] is not None:
            ring = min(ring, (self.limits[0] - held[0]) // PAGE * PAGE)
        return ring if ring >= self.wanted(assignment, 1) else None

    def first_fit(self, order: Sequence[int], kept: int = 0) -> list[int] | None:
        """Each unit, in this order, in the fastest tier with room for it.

        Where that leaves a unit over, the largest come first; where that does too, any assignment that fits is taken
        if all can be tried. None if none is found. kept: so many of the largest come first, and the ring is sized for
        the others: a weight that is fetched needs a buffer, so that fetching the largest saves little memory.
        """
        largest_first = sorted(range(len(self.sizes)), key=lambda index: -self.sizes[index])
        ring = sum(nlargest(self.buffers, (self.rooms[index] for index in largest_first[kept:]))) if kept else None
        ahead = largest_first[:kept]
        order = [*ahead, *(index for index in order if index not in ahead)]
        found = self._in_order(order, ring=ring) or self._in_order(largest_first)
        if found is None and self.exhaustible:
            found = next((list(each) for each in self.all() if self.ring(each) is not None), None)
        return found

    def nearest(self, preferences: Sequence[Sequence[float]]) -> list[int] | None:
        """An assignment that fits, close to what is preferred.

        preferences: of each unit, for each tier; larger is better. Units choose in the order of their strongest
        preference, and get the best that is left. None as for `first_fit`.
        """
        surest = sorted(range(len(self.sizes)), key=lambda unit: -max(preferences[unit]))
        choices = [sorted(range(len(self.limits)), key=lambda tier: -row[tier]) for row in preferences]
        ring = self.wanted([choice[0] for choice in choices], self.buffers)
        return self._in_order(surest, choices, ring) or self.first_fit(surest)

    def _in_order(
        self, order: Sequence[int], choices: Sequence[Assignment] | None = None, ring: int | None = None
    ) -> list[int] | None:
        """The ring's place is kept free first: that of ``buffers`` weights, else of fewer. What it no longer needs once
        the resident ones are known is given to weights. choices: the tiers that each unit tries, in order; else fastest
        first. ring: a size to try before those that are sure to do.
        """
        everything = self._fill(order, 0, choices)
        if everything is not None and self.wanted(everything, 1) == 0:
            return everything
        largest = nlargest(self.buffers, self.rooms)
        rings = [(count, sum(largest[:count])) for count in range(len(largest), 0, -1)]
        rings += [(1, room) for room in sorted(set(self.rooms), reverse=True)]
        if ring is not None:
            rings.insert(0, (self.buffers, ring))
        for buffers, ring in rings:
            found = self._fill(order, ring, choices)
            if found is None or self.wanted(found, buffers) > ring:
                continue
            while (smaller := self.wanted(found, buffers)) < ring:
                better = self._fill(order, smaller, choices)
                if better is None or self.wanted(better, buffers) > smaller:
                    break
                found, ring = better, smaller
            return found
        return None

    def _fill(self, order: Sequence[int], ring: int, choices: Sequence[Assignment] | None) -> list[int] | None:
        room = list(self.limits)
        if room[0] is not None:
            room[0] -= ring
            if room[0] < 0:
                return None
        assignment = [-1] * len(self.sizes)
        for index in order:
            size = self.sizes[index]
            for tier in range(len(room)) if choices is None else choices[index]:
                left = room[tier]
                if left is None or size <= left:
                    assignment[index] = tier
                    room[tier] = None if left is None else left - size
                    break
            else:
                return None
        return assignment

    def refusal(self, units: Sequence[str], tiers: Sequence[str], assignment: Assignment | None) -> str:
        """Why nothing fits, or this assignment does not: the bytes that are missing, and where."""
        if assignment is None:
            # What would be left for the last tier, had it no limit.
            open_end = replace(self, limits=(*self.limits[:-1], None))
            assignment = open_end.first_fit(range(len(self.sizes)))
        if assignment is not None:
            for tier, count, limit in zip(tiers, self.held(assignment), self.limits, strict=True):
                if limit is not None and count > limit:
                    total = sum(self.sizes)
                    return (
                        f"{tier}: expected room for {count} of {total} bytes, got {limit}: {count - limit} are missing"
                    )
        fetched = (
            range(len(self.sizes))
            if assignment is None
            else [i for i, t in enumerate(assignment) if not self.resident[t]]
        )
        largest = max(fetched, key=lambda index: self.rooms[index])
        need = self.rooms[largest]
        room = (self.limits[0] or 0) - (0 if assignment is None else self.held(assignment)[0])
        return (
            f"{tiers[0]}: expected room for a buffer of {need} bytes, the largest weight to fetch ({units[largest]}), "
            f"got {room}: {need - room} are missing"
        )
