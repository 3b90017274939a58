"""Means over seeds with their intervals, and what they say of a limit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from scipy import stats


class Estimate(NamedTuple):
    """A mean over seeds, and half of its 95% interval by Student's t: not a number for a single seed."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        # Adding zero takes the sign from what is rounded to zero.
        return f"{round(self.mean, 2) + 0.0:.2f}" + (f" ± {self.half:.2f}" if self.count > 1 else "")

    def within(self, low: float = -math.inf, high: float = math.inf) -> str:
        """Met where the whole interval lies from ``low`` to ``high``, not met where all of it lies outside."""
        half = 0.0 if self.count == 1 else self.half
        if low <= self.mean - half and self.mean + half <= high:
            verdict = "met"
        elif self.mean + half < low or self.mean - half > high:
            verdict = "**not met**"
        else:
            verdict = f"undecided (the mean is {'inside' if low <= self.mean <= high else 'outside'})"
        return verdict if self.count > 1 else f"{verdict} (one seed)"


def estimate(values: Iterable[float]) -> Estimate:
    """Of one value a seed."""
    own = list(values)
    half = math.nan
    if len(own) > 1:
        half = float(stats.t.ppf(0.975, len(own) - 1)) * statistics.stdev(own) / len(own) ** 0.5
    return Estimate(statistics.mean(own), half, len(own))


def verdict(is_met: bool) -> str:
    """Of what has no interval."""
    return "met" if is_met else "**not met**"
