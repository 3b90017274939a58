"""What a plan is asked for: units and their bytes, tiers and their budgets, the order of use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from infold.tiers.packing import Assignment, Packing
from infold.tiers.schedule import NO_OVERHEAD, Overhead, check_overhead
from infold.tiers.spec import TierSpec
from infold.tiers.units import pages, units

#: How a pass uses the units: each use's unit and the seconds that its layer computes, in the order of execution.
Uses = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Problem:
    """A model and the memories to place it in.

    sizes: stored bytes of each unit. tiers: fastest first, the first resident. limits: of each tier, None for no limit.
    uses: of one pass. fingerprint: the model's. overhead: what uses and fetches cost beside waiting.
    """

    sizes: dict[str, int]
    tiers: tuple[TierSpec, ...]
    limits: dict[str, int | None]
    uses: Uses
    packing: Packing
    fingerprint: str
    overhead: Overhead

    @property
    def numbered_uses(self) -> list[tuple[int, float]]:
        """The uses with each unit's place among the units."""
        place = {name: number for number, name in enumerate(self.sizes)}
        return [(place[name], seconds) for name, seconds in self.uses]

    def ring(self, assignment: Assignment | None) -> int:
        """Bytes of the ring.

        Raises ValueError, with the bytes that are missing, for an assignment that does not fit, and for None: that none
        was found.
        """
        ring = None if assignment is None else self.packing.ring(assignment)
        if ring is None:
            raise ValueError(self.packing.refusal(list(self.sizes), [tier.name for tier in self.tiers], assignment))
        return ring


def problem_of(
    model: nn.Module,
    specs: Sequence[TierSpec],
    budgets: Mapping[str, int | None] | None = None,
    *,
    nbytes: Mapping[str, int] | None = None,
    compute_seconds: Mapping[str, float] | Uses | None = None,
    buffers: int = 2,
    overhead: Overhead = NO_OVERHEAD,
) -> Problem:
    """Checks the arguments of `plan` that say what is to be placed, and where."""
    found = units(model)
    sizes = {unit.name: unit.nbytes for unit in found}
    if buffers < 1:
        raise ValueError(f"buffers: expected one or more, got {buffers}")
    if not specs:
        raise ValueError("specs: expected one tier or more, got none")
    check_overhead(overhead)
    check_names("nbytes", nbytes or (), sizes)
    for name, count in (nbytes or {}).items():
        if count < 0:
            raise ValueError(f"nbytes: {name}: expected zero or more bytes, got {count}")
    sizes.update(nbytes or {})
    rooms = [pages(sizes[unit.name]) if unit.name in (nbytes or {}) else unit.room for unit in found]
    tiers = (replace(specs[0], resident=True), *specs[1:])
    limits = _limits(tiers, budgets or {})
    if len(limits) < len(tiers):
        raise ValueError(f"specs: expected tiers of different names, got {', '.join(tier.name for tier in tiers)}")
    resident = tuple(tier.resident for tier in tiers)
    packing = Packing(tuple(sizes.values()), tuple(rooms), tuple(limits.values()), resident, buffers)
    return Problem(sizes, tiers, limits, _uses(compute_seconds, sizes), packing, fingerprint(model), overhead)


def fingerprint(model: nn.Module) -> str:
    """What tells models apart that plans are made for: names of units and parameters, shapes, dtypes; not values."""
    digest = hashlib.sha256()
    for unit in units(model):
        for name, parameter in unit.parameters.items():
            shape = "x".join(map(str, parameter.shape))
            digest.update(f"{unit.name}\0{name}\0{shape}\0{parameter.dtype}\n".encode())
    return digest.hexdigest()


def check_names(label: str, given: Iterable[str], known: Iterable[str], missing: bool = False) -> None:
    """Raises ValueError where a name is of no unit or, if asked, a unit is not named."""
    given, known = list(given), list(known)
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{label}: expected names of the model's units, got {some(unknown)}")
    if missing and (absent := sorted(set(known) - set(given))):
        raise ValueError(f"{label}: expected all of the model's units, {some(absent)} missing")


def some(names: list[str]) -> str:
    """The first of them, quoted, and how many more there are."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _limits(tiers: Sequence[TierSpec], budgets: Mapping[str, int | None]) -> dict[str, int | None]:
    names = [tier.name for tier in tiers]
    for name, limit in budgets.items():
        if name not in names:
            raise ValueError(f"budgets: expected one of the tiers {', '.join(names)}, got {name!r}")
        if limit is not None and not isinstance(limit, int):
            raise TypeError(f"budgets: {name}: expected whole bytes or None, got {limit!r}")
        if limit is not None and limit < 0:
            raise ValueError(f"budgets: {name}: expected zero or more bytes, got {limit}")
    given = {name: limit for name, limit in budgets.items() if limit is not None}
    return {tier.name: given.get(tier.name, tier.capacity_bytes) for tier in tiers}


def _uses(compute_seconds: Mapping[str, float] | Uses | None, sizes: Mapping[str, int]) -> Uses:
    if compute_seconds is None:
        return [(name, 0.0) for name in sizes]
    if isinstance(compute_seconds, Mapping):
        compute_seconds = [(name, compute_seconds.get(name, 0.0)) for name in {**sizes, **compute_seconds}]
    check_names("compute_seconds", (name for name, _ in compute_seconds), sizes)
    for name, seconds in compute_seconds:
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"compute_seconds: {name}: expected zero or more, got {seconds}")
    return compute_seconds
