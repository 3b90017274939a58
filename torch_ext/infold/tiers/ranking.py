"""Scores by unit name: their ranks, what two of them agree on, and one made of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: A unit's name → its score; higher is more important.
Scores = Mapping[str, float]


def ranks(scores: Scores) -> dict[str, float]:
    """Ranks from 0 (the lowest score) to 1 (the highest), ties averaged; 0.5 where all scores are one.

    Ranks compare signals of different units, and Adam's second moment has an arbitrary scale: it squares the mean
    gradient of a batch. Raises ValueError for a score that is NaN.
    """
    _require_numbers("scores", scores)
    places = average_ranks(torch.tensor(list(scores.values()), dtype=torch.float64))
    top = len(scores) - 1
    normalised = (places / top if top > 0 else torch.full_like(places, 0.5)).tolist()
    return dict(zip(scores, normalised, strict=True))


def combine(
    variance: Scores | None = None,
    trajectory: Scores | None = None,
    adam: Scores | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> dict[str, float]:
    """α·rank(variance) + β·rank(trajectory) + γ·rank(adam), by unit (math.md §7); ranks are those of `ranks`.

    variance: PCA variance explained; trajectory: variance along a spline trajectory; adam: a second moment or any other
        sensitivity. A signal that is None contributes nothing.

    Raises ValueError without a signal, for signals of different units (it names them), and for a weight or a score that
    is not a number.
    """
    signals = {"variance": (alpha, variance), "trajectory": (beta, trajectory), "adam": (gamma, adam)}
    present = {name: (weight, scores) for name, (weight, scores) in signals.items() if scores is not None}
    if not present:
        raise ValueError("combine: expected one of variance, trajectory and adam, got none")
    require_same_units({name: scores for name, (_, scores) in present.items()})
    total: dict[str, float] = {}
    for name, (weight, scores) in present.items():
        if not math.isfinite(weight):
            raise ValueError(f"weight of {name}: expected a finite number, got {weight}")
        _require_numbers(name, scores)
        for unit, rank in ranks(scores).items():
            total[unit] = total.get(unit, 0.0) + weight * rank
    return total


def spearman(a: Scores, b: Scores) -> float:
    """Spearman's rank correlation, ties averaged; NaN for fewer than two units and where all scores of one are equal.

    Raises ValueError for scores of different units (it names them) and for a score that is NaN.
    """
    require_same_units({"a": a, "b": b})
    _require_numbers("a", a)
    _require_numbers("b", b)
    x = torch.tensor(list(a.values()), dtype=torch.float64)
    return rank_correlation(x, torch.tensor([b[unit] for unit in a], dtype=torch.float64))


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """`spearman` of two 1-D tensors of one length."""
    if len(x) < 2:
        return math.nan
    u, v = (average_ranks(values) for values in (x, y))
    u, v = u - u.mean(), v - v.mean()
    norm = float(u.norm() * v.norm())
    return float(u @ v) / norm if norm else math.nan


def average_ranks(values: Tensor) -> Tensor:
    """Ranks of a 1-D tensor from 0, ties averaged, in float64."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last: Tensor = counts.cumsum(0)
    middle: Tensor = last.double() - (counts + 1) / 2
    return middle[inverse]


def tiers_by_rank(scores: Scores, cuts: Sequence[float], sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """The tier of each unit, 0 for the most important, when tiers hold the shares ``cuts`` of all bytes.

    A unit is in the tier where the middle of its bytes lies, in the order of falling scores; equal scores keep their
    order. sizes: bytes by unit; None is one byte each. Raises ValueError for cuts that are negative or do not sum to 1.
    """
    if any(share < 0 for share in cuts) or not math.isclose(sum(cuts), 1, abs_tol=1e-9):
        raise ValueError(f"cuts: expected shares that sum to 1, got {tuple(cuts)}")
    _require_numbers("scores", scores)
    if sizes is not None:
        missing = [unit for unit in scores if unit not in sizes]
        if missing:
            raise ValueError(f"sizes: expected those of every unit, missing {', '.join(missing)}")
    bytes_of = {unit: 1 if sizes is None else sizes[unit] for unit in scores}
    total, end, limits = sum(bytes_of.values()), 0.0, []
    for share in cuts[:-1]:
        end += share
        limits.append(end * total)
    result, before = {}, 0
    for unit in sorted(scores, key=lambda unit: -scores[unit]):
        middle = before + bytes_of[unit] / 2
        result[unit] = sum(middle > limit for limit in limits)
        before += bytes_of[unit]
    return result


def require_same_units(signals: Mapping[str, Scores]) -> None:
    """Raises ValueError, which names the units, unless all score the same ones."""
    every = {unit: None for scores in signals.values() for unit in scores}
    for name, scores in signals.items():
        missing = [unit for unit in every if unit not in scores]
        if missing:
            raise ValueError(f"{name}: expected scores of the same units as the others, missing {', '.join(missing)}")


def _require_numbers(name: str, scores: Scores) -> None:
    bad = [unit for unit, score in scores.items() if math.isnan(score)]
    if bad:
        raise ValueError(f"{name}: expected numbers, got NaN for {', '.join(bad)}")
