"""The leading components of samples from a stream, in memory that grows with features and not with their square."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from infold.tokenizers._files import take
from infold.tokenizers.rows import combined, gram, refuse_large_squares, rounded

#: Columns that are worked on at a time.
_COLUMNS = 8192
#: What a direction's sum of squares must be of the largest's not to be rounding: of the components, which are in a
#: dtype, and of the Gram matrices, which are in float64.
_RANK = {torch.float32: 1e-12, torch.float64: 1e-14}
#: How far components may be from orthonormal, and how much of one must be new to those before.
_DRIFT, _NEW = 1e-5, 0.1


class Blocks:
    """Updates of a truncated SVD by blocks of rows (Brand 2002), corrected for a mean that moves (Ross et al. 2008).

    For each of ``kept`` components it holds a row of features, in float32 (float64 for float64 samples). While it
    updates, old and new ones and a block's residuals coexist: 4 · features · (2 · kept + rows) bytes. What is discarded
    is lost, so results depend on the order a little; the total variance is exact.
    """

    name = "blocks"

    def __init__(self, features: int, kept: int, dtype: torch.dtype, device: torch.device) -> None:
        self.count = 0
        self.kept = min(kept, features)
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self.components = torch.empty(0, features, dtype=dtype, device=device)
        self.singular_values = torch.empty(0, dtype=torch.float64, device=device)
        #: The sum of squares about the mean, of all features.
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        """Adds samples (rows, d). Raises ValueError as `refuse_large_squares`; nothing is added then."""
        basis = self.components
        if x.is_floating_point():
            largest = torch.stack(x.aminmax()).double().abs().max()
            refuse_large_squares(largest.square() * x.numel(), x, basis.dtype)
        for part in torch.split(x, max(256, min(self.kept, 2048))):
            mean = _mean(part)
            # About this point between the means, the rows' products are what the joint scatter has more than the old.
            shift = torch.lerp(mean, self.mean, math.sqrt(self.count / (self.count + len(part))))
            rows = torch.empty(part.shape, dtype=basis.dtype, device=part.device).copy_(part)
            for less in rounded(shift, basis.dtype):
                rows -= less
            self.total = self.total + self._absorb(rows)
            self.count, self.mean, _ = combined(self.count, self.mean, len(part), mean)

    def merge(self, other: Blocks) -> None:
        """Adds another's samples as far as its components hold them."""
        size, features = other.components.shape
        rows = self.components.new_empty(size + 1, features)
        rows[:-1] = other.components
        rows[:-1] *= other.singular_values[:, None].to(rows)
        count, mean, step = combined(self.count, self.mean, other.count, other.mean.to(self.mean))
        rows[-1] = step
        self._absorb(rows)
        self.total = self.total + other.total.to(self.total) + step.square().sum()
        self.count, self.mean = count, mean

    def spectrum(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Components (count, d), their sums of squares (count), falling, and the sum over all components.

        Raises ValueError where samples had fewer directions.
        """
        if count > len(self.singular_values):
            raise ValueError(
                f"n_components: expected at most {len(self.singular_values)}, the directions seen so far, got {count}"
            )
        return self.components[:count], self.singular_values[:count].square(), self.total

    def tensors(self) -> dict[str, Tensor]:
        return {
            "mean": self.mean,
            "components": self.components,
            "singular_values": self.singular_values,
            "total": self.total.reshape(1),
        }

    def to(self, device: torch.device) -> None:
        """Moves what is kept, in place."""
        self.mean, self.components = self.mean.to(device), self.components.to(device)
        self.singular_values, self.total = self.singular_values.to(device), self.total.to(device)

    @classmethod
    def of(cls, count: int, kept: int, tensors: Mapping[str, Tensor], path: Path) -> Blocks:
        """The inverse of `tensors`."""
        features, rank = len(tensors.get("mean", torch.empty(0))), len(tensors.get("singular_values", torch.empty(0)))
        found = tensors.get("components")
        dtype = torch.float64 if found is not None and found.dtype == torch.float64 else torch.float32
        state = cls(0, 0, dtype, torch.device("cpu"))
        state.count, state.kept = count, kept
        state.mean = take(tensors, "mean", torch.float64, (features,), path)
        state.components = take(tensors, "components", dtype, (rank, features), path)
        state.singular_values = take(tensors, "singular_values", torch.float64, (rank,), path)
        state.total = take(tensors, "total", torch.float64, (1,), path)[0]
        return state

    def _absorb(self, rows: Tensor) -> Tensor:
        """Adds the products of rows (m, d), which become residuals, to the scatter; returns their sum of squares.

        The rows less what the components hold of them have the Gram matrix E·e·Eᵀ, so Q = e^-½·Eᵀ·residuals is
        orthonormal. In the basis (V, Q) old and new rows are the small matrix K, and the eigenvectors W of KᵀK turn
        (V, Q) into the new components.
        """
        basis, size = self.components, len(self.components)
        inside = self.mean.new_zeros(len(rows), size)
        square = self.mean.new_zeros(len(rows))
        for here in self._columns():
            part = rows[:, here]
            inside += part @ basis[:, here].T
            square += part.double().square().sum(1)
        products = inside.new_zeros(len(rows), len(rows))
        for here in self._columns():
            part = rows[:, here]
            part -= inside.to(basis.dtype) @ basis[:, here]
            # In float32 they would hide directions below 1/3000 of the largest.
            products += gram(part.double().T)
        outside, vectors = torch.linalg.eigh(products)
        directions = outside > _RANK[basis.dtype] * square.max()
        outside, vectors = outside[directions].sqrt(), vectors[:, directions]

        rank = size + len(outside)
        small = inside.new_zeros(rank, rank)
        small[:size, :size] = inside.T @ inside + self.singular_values.square().diag()
        small[size:, :size] = (vectors * outside).T @ inside
        small[:size, size:] = small[size:, :size].T
        small.diagonal()[size:] = outside.square()
        values, turn = torch.linalg.eigh(small)
        keep = min(self.kept, int((values > _RANK[basis.dtype] * values.max()).sum())) if rank else 0
        values, turn = values[rank - keep :].flip(0), turn[:, rank - keep :].flip(1)
        old = turn[:size].T.to(basis.dtype)
        new = ((vectors / outside) @ turn[size:]).T.to(basis.dtype)
        updated = basis if keep == size else basis.new_empty(keep, basis.shape[1])
        for here in self._columns():
            updated[:, here] = old @ basis[:, here] + new @ rows[:, here]
        self.components, self.singular_values = updated, values.sqrt()
        self._orthonormalise()
        return square.sum()

    def _orthonormalise(self) -> None:
        """Undoes what rounding did to the components, most to those of little variance; leaves out what is rounding."""
        products = self.mean.new_zeros(len(self.components), len(self.components))
        for here in self._columns():
            products += gram(self.components[:, here].T)
        if bool(((products - torch.eye(len(products)).to(products)).abs() < _DRIFT).all()):
            return
        factor, _ = torch.linalg.cholesky_ex(products)
        dependent = (~(factor.diagonal() > _NEW)).nonzero()
        if len(dependent):
            keep = int(dependent[0])
            self.components, self.singular_values = self.components[:keep], self.singular_values[:keep]
            factor = torch.linalg.cholesky(products[:keep, :keep])
        # S·V = (S·L)·(L⁻¹·V), and the eigenvectors of (S·L)ᵀ(S·L) are its right singular vectors.
        scaled = self.singular_values[:, None] * factor
        values, turn = torch.linalg.eigh(scaled.T @ scaled)
        turn = torch.linalg.solve_triangular(factor.T, turn.flip(1), upper=True).T.to(self.components.dtype)
        for here in self._columns():
            self.components[:, here] = turn @ self.components[:, here]
        self.singular_values = values.flip(0).clamp(min=0).sqrt()

    def _columns(self) -> list[slice]:
        return [slice(start, start + _COLUMNS) for start in range(0, self.components.shape[1], _COLUMNS)]


def _mean(x: Tensor) -> Tensor:
    """Of rows, in float64, without a float64 copy of them."""
    parts = [x[:, start : start + _COLUMNS] for start in range(0, x.shape[1], _COLUMNS)]
    # uint8 has no mean of its own.
    return torch.cat([part.sum(0, dtype=torch.int64) if x.dtype == torch.uint8 else part.sum(0, dtype=torch.float64)
                      for part in parts]).double() / len(x)  # fmt: skip
