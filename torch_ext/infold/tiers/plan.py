"""Which tier each unit of a model lies in, within a budget of bytes a tier."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

from torch import nn

from infold.report import format_bytes
from infold.tiers.packing import Assignment
from infold.tiers.problem import Problem, Uses, check_names, fingerprint, problem_of, some
from infold.tiers.schedule import NO_OVERHEAD, Access, Overhead
from infold.tiers.search import least_exposed
from infold.tiers.spec import TierSpec
from infold.tiers.units import pages

__all__ = ["Objective", "Placement", "Plan", "Uses", "fingerprint", "plan", "require_plan_of", "settle"]

Objective = Literal["traffic", "importance", "inverse", "size", "layer-order", "random", "fractions"]


class Placement(NamedTuple):
    """Where a unit lies, the bytes that are stored there, how they are coded, and what it was ranked by."""

    tier: str
    nbytes: int
    codec: str = "raw"
    score: float | None = None


@dataclass(frozen=True)
class Plan:
    """The tier of every unit.

    tiers: fastest first; weights in the first are computed on where they lie.
    placements: each unit's by its name, in the order of the model's modules.
    buffer_bytes: the ring of buffers that fetched weights come to, a part of the first tier's budget; each weight takes
        whole pages of it.
    fingerprint: that of the model (`fingerprint`).
    objective: what chose.
    budgets: the bytes that each tier may hold, None for no limit.

    Raises ValueError for a tier that there is none of, a budget that is exceeded, and a ring that does not hold the
    largest weight to fetch.
    """

    tiers: tuple[TierSpec, ...]
    placements: dict[str, Placement]
    buffer_bytes: int
    fingerprint: str
    objective: str
    budgets: dict[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [tier.name for tier in self.tiers]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tiers: expected one or more of different names, got {names}")
        if not self.tiers[0].resident:
            raise ValueError(f"tiers: expected the first to be resident, got {names[0]}")
        if self.buffer_bytes < 0:
            raise ValueError(f"buffer_bytes: expected zero or more, got {self.buffer_bytes}")
        for name in self.budgets:
            if name not in names:
                raise ValueError(f"budgets: expected one of the tiers {', '.join(names)}, got {name!r}")
        for name, placement in self.placements.items():
            if placement.tier not in names:
                raise ValueError(f"{name}: tier: expected one of {', '.join(names)}, got {placement.tier!r}")
            if placement.nbytes < 0:
                raise ValueError(f"{name}: nbytes: expected zero or more, got {placement.nbytes}")
            if not self.specs[placement.tier].resident and pages(placement.nbytes) > self.buffer_bytes:
                raise ValueError(
                    f"buffer_bytes: expected room for the {pages(placement.nbytes)} bytes of {name}, got "
                    f"{self.buffer_bytes}"
                )
        for name, held in self.bytes_by_tier().items():
            held += self.buffer_bytes if name == names[0] else 0
            limit = self.budgets.get(name)
            if limit is not None and held > limit:
                raise ValueError(f"{name}: expected at most its budget, {limit} bytes, got {held}")

    @property
    def specs(self) -> dict[str, TierSpec]:
        """Each tier by its name."""
        return {tier.name: tier for tier in self.tiers}

    def tier_of(self, unit: str) -> TierSpec:
        """Raises ValueError for a unit that the plan does not know."""
        if unit not in self.placements:
            raise ValueError(f"unit: expected one of the plan's, got {unit!r}")
        return self.specs[self.placements[unit].tier]

    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes of weights in each tier, without the ring."""
        held = dict.fromkeys((tier.name for tier in self.tiers), 0)
        for placement in self.placements.values():
            held[placement.tier] += placement.nbytes
        return held

    def accesses(self, uses: Uses | None = None) -> list[Access]:
        """One pass for `simulate`: the uses in their order, or each unit once with no computing."""
        order = [(name, 0.0) for name in self.placements] if uses is None else uses
        return [Access(name, self.tier_of(name).name, self.placements[name].nbytes, seconds) for name, seconds in order]

    def __str__(self) -> str:
        held = self.bytes_by_tier()
        counts = dict.fromkeys(held, 0)
        for placement in self.placements.values():
            counts[placement.tier] += 1
        width = max(len(name) for name in (*held, "total"))
        head = f"{'tier':<{width}} {'units':>6} {'weights':>10} {'budget':>10} {'GB/s':>8} {'setup us':>9}"
        lines = [head, "-" * len(head)]
        for tier in self.tiers:
            limit = self.budgets.get(tier.name)
            link = f"{'in place':>18}"
            if not tier.resident:
                link = f"{tier.bandwidth_gb_s:>8.2f} {tier.setup_us:>9.1f}"
            lines.append(
                f"{tier.name:<{width}} {counts[tier.name]:>6} {format_bytes(held[tier.name]):>10} "
                f"{'no limit' if limit is None else format_bytes(limit):>10} {link}"
            )
        lines += [
            "-" * len(head),
            f"{'total':<{width}} {len(self.placements):>6} {format_bytes(sum(held.values())):>10}",
        ]
        lines.append(f"chosen by {self.objective}; ring of {format_bytes(self.buffer_bytes)} in {self.tiers[0].name}")
        return "\n".join(lines)


