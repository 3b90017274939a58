"""Series of a training run as splines: what these tell, in numbers, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infold.tokenizers.splines import BSpline, FitError


@dataclass(frozen=True)
class Trajectory:
    """One series as a spline over steps; a series of tensors has one for each element."""

    name: str
    #: Control points (*shape, n) in float64, and the knots.
    spline: BSpline
    #: (*shape) each. Residuals below about 1e-8 of the deviation from the *first* value are not resolved.
    error: FitError
    #: How many samples there were, and how many bytes one number of them has.
    samples: int
    itemsize: int
    #: The unit (`infold.tiers.units`) that it belongs to, and what is watched of it.
    unit: str | None
    signal: str

    @property
    def shape(self) -> torch.Size:
        return self.spline.control.shape[:-1]

    @property
    def sample_bytes(self) -> int:
        """What the samples would take."""
        return self.samples * self.shape.numel() * self.itemsize

    @property
    def control_bytes(self) -> int:
        """What the control points take in the samples' dtype, without the knots, which all series share."""
        return self.spline.control.numel() * self.itemsize

    @property
    def compression_ratio(self) -> float:
        """Bytes of the samples over bytes of the control points."""
        return self.sample_bytes / self.control_bytes

    def activity(self, window: float | None = None) -> Tensor:
        """(*shape) the root mean square of the derivative, by step, over the last ``window`` steps; None is all."""
        first, last = self.spline.domain
        if window is not None and not 0 < window <= last - first:
            raise ValueError(f"window: expected above 0 and up to {last - first} steps, got {window}")
        # Of the whole run by its length, the difference may be below the first step by a rounding.
        return self.spline.rms(1, None if window is None else max(first, last - window))

    def stability(self) -> Tensor:
        """(*shape) 1 − a₄ / max(a₁, …, a₄) with the activities a of the four quarters of the run.

        1 for what no longer moves at its end, 0 for what never moved more than there, 1 for constants.
        """
        first, last = self.spline.domain
        ends = [first + (last - first) * i / 4 for i in range(4)] + [last]
        quarters = torch.stack([self.spline.rms(1, ends[i], ends[i + 1]) for i in range(4)])
        most = quarters.amax(0)
        return torch.where(most > 0, 1 - quarters[3] / most, 1.0)

    def variance(self) -> Tensor:
        """(*shape) the variance along the spline."""
        return self.spline.variance()


def table(trajectories: Iterable[Trajectory]) -> str:
    """A line for each series: how many numbers, their errors together, compression, activity, stability."""
    lines = [
        f"{'series':<32} {'numbers':>9} {'err/dev':>9} {'err/size':>9} {'ratio':>7} {'activity':>10} "
        f"{'last quarter':>12} {'stability':>9}"
    ]
    for each in trajectories:
        total = each.error.total()
        first, last = each.spline.domain
        overall, late = (a.square().mean().sqrt() for a in (each.activity(), each.activity((last - first) / 4)))
        lines.append(
            f"{each.name:<32} {each.shape.numel():>9,} {float(total.to_deviation):>9.2%} "
            f"{float(total.to_size):>9.2%} {each.compression_ratio:>7.1f} {float(overall):>10.3g} "
            f"{float(late):>12.3g} {float(each.stability().mean()):>9.2f}"
        )
    return "\n".join(lines)


def picture(
    trajectories: Mapping[str, Trajectory], path: str | Path, names: Sequence[str] | None = None, elements: int = 4
) -> None:
    """As `TrajectoryRecorder.plot`, of series by name."""
    from infold.spectral.plot import figure

    names = list(trajectories)[:6] if names is None else list(names)
    unknown = [name for name in names if name not in trajectories]
    if unknown or not names:
        raise ValueError(f"names: expected recorded series, got {unknown}")
    if elements < 1:
        raise ValueError(f"elements: expected one or more, got {elements}")
    drawing = figure(10, 2.2 * len(names))
    axes = drawing.subplots(len(names), 2, squeeze=False, sharex=True)
    for (left, right), name in zip(axes, names, strict=True):
        spline = trajectories[name].spline
        flat = spline.control.reshape(-1, spline.n).cpu()
        chosen = flat[evenly(len(flat), elements)]
        t = torch.linspace(*spline.domain, 400, dtype=torch.float64)
        shown = BSpline(chosen, spline.knots)
        for line, control in zip(shown(t), chosen, strict=True):
            (drawn,) = left.plot(t, line, linewidth=1)
            left.plot(spline.abscissae, control, "o", markersize=3, color=drawn.get_color(), alpha=0.6)
        activity = BSpline(flat, spline.knots)(t, 1).square().mean(0).sqrt()
        right.plot(t, activity, color="black", linewidth=1)
        left.set_title(f"{name}: {len(chosen)} of {len(flat)}, control points", fontsize=8)
        right.set_title(f"{name}: activity, all", fontsize=8)
    for below in axes[-1]:
        below.set_xlabel("step")
    drawing.savefig(path, dpi=120)


def evenly(count: int, chosen: int) -> Tensor:
    """Indices of evenly spaced elements, at most so many."""
    chosen = min(count, chosen)
    return torch.arange(chosen) * count // chosen
