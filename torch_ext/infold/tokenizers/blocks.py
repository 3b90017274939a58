"""Incremental PCA of many features: mean-corrected block updates (Ross et al., 2008), at O(k·d) memory.

The samples seen, centred, are kept as S·V: singular values (r) times orthonormal rows (r, d). A batch X stacks below it

    A = [S·V; X − mean(X); √(n·m / (n + m))·(mean(X) − mean)],

whose leading singular values and right vectors are the new S and V. They follow from the eigenvectors U of A·Aᵀ, of
which S²'s block is known: V = S⁻¹·Uᵀ·A, some columns at a time, in the place of the old V.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from infold.tokenizers.spectrum import (
    Spectrum,
    check_batch,
    complete,
    flip_signs,
    largest,
    require_finite,
    too_large,
    work_dtype,
)

#: Columns that are worked on at a time, on a CPU and elsewhere.
_COLUMNS = {"cpu": 4096}
_MANY_COLUMNS = 65536
#: Samples of one update: fewer pay more for V, more for the eigenvectors.
_LEAST, _MOST = 256, 1024
#: Random directions in which V's rows are checked, and how far from orthonormal they may be, in units of rounding.
_PROBES, _DRIFT = 8, 1000.0

#: Writes some columns of the centred rows of a batch.
_Fill = Callable[[slice, Tensor], None]


class Blocks:
    """``count`` samples, as their mean (d, float64), r singular values (float64) and orthonormal rows (r, d).

    r is a little more than the components asked for: what a batch adds to those just below the cut is then not lost
    before the next batch comes. total: the sum of squares about the mean, of everything seen.
    """

    method = "blocks"

    def __init__(self, components: int, features: int, device: torch.device, dtype: torch.dtype) -> None:
        self.components = components
        self.dtype = dtype
        self.count = 0
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self.values = torch.zeros(0, dtype=torch.float64, device=device)
        self._room = torch.zeros(room_for(components, features), features, dtype=dtype, device=device)

    @property
    def features(self) -> int:
        return len(self.mean)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def basis(self) -> Tensor:
        """(r, d), a view of what the next update overwrites."""
        return self._room[: len(self.values)]

    def restore(self, count: int, total: Tensor, mean: Tensor, values: Tensor, basis: Tensor) -> None:
        """Takes a state; ``basis`` has at most as many rows as there is room for."""
        self.count, self.total, self.mean, self.values = count, total, mean, values
        self._room[: len(basis)] = basis

    def update(self, x: Tensor) -> None:
        """Adds a batch (n, d), of which large ones are cheaper per sample; an error leaves everything as it was."""
        x = check_batch(x, self.features, self.device)
        require_finite(x)
        self._widen(torch.promote_types(self.dtype, work_dtype(x)))
        if x.is_floating_point() and largest(x) > math.sqrt(torch.finfo(self.dtype).max / x.numel()):
            raise too_large(x)
        # Even parts: a short last one would be as expensive.
        parts = math.ceil(len(x) / min(max(_LEAST, len(self._room)), _MOST))
        for rows in x.tensor_split(parts):
            self._add(rows)

    def merge(self, other: Blocks) -> None:
        """Adds the samples of ``other``: exact, but for what either has left out."""

        def fill(columns: slice, out: Tensor) -> None:
            torch.mul(other.basis[:, columns], other.values[:, None].to(self.dtype), out=out)

        self._widen(torch.promote_types(self.dtype, other.dtype))
        self._absorb(fill, len(other.values), other.count, other.mean, other.total)

    def spectrum(self, components: int) -> Spectrum:
        """The leading components, of at least two samples. Those without variance complete the basis."""
        rank = min(components, len(self.values))
        leading = flip_signs(complete(self.basis[:rank].clone(), components))
        variance = self.values.new_zeros(components)
        variance[:rank] = self.values[:rank].square() / (self.count - 1)
        return Spectrum(leading, self.mean.to(self.dtype), variance, self.total / (self.count - 1), self.count)

    def to(self, device: torch.device) -> Blocks:
        """A copy on a device."""
        copy = Blocks(self.components, self.features, device, self.dtype)
        total, mean, values = (tensor.to(device, copy=True) for tensor in (self.total, self.mean, self.values))
        copy.restore(self.count, total, mean, values, self.basis.to(device))
        return copy

    def _widen(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._room = self._room.to(dtype)

    def _add(self, x: Tensor) -> None:
        mean = torch.empty_like(self.mean)
        for columns in self._columns():
            mean[columns] = x[:, columns].mean(0, dtype=torch.float64)
        # In two parts: a large mean that is rounded would leave rows off centre.
        high = mean.to(self.dtype)
        low = (mean - high).to(self.dtype)

        def fill(columns: slice, out: Tensor) -> None:
            out.copy_(x[:, columns])
            out -= high[columns]
            out -= low[columns]

        self._absorb(fill, len(x), len(x), mean, None)

    def _absorb(self, fill: _Fill, rows: int, count: int, mean: Tensor, total: Tensor | None) -> None:
        """Adds ``count`` samples of a mean, of which ``fill`` gives the centred rows, or as many as span them.

        total: their sum of squares about their mean; None where the rows are all of them.
        """
        seen = self.count + count
        weight = self.count * count / seen
        correction = (math.sqrt(weight) * (mean - self.mean)).to(self.dtype)
        rank, below = len(self.values), rows + 1
        widest = min(_COLUMNS.get(self.device.type, _MANY_COLUMNS), self.features)
        buffer = torch.empty(below * widest, dtype=self.dtype, device=self.device)

        def stacked(columns: slice) -> Tensor:
            width = columns.stop - columns.start
            out = buffer[: below * width].view(below, width)
            fill(columns, out[:-1])
            out[-1] = correction[columns]
            return out

        # A·Aᵀ, products in the dtype of V and sums of column blocks in float64.
        gram = torch.zeros(rank + below, rank + below, dtype=torch.float64, device=self.device)
        for columns in self._columns():
            new = stacked(columns)
            gram[rank:, rank:] += new @ new.T
            gram[rank:, :rank] += new @ self.basis[:, columns].T
        gram[rank:, :rank] *= self.values
        gram[:rank, :rank] = self.values.square().diag()
        own = gram.diagonal()[rank:-1].sum() if total is None else total
        self.total = self.total + own + weight * (mean - self.mean).square().sum()

        # Lower triangle only.
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0), vectors.flip(1)
        # Below this, a direction is rounding.
        kept = int((values > torch.finfo(self.dtype).eps * values[0]).sum()) if float(values[0]) > 0 else 0
        kept = min(kept, len(self._room))
        singular = values[:kept].sqrt()
        weights = vectors[:, :kept].T / singular[:, None]
        of_old = (weights[:, :rank] * self.values).to(self.dtype)
        of_new = weights[:, rank:].to(self.dtype)
        for columns in self._columns():
            mixed = of_new @ stacked(columns)
            mixed.addmm_(of_old, self._room[:rank, columns])
            self._room[:kept, columns] = mixed
        self.values = singular
        self.mean = self.mean + (count / seen) * (mean - self.mean)
        self.count = seen
        if kept and self._drift() > _DRIFT * torch.finfo(self.dtype).eps:
            self._orthonormalise()

    def _columns(self) -> list[slice]:
        step = _COLUMNS.get(self.device.type, _MANY_COLUMNS)
        return [slice(start, min(start + step, self.features)) for start in range(0, self.features, step)]

    def _drift(self) -> float:
        """How far V's rows are from orthonormal, in a few random directions: ‖(V·Vᵀ − I)·w‖ / ‖w‖."""
        generator = torch.Generator().manual_seed(self.count)
        probes = torch.randn(len(self.values), _PROBES, generator=generator).to(self.device, self.dtype)
        back = self.basis @ (self.basis.T @ probes)
        return float(((back - probes).norm(dim=0) / probes.norm(dim=0)).max())

    def _orthonormalise(self) -> None:
        """The same S·V, with rows that are orthonormal again.

        V·Vᵀ = Q·Λ·Qᵀ is almost the identity, so that Λ^(−½)·Qᵀ·V is as orthonormal as rounding allows; S goes with it.
        """
        gram = torch.zeros(len(self.values), len(self.values), dtype=torch.float64, device=self.device)
        for columns in self._columns():
            gram += self.basis[:, columns] @ self.basis[:, columns].T
        values, vectors = torch.linalg.eigh(gram)
        kept = values > 1e-3
        roots, vectors = values[kept].sqrt(), vectors[:, kept]
        _, singular, right = torch.linalg.svd(self.values[:, None] * vectors * roots, full_matrices=False)
        turn = (right @ (vectors / roots).T).to(self.dtype)
        for columns in self._columns():
            self._room[: len(turn), columns] = turn @ self.basis[:, columns]
        self.values = singular


def room_for(components: int, features: int) -> int:
    """The rows that are kept for so many components."""
    return min(features, components + max(16, components // 8))


def new_blocks(components: int, x: Tensor) -> Blocks:
    """An empty state for batches such as ``x``."""
    return Blocks(components, x.shape[1], x.device, work_dtype(x))