def require_plan_of(label: str, plan: Plan, model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError, which begins with ``label``, for a plan of another model; ``names`` are those of its units."""
    names = set(names)
    reasons = []
    if unknown := sorted(plan.placements.keys() - names):
        reasons.append(f"the model has no units {some(unknown)}")
    if absent := sorted(names - plan.placements.keys()):
        reasons.append(f"the plan has no units {some(absent)}")
    if not reasons and plan.fingerprint != fingerprint(model):
        reasons.append("shapes or dtypes of parameters differ (was the model converted since?)")
    if reasons:
        raise ValueError(f"{label}: expected a plan of this model, got one of another: {'; '.join(reasons)}")


def plan(
    model: nn.Module,
    specs: Sequence[TierSpec],
    budgets: Mapping[str, int | None] | None = None,
    objective: Objective = "traffic",
    *,
    scores: Mapping[str, float] | None = None,
    nbytes: Mapping[str, int] | None = None,
    codecs: Mapping[str, str] | None = None,
    compute_seconds: Mapping[str, float] | Uses | None = None,
    overhead: Overhead = NO_OVERHEAD,
    buffers: int = 2,
    keep_largest: int = 0,
    fractions: Sequence[float] = (0.3, 0.5, 0.2),
    seed: int = 0,
) -> Plan:
    """Places every unit of a model.

    specs: the tiers, fastest first. The first holds the ring of buffers beside its weights. Several devices are several
        tiers that are ``resident``; they fill in their order.
    budgets: bytes by tier name; without one, or with None, a tier holds its ``capacity_bytes``.
    objective: ``"traffic"`` minimises the exposed time that `simulate` predicts for two passes, exactly where there are
        few assignments to try, else by local search. The others rank the units, and each goes to the fastest tier with
        room for it beside the ring: ``"importance"`` the highest score first, ``"inverse"`` the lowest (a control),
        ``"size"`` the smallest (of all ways to fill a byte budget, the fewest transfers; what sizes alone can tell),
        ``"layer-order"`` the order of modules, ``"random"`` by ``seed``. ``"fractions"`` cuts the ranking by score
        where the documents do, at shares of all *bytes*: a unit goes to the tier in whose share its middle lies.
    scores: by unit name, for ``"importance"``, ``"inverse"`` and ``"fractions"``; recorded in any plan.
    nbytes: stored bytes of units that are packed on their tier; others are stored as they are. codecs: their names.
    compute_seconds: of each unit, or of each use in order of execution (`measure_compute`); without it, nothing
        computes and all that counts is traffic. overhead: what uses and fetches cost beside waiting
        (`measure_overhead`), for ``"traffic"``: of use where units are many and small.
    buffers: the ring holds so many of the largest weights to fetch where the first tier's budget allows, at least one.
    keep_largest: so many of the largest weights come first in a ranking. One that is fetched needs a buffer, so that
        fetching a language model's embedding, say, frees next to nothing.

    Raises ValueError for a wrong argument and where the weights do not fit, with the bytes that are missing.
    """
    if objective not in get_args(Objective):
        raise ValueError(f"objective: expected one of {', '.join(get_args(Objective))}, got {objective!r}")
    if keep_largest < 0:
        raise ValueError(f"keep_largest: expected zero or more, got {keep_largest}")
    problem = problem_of(
        model, specs, budgets, nbytes=nbytes, compute_seconds=compute_seconds, buffers=buffers, overhead=overhead
    )
    if objective == "traffic":
        assignment = least_exposed(problem.packing, problem.tiers, problem.numbered_uses, seed, problem.overhead)
    else:
        ranked = _ranked(problem.sizes, objective, scores, seed)
        if objective == "fractions":
            assignment = _cut(problem.sizes, ranked, fractions, len(problem.tiers))
        else:
            place = {name: number for number, name in enumerate(problem.sizes)}
            assignment = problem.packing.first_fit([place[name] for name in ranked], keep_largest)
    return settle(problem, assignment, objective, scores=scores, codecs=codecs)


def settle(
    problem: Problem,
    assignment: Assignment | None,
    objective: str,
    *,
    scores: Mapping[str, float] | None = None,
    codecs: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of an assignment; raises ValueError as `plan` does."""
    check_names("scores", scores or (), problem.sizes)
    check_names("codecs", codecs or (), problem.sizes)
    ring = problem.ring(assignment)
    placements = {
        name: Placement(problem.tiers[tier].name, size, (codecs or {}).get(name, "raw"), (scores or {}).get(name))
        for (name, size), tier in zip(problem.sizes.items(), assignment or (), strict=True)
    }
    return Plan(problem.tiers, placements, ring, problem.fingerprint, objective, problem.limits)


def _ranked(sizes: Mapping[str, int], objective: Objective, scores: Mapping[str, float] | None, seed: int) -> list[str]:
    names = list(sizes)
    if objective == "size":
        return sorted(names, key=lambda name: sizes[name])
    if objective == "random":
        return random.Random(seed).sample(names, len(names))
    if objective == "layer-order":
        return names
    if scores is None:
        raise ValueError(f"scores: expected a number for each unit for objective {objective!r}, got none")
    check_names("scores", scores, names, missing=True)
    if wrong := [name for name in names if scores[name] != scores[name]]:
        raise ValueError(f"scores: expected numbers, got NaN for {wrong[0]!r}")
    return sorted(names, key=lambda name: scores[name] if objective == "inverse" else -scores[name])


def _cut(sizes: Mapping[str, int], order: list[str], fractions: Sequence[float], tiers: int) -> list[int]:
    """The tier in whose share of all bytes the middle of each unit lies."""
    if len(fractions) != tiers or not all(0 <= share <= 1 for share in fractions) or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions: expected {tiers} shares that make 1, one a tier, got {tuple(fractions)}")
    total, before = sum(sizes.values()), 0
    cuts = [share * total for share in accumulate(fractions[:-1])]
    tier_of = {}
    for name in order:
        tier_of[name] = bisect_right(cuts, before + sizes[name] / 2)
        before += sizes[name]
    return [tier_of[name] for name in sizes]
