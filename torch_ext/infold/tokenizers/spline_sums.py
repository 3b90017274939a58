"""Least-squares splines of streamed samples, in memory that does not grow with them.

What is kept are the normal equations of a fine uniform spline space of M cells over [0, L]: the products
N = Σₜ b(t)·b(t)ᵀ of its basis functions at the steps that were seen (four diagonals, common to all columns), and
Σₜ b(t)·y(t) and Σₜ y(t)² of each. A sample adds to four rows. When the run outgrows L, L doubles: a function of the
coarser space is exactly (1, 4, 6, 4, 1)/8 of five of the finer (the two-scale relation), so its sums are exactly such
sums of the finer one's. A spline with knots on the grid is in the fine space, so its least-squares fit to *all*
samples, and the error of that fit, follow from these sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from infold._library import ops
from infold.tokenizers._files import take
from infold.tokenizers.splines import BSpline, FitError, clamped_knots, factor_determined

#: Of a coarse basis function in the five fine ones under it.
_TWO_SCALE = (0.125, 0.5, 0.75, 0.5, 0.125)
#: A pivot of the normal equations below this share of its diagonal leaves the control points less than eight digits.
_SINGULAR = 1e-7


class SplineSums:
    """The sums of samples of several columns, from which splines of n control points follow.

    resolution: cells for each control point, before M is rounded up to a power of two. device: where the sums are kept.
    """

    def __init__(self, n: int, resolution: int, device: torch.device) -> None:
        self.n, self.device = n, device
        self.samples = 0
        #: The first step and the last, and the length that the fine space covers: 0 until there are two.
        self.first, self.last, self.length = 0.0, 0.0, 0.0
        self._cells = cells(n, resolution)
        #: N[i, i + d] as [i, d].
        self.products = torch.zeros(self._cells + 3, 4, dtype=torch.float64)
        self._allocate(0)
        self._fitted: tuple[BSpline, Tensor] | None = None

    def _allocate(self, columns: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=self.device)

        #: Σ b·z (M + 3, columns), Σ z² and the first and last samples (columns), z being the sample less the first one:
        #: a constant is in every spline space, and what it would hide is not lost to rounding.
        self.sums, self.squares = zeros(self._cells + 3, columns), zeros(columns)
        self.origin, self.latest = zeros(columns), zeros(columns)

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def add(self, at: float, row: Tensor) -> None:
        """Adds one number of each column (columns), float64 on the device, at a step above the last one."""
        self._fitted = None
        if not self.samples:
            self._allocate(len(row))
            self.origin.copy_(row)
            self.first = at
        elif not self.length:
            self.length = at - self.first
        while at - self.first > self.length > 0:
            self._double()
        place = (at - self.first) / self.length * self._cells if self.length else 0.0
        cell = min(int(place), self._cells - 1)
        weights = _uniform_basis(place - cell)
        for first in range(4):
            for second in range(first, 4):
                self.products[cell + first, second - first] += weights[first] * weights[second]
        moved = row - self.origin
        self.sums[cell : cell + 4].addr_(torch.tensor(weights, dtype=torch.float64).to(self.device), moved)
        self.squares.addcmul_(moved, moved)
        self.latest.copy_(row)
        self.last = at
        self.samples += 1

    def _double(self) -> None:
        """Goes on to the sums of the space whose cells are twice as long."""
        self.length *= 2
        rows = len(self.products)
        # N'[I, J] = Σ w_k·w_m·N[2I + k − 3, 2J + m − 3], where N is zero beyond the third diagonal.
        coarse = torch.zeros_like(self.products)
        for diagonal in range(4):
            for k, left in enumerate(_TWO_SCALE):
                for m, right in enumerate(_TWO_SCALE):
                    apart = 2 * diagonal + m - k
                    if abs(apart) <= 3:
                        # The lower index of the pair is 2I + shift, the upper one `apart` on.
                        shift = k - 3 + min(apart, 0)
                        first, last = max((1 - shift) // 2, 0), (rows - 1 - abs(apart) - shift) // 2
                        fine = self.products[2 * first + shift : 2 * last + shift + 1 : 2, abs(apart)]
                        coarse[first : last + 1, diagonal] += left * right * fine
        self.products = coarse
        # In place, since the sums are what takes memory: row I needs rows 2I − 3 to 2I + 1, of which only some of the
        # first three have been written before.
        head = self.sums[:3].clone()
        for row in range(rows):
            total = torch.zeros_like(self.squares)
            for k, weight in enumerate(_TWO_SCALE):
                below = 2 * row + k - 3
                if 0 <= below < rows:
                    total.add_(head[below] if below < 3 else self.sums[below], alpha=weight)
            self.sums[row] = total

    def fit(self) -> tuple[BSpline, Tensor]:
        """The columns' splines, (columns, n) control points, and sums of squared residuals (columns).

        Raises ValueError where samples do not determine each control point to eight digits.
        """
        if self._fitted is not None:
            return self._fitted
        if self.samples < self.n:
            raise ValueError(f"samples: expected {self.n} or more for {self.n} control points, got {self.samples}")
        cell, end = self.length / self._cells, self.last - self.first
        even = torch.linspace(0, end, self.n - 2, dtype=torch.float64)[1:-1]
        knots = clamped_knots(self.n, 0.0, end, (even / cell).round() * cell)
        basis = _on_grid(knots, cell, len(self.products))
        gram = basis.T @ _banded_product(self.products, basis)
        moments = basis.T.to(self.device) @ self.sums
        shifted = (knots + self.first).clamp(max=self.last)
        # Not the last step by a rounding, outside of which it would lie.
        shifted[-4:] = self.last
        factor = factor_determined(gram, shifted, _SINGULAR, "steps")
        control = torch.cholesky_solve(moments, factor.to(self.device))
        # Σ (z − ẑ)²; its error is of second order in the control points'.
        explained = (control * (2 * moments - gram.to(self.device) @ control)).sum(0)
        residual = (self.squares - explained).clamp(min=0)
        self._fitted = BSpline(control.T + self.origin[:, None], shifted), residual
        return self._fitted

    def error(self) -> FitError:
        """(columns) of the fit. Raises ValueError as `fit`."""
        _, residual = self.fit()
        # Of z = y − y₀: the functions sum up to one.
        total = self.sums.sum(0)
        deviation = (self.squares - total.square() / self.samples).clamp(min=0)
        size = (self.squares + 2 * self.origin * total + self.samples * self.origin.square()).clamp(min=0)
        # Of a constant z is exactly 0, and so is the residual.
        floor = torch.zeros_like(size)
        return FitError(*((part / self.samples).sqrt() for part in (residual, deviation, size, floor)))

    def tensors(self) -> dict[str, Tensor]:
        return {"products": self.products, "sums": self.sums, "squares": self.squares,
                "origin": self.origin, "latest": self.latest}  # fmt: skip

    def steps(self) -> dict[str, float]:
        """What there is beside `tensors`."""
        return {"samples": self.samples, "first": self.first, "last": self.last, "length": self.length}

    @classmethod
    def of(
        cls,
        n: int,
        resolution: int,
        columns: int,
        steps: Mapping[str, float],
        tensors: Mapping[str, Tensor],
        path: Path,
        device: torch.device,
    ) -> SplineSums:
        """The inverse of `steps` and `tensors`, in a mapping that may hold more.

        Raises CorruptWeightError for other tensors, ValueError for steps and a length that no recording leads to.
        """
        # Before anything of this size is made.
        rows = cells(n, resolution) + 3
        products = take(tensors, "products", torch.float64, (rows, 4), path)
        state = cls(n, resolution, device)
        state.products, state.samples = products, int(steps["samples"])
        state.first, state.last, state.length = (float(steps[name]) for name in ("first", "last", "length"))
        reach = state.last - state.first
        started = state.samples > 0 or state.first == state.last == 0
        covered = (
            state.length / 2 < reach <= state.length < math.inf if state.samples > 1 else reach == state.length == 0
        )
        if state.samples < 0 or not (started and covered):
            got = f"{state.samples} from {state.first} to {state.last} on a length of {state.length}"
            raise ValueError(f"samples: expected steps on a length, got {got}")
        shapes = {"sums": (rows, columns), "squares": (columns,), "origin": (columns,), "latest": (columns,)}
        for name, shape in shapes.items():
            setattr(state, name, take(tensors, name, torch.float64, shape, path).to(device))
        return state


def cells(n: int, resolution: int) -> int:
    """M, the cells of the fine space."""
    return 1 << (resolution * n - 1).bit_length()


def _uniform_basis(s: float) -> tuple[float, float, float, float]:
    """The four uniform cubic basis functions that are not zero at ``s`` of a cell, from 0 to 1."""
    return (
        (1 - s) ** 3 / 6,
        (3 * s**3 - 6 * s**2 + 4) / 6,
        (-3 * s**3 + 3 * s**2 + 3 * s + 1) / 6,
        s**3 / 6,
    )


def _on_grid(knots: Tensor, cell: float, rows: int) -> Tensor:
    """(rows, n) coefficients of a space's basis functions in the fine uniform space that holds it from 0 to its end.

    The coefficient for the fine function about x is f(x) − cell²·f″(x)/6 (de Boor and Fix 1973), f being twice
    continuously differentiable; at the ends the outermost polynomials go on. Functions beyond the end have no sums.
    """
    middles = torch.arange(-1, rows - 1, dtype=torch.float64) * cell
    values: Tensor = ops.bspline_basis(middles, knots, 0)
    bends: Tensor = ops.bspline_basis(middles, knots, 2)
    return values - cell**2 / 6 * bends


def _banded_product(band: Tensor, matrix: Tensor) -> Tensor:
    """A symmetric banded matrix, [i, d] being its [i, i + d], times a matrix."""
    result: Tensor = band[:, :1] * matrix
    for d in range(1, band.shape[1]):
        result[:-d] += band[:-d, d, None] * matrix[d:]
        result[d:] += band[:-d, d, None] * matrix[:-d]
    return result
