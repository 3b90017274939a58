"""What report and figures read from the results: a value for each seed."""

from __future__ import annotations

import statistics
from typing import Any

from estimates import Estimate, estimate
from results import Results, Row


def by_seed(rows: list[Row], field: str) -> dict[int, float]:
    """The mean of a field for each seed (random orders have several draws)."""
    values: dict[int, list[float]] = {}
    for row in rows:
        values.setdefault(row["seed"], []).append(row[field])
    return {seed: statistics.mean(own) for seed, own in values.items()}


def of(results: Results, stage: str, field: str, scale: float = 1.0, **wanted: Any) -> Estimate:
    """A field's estimate over seeds."""
    return estimate(scale * value for value in by_seed(results.rows(stage, **wanted), field).values())


def difference(a: list[Row], b: list[Row], field: str = "accuracy") -> Estimate:
    """A − b in hundredths, paired by seed."""
    x, y = by_seed(a, field), by_seed(b, field)
    return estimate(100 * (x[seed] - y[seed]) for seed in x if seed in y)


def names(rows: list[Row], field: str) -> list[Any]:
    """Different values of a field, as they come first."""
    return list(dict.fromkeys(row[field] for row in rows if field in row))
