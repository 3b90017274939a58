"""Ranks, combinations and agreement of rankings, against SciPy and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from infold.tiers import agreement, combine, ranks, spearman, tiers_by_rank

SCORES = [
    {"a": 3.0, "b": 1.0, "c": 2.0, "d": 9.0},
    {"a": 1.0, "b": 1.0, "c": 1.0, "d": 4.0},
    {"d": -2.0, "c": math.inf, "b": 0.0, "a": 0.0},
]


def named(values: np.ndarray) -> dict[str, float]:
    return {f"unit {i}": float(value) for i, value in enumerate(values)}


@pytest.mark.parametrize("levels", [3, 40, 10**9])
def test_ranks_and_spearman_are_scipys(levels) -> None:
    random = np.random.default_rng(0)
    for _ in range(10):
        x, y = random.integers(levels, size=(2, 30))
        expected = (scipy.stats.rankdata(x) - 1) / 29
        np.testing.assert_allclose(list(ranks(named(x)).values()), expected, rtol=1e-12)
        assert spearman(named(x), named(y)) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    for a in SCORES:
        for b in SCORES:
            keys = list(a)
            expected = scipy.stats.spearmanr([a[k] for k in keys], [b[k] for k in keys]).statistic
            assert spearman(a, b) == pytest.approx(expected, abs=1e-12)


def test_spearman_of_what_has_no_order() -> None:
    assert math.isnan(spearman({"a": 1.0}, {"a": 2.0}))
    assert math.isnan(spearman({"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 3.0}))
    assert ranks({"a": 5.0}) == {"a": 0.5}
    with pytest.raises(ValueError, match="b: expected scores of the same units as the others, missing c"):
        spearman({"a": 1.0, "c": 1.0}, {"a": 2.0})
    with pytest.raises(ValueError, match="got NaN for c"):
        ranks({"a": 1.0, "c": math.nan})


def test_combine_is_a_weighted_sum_of_ranks() -> None:
    variance, trajectory, adam = SCORES
    combined = combine(variance, trajectory, adam, alpha=2, beta=0.5, gamma=-1)
    for i, name in enumerate("abcd"):
        parts = [scipy.stats.rankdata([s[k] for k in "abcd"])[i] - 1 for s in SCORES]
        assert combined[name] == pytest.approx((2 * parts[0] + 0.5 * parts[1] - parts[2]) / 3)
    assert combine(adam=adam) == ranks(adam)
    assert combine(trajectory=trajectory, beta=3) == {k: 3 * v for k, v in ranks(trajectory).items()}
    with pytest.raises(ValueError, match="expected one of variance, trajectory and adam"):
        combine()
    with pytest.raises(ValueError, match="trajectory: expected scores of the same units as the others, missing b, d"):
        combine(variance, {"a": 1.0, "c": 1.0})
    with pytest.raises(ValueError, match="weight of adam: expected a finite number"):
        combine(adam=adam, gamma=math.nan)


def test_tiers_hold_their_shares_of_bytes() -> None:
    scores = {"a": 1.0, "b": 4.0, "c": 3.0, "d": 2.0}
    assert tiers_by_rank(scores, (0.25, 0.5, 0.25)) == {"b": 0, "c": 1, "d": 1, "a": 2}
    # b is 60 of 100 bytes: its middle lies at 30, c's at 65, d's at 75, a's at 90.
    sizes = {"a": 20, "b": 60, "c": 10, "d": 10}
    assert tiers_by_rank(scores, (0.3, 0.5, 0.2), sizes) == {"b": 0, "c": 1, "d": 1, "a": 2}
    assert tiers_by_rank(scores, (0.29, 0.45, 0.26), sizes) == {"b": 1, "c": 1, "d": 2, "a": 2}
    with pytest.raises(ValueError, match=r"cuts: expected shares that sum to 1, got \(0.3, 0.5\)"):
        tiers_by_rank(scores, (0.3, 0.5))
    with pytest.raises(ValueError, match="sizes: expected those of every unit, missing c, d"):
        tiers_by_rank(scores, (0.5, 0.5), {"a": 1, "b": 2})


def test_agreement_counts_bytes_and_decisions(tmp_path: Path) -> None:
    # Tiers of a: {p, q} {r, s, t} {}; b swaps q with r; c turns everything round.
    sizes = {"p": 10, "q": 20, "r": 20, "s": 30, "t": 20}
    a = {"p": 5.0, "q": 4.0, "r": 3.0, "s": 2.0, "t": 1.0}
    b = {**a, "q": 3.0, "r": 4.0}
    c = {name: -score for name, score in a.items()}
    report = agreement({"a": a, "b": b, "c": c}, (0.3, 0.5, 0.2), sizes)
    pairs = {(pair.first, pair.second): pair for pair in report.pairs}
    ab = pairs["a", "b"]
    assert ab.spearman == pytest.approx(0.9)
    # Above 30%: a has p and q (30 bytes), b p and r (30): 10 in common. Above 80% both have all but t.
    assert ab.overlaps == pytest.approx((10 / 30, 1.0))
    assert ab.same_decision == pytest.approx(3 / 5)
    assert ab.same_bytes == pytest.approx(60 / 100)
    ac = pairs["a", "c"]
    # From behind: t (20 bytes), then s (middle 35), r (60), q (80, on the cut), p (95).
    assert ac.spearman == pytest.approx(-1)
    assert ac.overlaps == pytest.approx((0, 70 / 90))
    assert ac.same_decision == pytest.approx(2 / 5)
    assert report.by_chance == pytest.approx(0.38)
    assert all(name in str(report) for name in ("a ~ b", "b ~ c", "0.900", "top 80%"))
    report.plot(tmp_path / "agreement.png")
    assert (tmp_path / "agreement.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads(report.to_json(tmp_path / "agreement.json"))
    assert stored["pairs"][0]["spearman"] == pytest.approx(0.9)
    assert stored == json.loads((tmp_path / "agreement.json").read_text())


def test_agreement_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="expected at least two rankings, got 1"):
        agreement({"a": {"x": 1.0}})
    with pytest.raises(ValueError, match="b: expected scores of the same units as the others, missing x"):
        agreement({"a": {"x": 1.0}, "b": {}})
    with pytest.raises(ValueError, match="expected those of one unit"):
        agreement({"a": {}, "b": {}})
