"""Moves units between tiers during training, as their importance or use changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from infold.tiers.attach import Handle
from infold.tiers.packing import Assignment, Packing
from infold.tiers.problem import Uses, check_names
from infold.tiers.search import Exposure, least_exposed
from infold.tiers.units import pages

Scores = Mapping[str, float]
#: Chooses the tier of every unit from the scores and the tiers that they are in.
Policy = Callable[[Scores, Mapping[str, str]], Mapping[str, str]]


class Move(NamedTuple):
    """A unit that changed its tier; ``nbytes`` are those of its weights."""

    unit: str
    source: str
    target: str
    nbytes: int


@dataclass(frozen=True)
class Replan:
    """What a re-plan did: the step after which it was, its moves in order, and the units that it wanted to bring to a
    faster tier and did not, for lack of room or of ``max_bytes``.
    """

    step: int
    moves: tuple[Move, ...]
    deferred: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(move.nbytes for move in self.moves)


class DynamicTiering:
    """Re-plans a handle's tiers every so many training steps, within the budgets and the ring of its plan.

        tiering = DynamicTiering(handle, ema.scores, every=50, max_bytes=64 << 20)
        for batch in data:
            ...
            handle.step(optimizer)
            tiering.step()

    scores: called at a re-plan; a number by unit, higher for what is to be in a faster tier. Units that it leaves out
        have the lowest of them.
    every: steps from one re-plan to the next.
    max_bytes: of weights that one moves at most, the highest scores first. What an optimizer keeps for a unit goes with
        it and is not counted.
    hysteresis: a unit takes another's place only if its score is higher by this share of the other's; for
        ``"traffic"``, units move only if that saves this share of the predicted time.
    objective: ``"importance"`` fills the tiers by score, fastest first. ``"traffic"`` takes the assignment with the
        least exposed time (`infold.tiers.plan`) under ``uses``. Or a `Policy`, without hysteresis.
    uses: called at a re-plan by ``"traffic"``: each use's unit and the seconds that it computes, in order, as
        `measure_compute` gives them. Without ``scores``, units are ranked by the time that their fetches take.

    Results do not depend on where weights lie. While a unit moves it is in plain memory, beside the budgets.

    Raises ValueError for a wrong argument and a handle of `attach` with ``materialize``; at a re-plan, for scores of no
    unit or that are not finite, and for a policy's tiers that exceed the budgets.
    """

    def __init__(
        self,
        handle: Handle,
        scores: Callable[[], Scores] | None = None,
        *,
        every: int,
        max_bytes: int,
        hysteresis: float = 0.1,
        objective: Literal["importance", "traffic"] | Policy = "importance",
        uses: Callable[[], Uses] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every: expected one step or more, got {every}")
        if max_bytes < 0:
            raise ValueError(f"max_bytes: expected zero or more, got {max_bytes}")
        if not (hysteresis >= 0 and math.isfinite(hysteresis)):
            raise ValueError(f"hysteresis: expected zero or more, got {hysteresis}")
        if not callable(objective) and objective not in ("importance", "traffic"):
            raise ValueError(f"objective: expected importance, traffic or a function, got {objective!r}")
        if objective == "traffic" and uses is None:
            raise ValueError("uses: expected a function for objective 'traffic', got None")
        if objective != "traffic" and scores is None:
            raise ValueError("scores: expected a function, got None")
        if handle.materialize:
            # Only packing tells the room that a weight needs in the ring, and the bytes that it takes in its tier.
            raise ValueError("handle: expected one of attach without materialize, got one with it")
        self._handle, self._scores, self._uses = handle, scores, uses
        self._every, self._max_bytes, self._hysteresis, self._objective = every, max_bytes, hysteresis, objective
        plan = handle.plan
        self._tiers = plan.tiers
        self._names = list(plan.placements)
        self._sizes = {name: placement.nbytes for name, placement in plan.placements.items()}
        self._packing = _packing(handle)
        self._steps = 0
        #: Every re-plan so far.
        self.records: list[Replan] = []

    @property
    def moved_bytes(self) -> int:
        return sum(record.nbytes for record in self.records)

    def step(self) -> Replan | None:
        """Called once a training step, outside of forward and backward; what it did, if it re-planned."""
        self._steps += 1
        return self.replan() if self._steps % self._every == 0 else None

    def replan(self) -> Replan:
        """Re-plans now."""
        scores = dict(self._scores()) if self._scores else {}
        if self._scores:
            check_names("scores", scores, self._names)
            for name, score in scores.items():
                if not math.isfinite(score):
                    raise ValueError(f"scores: {name}: expected a finite number, got {score}")
            scores = {**dict.fromkeys(self._names, min(scores.values(), default=0.0)), **scores}
        index = {tier.name: number for number, tier in enumerate(self._tiers)}
        current = [index[self._handle.tiers()[name]] for name in self._names]
        target: Assignment | None
        if callable(self._objective):
            target = self._asked(self._objective, scores)
        elif self._objective == "traffic":
            assert self._uses is not None
            uses = self._uses()
            check_names("uses", (name for name, _ in uses), self._names)
            target = self._quickest(current, uses)
            scores = scores or self._traffic(uses)
        else:
            target = self._by_score(current, [scores[name] for name in self._names])
        moves, deferred = self._order(current, target or current, [scores[name] for name in self._names])
        done = []
        for unit, tier in moves:
            name, source = self._names[unit], self._handle.tiers()[self._names[unit]]
            self._handle.move(name, self._tiers[tier].name)
            done.append(Move(name, source, self._tiers[tier].name, self._sizes[name]))
        record = Replan(self._steps, tuple(done), tuple(self._names[unit] for unit in deferred))
        self.records.append(record)
        return record

    # --- where units should be ---

    def _asked(self, policy: Policy, scores: Scores) -> list[int]:
        wanted = policy(scores, self._handle.tiers())
        check_names("objective", wanted, self._names, missing=True)
        names = [tier.name for tier in self._tiers]
        if unknown := sorted(set(wanted.values()) - set(names)):
            raise ValueError(f"objective: expected tiers of {', '.join(names)}, got {', '.join(map(repr, unknown))}")
        target = [names.index(wanted[name]) for name in self._names]
        if self._packing.ring(target) is None:
            raise ValueError("objective: expected tiers within their budgets, and what is fetched within the ring")
        return target

    def _quickest(self, current: list[int], uses: Uses) -> list[int] | None:
        order = [(self._names.index(name), seconds) for name, seconds in uses]
        target = least_exposed(self._packing, self._tiers, order)
        exposure = Exposure(self._packing, self._tiers, order)
        before, after = exposure.cost(current), exposure.cost(target) if target else None
        if before is None or after is None or before[0] - after[0] <= self._hysteresis * before[0]:
            return None
        return target

    def _traffic(self, uses: Uses) -> dict[str, float]:
        """The seconds that each unit's fetches take from the slowest tier."""
        slowest = max(self._tiers, key=lambda tier: tier.transfer_seconds(1_000_000))
        seconds = dict.fromkeys(self._names, 0.0)
        for name, _ in uses:
            seconds[name] += slowest.transfer_seconds(self._sizes[name])
        return seconds

    def _by_score(self, current: list[int], scores: list[float]) -> list[int] | None:
        """Fills the tiers, fastest first, by score; who is in one or in a faster one is ahead by the hysteresis."""
        packing = self._packing
        target = [-1] * len(current)
        for tier, limit in enumerate(packing.limits):

            def rank(unit: int, tier: int = tier) -> tuple[bool, float]:
                ahead = self._hysteresis * abs(scores[unit]) if current[unit] <= tier else 0.0
                # What the ring cannot hold has to be where nothing is fetched.
                return packing.fetchable(unit), -scores[unit] - ahead

            room = math.inf if limit is None else limit
            for unit in sorted((unit for unit, chosen in enumerate(target) if chosen < 0), key=rank):
                if packing.sizes[unit] <= room and (packing.resident[tier] or packing.fetchable(unit)):
                    target[unit] = tier
                    room -= packing.sizes[unit]
        return target if packing.ring(target) is not None else None

    # --- how they get there ---

    def _order(
        self, current: list[int], target: Assignment, scores: list[float]
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """Moves, in such an order that no budget is exceeded at any time, of ``max_bytes`` at most; and what is left.

        Each promotion, the highest score first, with the demotions that make room for it.
        """
        where, moves, left, deferred = list(current), [], self._max_bytes, []
        promotions = [unit for unit in range(len(where)) if target[unit] < where[unit]]
        for unit in sorted(promotions, key=lambda unit: (-scores[unit], unit)):
            trial = list(where)
            group = self._bring(unit, trial, target, scores, set())
            cost = sum(self._packing.sizes[moved] for moved, _ in group or ())
            if group is None or cost > left:
                deferred.append(unit)
                continue
            where, left = trial, left - cost
            moves += group
        return moves, deferred

    def _bring(
        self, unit: int, where: list[int], target: Assignment, scores: list[float], busy: set[int]
    ) -> list[tuple[int, int]] | None:
        """The moves that end with the unit in its target tier, ``where`` kept up; None where there is no room."""
        busy = busy | {unit}
        tier = target[unit]
        group: list[tuple[int, int]] = []
        leaving = [u for u in range(len(where)) if where[u] == tier and target[u] > tier and u not in busy]
        leaving.sort(key=lambda u: (scores[u], u))
        waiting = []
        while not self._has_room(where, tier, unit):
            if not leaving:
                return None
            out, trial = leaving.pop(0), list(where)
            moved = self._bring(out, trial, target, scores, busy)
            if moved is not None:
                group += moved
                where[:] = trial
                continue
            # Its place is taken by who comes for this one: it waits in a slower tier.
            slower = (
                t for t in range(tier + 1, len(self._tiers)) if t != target[out] and self._has_room(where, t, out)
            )
            if (stopover := next(slower, None)) is not None:
                where[out] = stopover
                group.append((out, stopover))
                waiting.append(out)
        where[unit] = tier
        group.append((unit, tier))
        for out in waiting:
            if self._has_room(where, target[out], out):
                where[out] = target[out]
                group.append((out, target[out]))
        return group

    def _has_room(self, where: list[int], tier: int, unit: int) -> bool:
        limit = self._packing.limits[tier]
        if not (self._packing.resident[tier] or self._packing.fetchable(unit)):
            return False
        return limit is None or self._packing.held(where)[tier] + self._packing.sizes[unit] <= limit


@dataclass(frozen=True)
class _FixedRing(Packing):
    """Budgets with the ring that is there already."""

    ring_bytes: int = 0

    def fetchable(self, unit: int) -> bool:
        return self.rooms[unit] <= self.ring_bytes

    def wanted(self, assignment: Assignment, buffers: int) -> int:
        return 0  # its place is not in the limits

    def ring(self, assignment: Assignment) -> int | None:
        held = self.held(assignment)
        if any(limit is not None and held > limit for held, limit in zip(held, self.limits, strict=True)):
            return None
        away = (unit for unit, tier in enumerate(assignment) if not self.resident[tier])
        return self.ring_bytes if all(self.fetchable(unit) for unit in away) else None


def _packing(handle: Handle) -> _FixedRing:
    plan = handle.plan
    limits = [plan.budgets.get(tier.name, tier.capacity_bytes) for tier in plan.tiers]
    limits[0] = None if limits[0] is None else limits[0] - plan.buffer_bytes
    # In emulated mode the ring holds stored bytes.
    stored, real = plan.placements, handle.mode == "real"
    rooms = {name: unit.room if real else pages(stored[name].nbytes) for name, unit in handle._units.items()}
    return _FixedRing(
        tuple(placement.nbytes for placement in plan.placements.values()),
        tuple(rooms[name] for name in plan.placements),
        tuple(limits),
        tuple(tier.resident for tier in plan.tiers),
        1,
        plan.buffer_bytes,
    )
