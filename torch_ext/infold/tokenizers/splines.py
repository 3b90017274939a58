"""Cubic B-splines with exactly n control points, fitted by least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from infold._library import ops

#: Four-point Gauss-Legendre quadrature on [−1, 1]: exact for the square of a cubic.
_NODES = (-0.8611363115940526, -0.3399810435848563, 0.3399810435848563, 0.8611363115940526)
_WEIGHTS = (0.34785484513745385, 0.6521451548625461, 0.6521451548625461, 0.34785484513745385)
#: Pivots of BᵀB below this share of its diagonal leave the control points of a fit by QR less than about eight digits.
_SINGULAR = 1e-13


class BSpline:
    """Cubic B-splines over common knots.

    control: (..., n), n ≥ 4, any float dtype and device; splines are differentiable in them.
    knots: (n + 4), ascending; held in float64 on the CPU. The spline is defined from ``knots[3]`` to ``knots[n]``.

    Raises ValueError for other shapes and for knots that do not ascend.
    """

    def __init__(self, control: Tensor, knots: Tensor) -> None:
        if control.dim() < 1 or control.shape[-1] < 4 or not control.is_floating_point():
            raise ValueError(f"control: expected floats, 4 or more in the last dimension, got {_described(control)}")
        if knots.dim() != 1 or len(knots) != control.shape[-1] + 4:
            raise ValueError(f"knots: expected {control.shape[-1] + 4} numbers, got {_described(knots)}")
        self.control, self.knots = control, _host(knots)
        ops.bspline_basis(self.knots[3:4], self.knots)  # which checks their order

    @property
    def n(self) -> int:
        """How many control points there are."""
        return int(self.control.shape[-1])

    @property
    def domain(self) -> tuple[float, float]:
        """Where the spline begins and ends."""
        return float(self.knots[3]), float(self.knots[self.n])

    @property
    def abscissae(self) -> Tensor:
        """(n) where the control points stand: the means of three knots (Greville), in float64."""
        return self.knots[1:-1].unfold(0, 3, 1).mean(-1)[: self.n]

    def __call__(self, t: Tensor | float, derivative: int = 0, *, extrapolate: bool = False) -> Tensor:
        """Values, or derivatives of an order, at ``t`` of any shape: (..., *t.shape), in the control points' dtype.

        Not differentiable in ``t``. extrapolate: whether the first and last polynomial go on outside of the domain.
        Raises ValueError for points that are not finite, and without it for points outside.
        """
        points = _host(torch.as_tensor(t, dtype=torch.float64))
        if not extrapolate:
            _require_inside(points.flatten(), self.domain)
        # A constant adds nothing to a derivative but rounding.
        control = self.control - self.control[..., :1] if derivative else self.control
        values: Tensor = ops.bspline_eval(control, self.knots, points.flatten(), derivative)
        return values.reshape((*self.control.shape[:-1], *points.shape))

    def derivative(self, order: int = 1) -> Callable[[Tensor | float], Tensor]:
        """The function that is the derivative of an order."""

        def evaluate(t: Tensor | float) -> Tensor:
            return self(t, order)

        return evaluate

    def rms(self, derivative: int = 0, start: float | None = None, end: float | None = None) -> Tensor:
        """(...) the root of the mean square of a derivative between two places, by default everywhere. Exact.

        Raises ValueError unless they ascend within the domain.
        """
        points, weights = self._quadrature(start, end)
        return (self(points, derivative).square() @ weights.to(self.control)).sqrt()

    def variance(self) -> Tensor:
        """(...) the mean square deviation from the mean along the spline. Exact."""
        points, weights = self._quadrature(None, None)
        values, weights = BSpline(self.control - self.control[..., :1], self.knots)(points), weights.to(self.control)
        return (values - (values @ weights).unsqueeze(-1)).square() @ weights

    def error(self, values: Tensor, points: Tensor | None = None) -> FitError:
        """How far (..., T) values at ``points`` are from the spline; points as in `fit_bspline`."""
        points = _points(values, points)
        if values.shape[:-1] != self.control.shape[:-1]:
            expected = (*self.control.shape[:-1], values.shape[-1])
            raise ValueError(f"values: expected shape {expected}, got {tuple(values.shape)}")
        # From the first value on, since what is large and constant would drown what varies.
        first = values[..., :1].double()
        moved, control = values.double() - first, self.control.double() - first.to(self.control.device)
        residual = moved - BSpline(control, self.knots)(points)
        deviation = moved - moved.mean(-1, keepdim=True)
        size = values.double().square().mean(-1).sqrt()
        # The control points' own rounding, and that of computing them, in float32 at least.
        computed = torch.promote_types(self.control.dtype, torch.float32)
        floor = (torch.finfo(self.control.dtype).eps / 2 + 16 * torch.finfo(computed).eps) * size
        return FitError(residual.square().mean(-1).sqrt(), deviation.square().mean(-1).sqrt(), size, floor)

    def _quadrature(self, start: float | None, end: float | None) -> tuple[Tensor, Tensor]:
        """Places and weights whose sum is the mean of a piecewise polynomial of degree 7 or less."""
        first, last = self.domain
        start, end = first if start is None else start, last if end is None else end
        if not first <= start < end <= last:
            raise ValueError(f"start, end: expected to ascend from {first} to {last}, got {start} and {end}")
        ends = torch.tensor([start, end], dtype=torch.float64)
        # Knots that coincide make intervals of no length and no weight.
        breaks = torch.cat([ends[:1], self.knots[(self.knots > start) & (self.knots < end)], ends[1:]])
        middle, half = (breaks[1:] + breaks[:-1]) / 2, (breaks[1:] - breaks[:-1]) / 2
        nodes, weights = (torch.tensor(each, dtype=torch.float64) for each in (_NODES, _WEIGHTS))
        points = middle[:, None] + half[:, None] * nodes
        return points.flatten(), (half[:, None] * weights).flatten() / (end - start)


class FitError(NamedTuple):
    """Root-mean-square errors of fits, (...) each, in float64."""

    #: Of what is left over.
    rms: Tensor
    #: Of the values' deviation from their mean.
    deviation: Tensor
    #: Of the values.
    size: Tensor
    #: What rounding alone may leave over of constants.
    floor: Tensor

    @property
    def to_deviation(self) -> Tensor:
        """Relative to the values' deviation from their mean: the part of the movement that the spline misses. 0 for
        constants, of which no more than rounding is left over.
        """
        return self._over(self.deviation)

    @property
    def to_size(self) -> Tensor:
        """Relative to the values themselves: small for whatever moves little, also where the movement is missed."""
        return self._over(self.size)

    def _over(self, scale: Tensor) -> Tensor:
        # Of anything that moves, also a small residual may be all of the movement.
        constant = (self.deviation == 0) & (self.rms <= self.floor)
        return torch.where(constant, 0.0, self.rms / scale)

    def total(self) -> FitError:
        """That of all series together."""
        rms, deviation, size, floor = (part.square().mean().sqrt() for part in self)
        return FitError(rms, deviation, size, floor)


def clamped_knots(n: int, start: float = 0.0, end: float = 1.0, interior: Tensor | None = None) -> Tensor:
    """(n + 4) knots in float64 for n control points, four at either end.

    interior: the n − 4 knots between; None spaces them evenly. Raises ValueError for n below 4 and another count.
    """
    if n < 4:
        raise ValueError(f"n: expected 4 or more control points, got {n}")
    if interior is None:
        interior = torch.linspace(start, end, n - 2, dtype=torch.float64)[1:-1]
    if interior.shape != (n - 4,):
        raise ValueError(f"interior: expected {n - 4} knots, got {_described(interior)}")
    ends = torch.tensor([[start], [end]], dtype=torch.float64).expand(2, 4)
    return torch.cat([ends[0], _host(interior), ends[1]])


def fit_bspline(values: Tensor, n: int, points: Tensor | None = None, knots: Tensor | None = None) -> BSpline:
    """The splines of n control points that are nearest to (..., T) values, by the sum of squares.

    values: floats; the control points come in their dtype, computed in float32 at least.
    points: (T) ascending, where the values are; None is 0, 1, …, T − 1.
    knots: (n + 4) ascending; None is clamped and uniform from the first point to the last.

    Raises ValueError for fewer points than control points or such as leave one less than about eight digits, for points
    that do not ascend within the knots, and for values that are not finite (their index is named).
    """
    if not values.is_floating_point() or values.dim() < 1:
        raise ValueError(f"values: expected floats of one dimension or more, got {_described(values)}")
    points = _points(values, points)
    if n < 4:
        raise ValueError(f"n: expected 4 or more control points, got {n}")
    if len(points) < n:
        raise ValueError(f"points: expected {n} or more for {n} control points, got {len(points)}")
    if knots is None:
        knots = clamped_knots(n, float(points[0]), float(points[-1]))
    elif knots.shape != (n + 4,):
        raise ValueError(f"knots: expected {n + 4} numbers, got {_described(knots)}")
    knots = _host(knots)
    control: Tensor = ops.bspline_fit(values, knots, points)
    basis: Tensor = ops.bspline_basis(points, knots)
    factor_determined(basis.T @ basis, knots, _SINGULAR, "points")
    # A value that is not finite spoils its series' control points, which are far fewer to look at.
    if not bool(torch.isfinite(control.detach()).all()):
        bad = (~torch.isfinite(values.detach())).nonzero()
        if len(bad):
            index = tuple(bad[0].tolist())
            raise ValueError(f"values: expected finite numbers, got {float(values[index])} at {index}")
    return BSpline(control, knots)


def factor_determined(gram: Tensor, knots: Tensor, least: float, what: str) -> Tensor:
    """The Cholesky factor of the normal equations' matrix (n, n) of splines on knots (n + 4), float64 on the CPU.

    Raises ValueError, which says near which of ``what`` there are too few, where a pivot is below the share ``least``
    of its diagonal: then samples do not determine each control point.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal().square() / gram.diagonal()
    if int(failed) or not bool((pivots > least).all()):
        index = int(failed) - 1 if int(failed) else int(pivots.argmin())
        where = float(BSpline(torch.zeros(len(gram)), knots).abscissae[index])
        raise ValueError(f"{what}: expected samples that determine every control point, got too few near {where:g}")
    return factor


def _points(values: Tensor, points: Tensor | None) -> Tensor:
    count = values.shape[-1]
    if points is None:
        return torch.arange(count, dtype=torch.float64)
    if points.shape != (count,):
        raise ValueError(f"points: expected {count}, one for each value, got {_described(points)}")
    return _host(points)


def _require_inside(points: Tensor, domain: tuple[float, float]) -> None:
    outside = ((points < domain[0]) | (points > domain[1])).nonzero()
    if len(outside):
        index = int(outside[0])
        got = f"{float(points[index])} at {index}"
        raise ValueError(f"points: expected numbers from {domain[0]} to {domain[1]}, got {got}")


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
