"""What rankings of a model's units agree on: correlation, and the tiers that they would choose."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from infold.tiers.ranking import Scores, require_same_units, spearman, tiers_by_rank

#: The tiering document's shares of fast, middle and slow memory, taken of bytes.
CUTS = (0.3, 0.5, 0.2)


@dataclass(frozen=True)
class PairAgreement:
    """Two rankings side by side.

    spearman: their rank correlation.
    overlaps: for each cut, the bytes that both put above it over those that the one that puts more there does; 1 where
        neither puts any. Rankings that know nothing of each other share about as much as the tiers above the cut hold.
    same_decision: the share of units that both put in the same tier; same_bytes: the share of bytes.
    """

    first: str
    second: str
    spearman: float
    overlaps: tuple[float, ...]
    same_decision: float
    same_bytes: float


@dataclass(frozen=True)
class AgreementReport:
    """Every pair of rankings. Prints as a table."""

    names: tuple[str, ...]
    units: int
    cuts: tuple[float, ...]
    pairs: tuple[PairAgreement, ...]

    @property
    def by_chance(self) -> float:
        """The share of bytes that unrelated rankings put in the same tier: Σ cuts²."""
        return sum(share * share for share in self.cuts)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON, also written to ``path`` if one is given."""
        report = {**asdict(self), "by_chance": self.by_chance}
        for pair in report["pairs"]:
            # JSON has no NaN; null says that there is no such number.
            pair["spearman"] = None if math.isnan(pair["spearman"]) else pair["spearman"]
        text = json.dumps(report, indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> None:
        """Draws Spearman's correlation and the share of same decisions of every pair, as a PNG (or what ``path`` ends
        in). Raises ImportError without matplotlib.
        """
        from infold.spectral.plot import figure

        side = 1.5 + 0.8 * len(self.names)
        drawing = figure(2 * side + 1, side + 0.5)
        panels = {"Spearman": ("spearman", -1.0), "same tier, share of units": ("same_decision", 0.0)}
        for axes, (title, (field, lowest)) in zip(drawing.subplots(1, 2), panels.items(), strict=True):
            grid = [[1.0] * len(self.names) for _ in self.names]
            for pair in self.pairs:
                i, j = self.names.index(pair.first), self.names.index(pair.second)
                grid[i][j] = grid[j][i] = getattr(pair, field)
            axes.imshow(grid, vmin=lowest, vmax=1.0, cmap="RdBu" if lowest else "Blues")
            for i, row in enumerate(grid):
                for j, value in enumerate(row):
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
            axes.set_xticks(range(len(self.names)), self.names, rotation=45, ha="right")
            axes.set_yticks(range(len(self.names)), self.names)
            axes.set_title(title)
        drawing.suptitle(
            f"{self.units} units, tiers of {' / '.join(f'{100 * share:g}' for share in self.cuts)}% of bytes"
        )
        drawing.savefig(path, dpi=120)

    def __str__(self) -> str:
        titles = [f"{pair.first} ~ {pair.second}" for pair in self.pairs]
        width = max([len(title) for title in titles] + [len("rankings")])
        ends = [100 * sum(self.cuts[: index + 1]) for index in range(len(self.cuts) - 1)]
        tops = " ".join(f"{f'top {end:g}%':>8}" for end in ends)
        head = f"{'rankings':<{width}} {'Spearman':>9} {tops} {'same tier':>10} {'of bytes':>9}"
        lines = [head, "-" * len(head)]
        for title, pair in zip(titles, self.pairs, strict=True):
            overlaps = " ".join(f"{overlap:>8.2f}" for overlap in pair.overlaps)
            decisions = f"{pair.same_decision:>10.2f} {pair.same_bytes:>9.2f}"
            lines.append(f"{title:<{width}} {pair.spearman:>9.3f} {overlaps} {decisions}")
        lines.append(f"{self.units} units; unrelated rankings would agree on about {self.by_chance:.2f} of the bytes")
        return "\n".join(lines)


def agreement(
    scores: Mapping[str, Scores], cuts: Sequence[float] = CUTS, sizes: Mapping[str, int] | None = None
) -> AgreementReport:
    """Compares every two of several rankings of the same units, and the tiers that they lead to.

    scores: by the name of the ranking, at least two. cuts: the share of all bytes that each tier holds, fastest first.
    sizes: bytes by unit (`Unit.nbytes`); None counts every unit the same. See `tiers_by_rank` for who goes where.

    Raises ValueError for fewer than two rankings, none or different units, and cuts that do not sum to 1.
    """
    if len(scores) < 2:
        raise ValueError(f"scores: expected at least two rankings, got {len(scores)}")
    require_same_units(scores)
    units = list(next(iter(scores.values())))
    if not units:
        raise ValueError("scores: expected those of one unit at least, got none")
    tiers = {name: tiers_by_rank(own, cuts, sizes) for name, own in scores.items()}
    bytes_of = {unit: 1 if sizes is None else sizes[unit] for unit in units}
    total = sum(bytes_of.values())
    pairs = []
    for first, second in combinations(scores, 2):
        a, b = tiers[first], tiers[second]
        same = [unit for unit in units if a[unit] == b[unit]]
        pairs.append(
            PairAgreement(
                first,
                second,
                spearman(scores[first], scores[second]),
                tuple(_overlap(a, b, cut, bytes_of) for cut in range(len(cuts) - 1)),
                len(same) / len(units),
                sum(bytes_of[unit] for unit in same) / total if total else 1.0,
            )
        )
    return AgreementReport(tuple(scores), len(units), tuple(cuts), tuple(pairs))


def _overlap(a: Mapping[str, int], b: Mapping[str, int], cut: int, bytes_of: Mapping[str, int]) -> float:
    """Bytes that both put above a cut, over the bytes of the one that puts more there."""
    above = [sum(size for unit, size in bytes_of.items() if tiers[unit] <= cut) for tiers in (a, b)]
    both = sum(size for unit, size in bytes_of.items() if a[unit] <= cut and b[unit] <= cut)
    return both / max(above) if max(above) else 1.0
