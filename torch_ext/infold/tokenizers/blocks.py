"""The leading components of samples from a stream, in memory that grows with features and not with their square."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from infold.tokenizers._files import take
from infold.tokenizers.rows import combined, refuse_not_finite

#: Columns that are worked on at a time.
_COLUMNS = 8192
#: What a residual's square must be of the largest row's to be a direction and not rounding.
_RANK = {torch.float32: 1e-11, torch.float64: 1e-26}
#: Above these, sums of squares may not be in float32.
_LARGEST = {torch.float32: 1e15, torch.bfloat16: 1e15, torch.float64: 1e150}
#: Updates between two checks of the components' orthonormality, and how far they may be from it.
_CHECK_EVERY, _DRIFT = 16, 1e-5


class Blocks:
    """Updates of a truncated SVD by blocks of rows (Brand 2002), corrected for a mean that moves (Ross et al. 2008).

    For each of ``kept`` components it holds a row of features, in float32 (float64 for float64 samples), and a block's
    residuals while it updates: 4 · features · (kept + rows) bytes and little more. What is discarded is lost, so
    results depend on the order a little; the total variance is exact.
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
        self._updates = 0

    def update(self, x: Tensor) -> None:
        """Adds samples (rows, d). Raises ValueError for a number that is not finite; nothing is added then."""
        if x.is_floating_point():
            largest = max(map(abs, torch.stack(x.aminmax()).tolist()))
            if not largest < _LARGEST.get(x.dtype, math.inf):
                refuse_not_finite(x)
                raise ValueError(f"x: expected numbers whose squares are in float32, got {largest}; pass float64")
        for part in torch.split(x, max(256, min(self.kept, 2048))):
            mean = _mean(part)
            self._absorb(part, mean, mean, len(part), None)

    def merge(self, other: Blocks) -> None:
        """Adds another's samples as far as its components hold them."""
        rows = other.singular_values[:, None].to(self.components) * other.components.to(self.components)
        mean, total = other.mean.to(self.mean), other.total.to(self.total)
        self._absorb(rows, torch.zeros_like(mean), mean, other.count, total)

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

    def _absorb(self, x: Tensor, shift: Tensor, mean: Tensor, count: int, total: Tensor | None) -> None:
        """Adds the rows x − shift, which stand for ``count`` samples of a mean and a sum of squares about it.

        The rows and the step of the mean, less what the components hold of them, have the Gram matrix E·e·Eᵀ, so
        Q = e^-½·Eᵀ·residuals is orthonormal. In the basis (V, Q) old and new rows are the small matrix K, and the
        eigenvectors W of KᵀK turn (V, Q) into the new components.
        """
        basis, size = self.components, len(self.components)
        features = basis.shape[1]
        all_of, joint_mean, step = combined(self.count, self.mean, count, mean)
        columns = [slice(start, start + _COLUMNS) for start in range(0, features, _COLUMNS)]
        residuals = basis.new_empty(len(x) + 1, features)
        inside = step.new_zeros(len(x) + 1, size)
        square = step.new_zeros(len(x) + 1)
        for here in columns:
            part = residuals[:, here]
            part[:-1] = x[:, here]
            rounded = shift[here].to(basis.dtype)
            part[:-1] -= rounded
            # Where the mean is large, what rounding took from it is not small beside the deviations.
            part[:-1] -= (shift[here] - rounded.double()).to(basis.dtype)
            part[-1] = step[here]
            inside += part @ basis[:, here].T
            square += part.double().square().sum(1)
        gram = inside.new_zeros(len(x) + 1, len(x) + 1)
        for here in columns:
            part = residuals[:, here]
            part -= inside.to(basis.dtype) @ basis[:, here]
            gram += part @ part.T
        outside, vectors = torch.linalg.eigh(gram)
        directions = outside > _RANK[basis.dtype] * square.max()
        outside, vectors = outside[directions].sqrt(), vectors[:, directions]

        rank = size + len(outside)
        small = inside.new_zeros(rank, rank)
        small[:size, :size] = inside.T @ inside + self.singular_values.square().diag()
        small[size:, :size] = (vectors * outside).T @ inside
        small[:size, size:] = small[size:, :size].T
        small.diagonal()[size:] = outside.square()
        values, turn = torch.linalg.eigh(small)
        # A zero is no direction.
        keep = min(self.kept, int((values > 1e-14 * values.max()).sum())) if rank else 0
        values, turn = values[rank - keep :].flip(0), turn[:, rank - keep :].flip(1)
        old = turn[:size].T.to(basis.dtype)
        new = ((vectors / outside) @ turn[size:]).T.to(basis.dtype)
        updated = basis if keep == size else basis.new_empty(keep, features)
        for here in columns:
            updated[:, here] = old @ basis[:, here] + new @ residuals[:, here]

        self.components, self.singular_values = updated, values.sqrt()
        self.total = self.total + (square.sum() if total is None else total + square[-1])
        self.count, self.mean = all_of, joint_mean
        self._updates += 1
        if self._updates % _CHECK_EVERY == 0:
            self._orthonormalise()

    def _orthonormalise(self) -> None:
        """Undoes what rounding did to the components over many updates."""
        basis = self.components
        gram = torch.zeros(len(basis), len(basis), dtype=torch.float64, device=basis.device)
        for start in range(0, basis.shape[1], _COLUMNS):
            part = basis[:, start : start + _COLUMNS]
            gram += part @ part.T
        if float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()) < _DRIFT:
            return
        # S·V = (S·L)·(L⁻¹·V), and the eigenvectors of (S·L)ᵀ(S·L) are its right singular vectors.
        factor = torch.linalg.cholesky(gram)
        scaled = self.singular_values[:, None] * factor
        values, turn = torch.linalg.eigh(scaled.T @ scaled)
        turn = torch.linalg.solve_triangular(factor.T, turn.flip(1), upper=True).T.to(basis.dtype)
        for start in range(0, basis.shape[1], _COLUMNS):
            here = slice(start, start + _COLUMNS)
            basis[:, here] = turn @ basis[:, here]
        self.singular_values = values.flip(0).clamp(min=0).sqrt()


def _mean(x: Tensor) -> Tensor:
    """Of rows, in float64, without a float64 copy of them."""
    parts = [x[:, start : start + _COLUMNS] for start in range(0, x.shape[1], _COLUMNS)]
    # uint8 has no mean of its own.
    return torch.cat([part.sum(0, dtype=torch.int64) if x.dtype == torch.uint8 else part.sum(0, dtype=torch.float64)
                      for part in parts]).double() / len(x)  # fmt: skip
