"""Reverse water-filling: the least loss under one budget, one option for each of many layers.

for each layer, keep the lower convex hull of (bytes, loss)
find the multiplier λ at which the layers' minima of loss + λ·bytes just fit
spend what is left on the changes of the greatest gain a byte that still fit
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple


class Option(NamedTuple):
    """One precision of one layer: what it costs and what it loses, in any unit."""

    nbytes: int
    loss: float


def water_fill(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Which option each layer takes so that Σ loss is small and Σ bytes is at most ``budget``.

    It is the least there is at the bytes where the multiplier lands; what then is left over is spent greedily, which
    need not be the best. Raises ValueError for a budget below the sum of the smallest options, a layer without options,
    and a loss that is not finite.
    """
    if not all(math.isfinite(option.loss) for own in options for option in own):
        raise ValueError("options: expected finite losses, got others")
    hulls = [_hull(own) for own in options]
    chosen = [hull[0] for hull in hulls]
    smallest = sum(own[index].nbytes for own, index in zip(options, chosen, strict=True))
    if smallest > budget:
        raise ValueError(f"budget: expected at least {smallest} bytes, the smallest that the layers have, got {budget}")
    # Steps up the hulls, steepest first: those steeper than the multiplier are taken, so a prefix is a multiplier.
    steps = sorted(step for layer, hull in enumerate(hulls) for step in _steps(layer, options[layer], hull))
    fitting = bisect_right(list(accumulate(step.nbytes for step in steps)), budget - smallest)
    for step in steps[:fitting]:
        chosen[step.layer] = step.option
    _fill(options, chosen, budget)
    return chosen


class _Step(NamedTuple):
    """From one point of a layer's hull to the next; in the order in which they are taken."""

    slope: float
    layer: int
    place: int
    option: int
    nbytes: int


def _steps(layer: int, own: Sequence[Option], hull: Sequence[int]) -> Iterator[_Step]:
    steepest = -math.inf
    for place, (low, high) in enumerate(pairwise(hull)):
        nbytes = own[high].nbytes - own[low].nbytes
        # Rounding must not put a step before the one that it stands on.
        steepest = max(steepest, (own[high].loss - own[low].loss) / nbytes)
        yield _Step(steepest, layer, place, high, nbytes)


def _fill(options: Sequence[Sequence[Option]], chosen: list[int], budget: int) -> None:
    """Spends what is left: of the changes that fit, the one of the greatest gain a byte, until none gains."""
    left = budget - sum(own[index].nbytes for own, index in zip(options, chosen, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for layer, own in enumerate(options):
            now = own[chosen[layer]]
            for index, option in enumerate(own):
                cost, gain = option.nbytes - now.nbytes, now.loss - option.loss
                if gain > 0 and cost <= left:
                    rate = gain / cost if cost > 0 else math.inf
                    best = max(best, (rate, layer, index)) if best else (rate, layer, index)
        if best is None:
            return
        _, layer, index = best
        left -= options[layer][index].nbytes - options[layer][chosen[layer]].nbytes
        chosen[layer] = index


def _hull(own: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull of (bytes, loss), by rising bytes and falling loss."""
    if not own:
        raise ValueError("options: expected one at least for each layer, got none")
    hull: list[int] = []
    for index in sorted(range(len(own)), key=lambda index: own[index]):
        if hull and own[index].loss >= own[hull[-1]].loss:
            continue
        while len(hull) > 1 and _is_above(own[hull[-2]], own[hull[-1]], own[index]):
            hull.pop()
        hull.append(index)
    return hull


def _is_above(a: Option, b: Option, c: Option) -> bool:
    """Whether b lies on the line from a to c or above it."""
    return (b.loss - a.loss) * (c.nbytes - a.nbytes) >= (c.loss - a.loss) * (b.nbytes - a.nbytes)
