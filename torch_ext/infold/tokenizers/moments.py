"""Count, mean and scatter of samples, in float64: all that an exact PCA needs, from a stream."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from infold._library import ops
from infold.tokenizers._files import take
from infold.tokenizers.rows import combined, gram, refuse_large_squares

#: Rows whose int8 squares sum to less than 2³¹.
_INTEGER_ROWS = (2**31 - 1) // 128**2
#: Rows whose int8 squares sum to no more than float32 counts to without gaps.
_FLOAT_ROWS = 2**24 // 128**2
#: Rows that a GPU sums in their own dtype before they are in float64, and that the CPU has a copy of at a time.
_ROWS, _COPIED_ROWS = 4096, 16384
#: With fewer samples than features by this factor, an SVD of them is the quicker way: 6 to 100 times at 3,072 features.
_FEW = 4


class Moments:
    """Streams samples of d features into (d) and (d, d) float64.

    uint8 is summed in integers, exactly; float16, bfloat16 and float32 in float32, 1,024 rows at a time (4,096 on a
    GPU), about the mean of the batch's first rows. Few samples are kept instead of their scatter, until there are more.
    """

    name = "moments"

    def __init__(self, features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.count = 0
        #: That of results: batches whose squares are not in it are refused.
        self.dtype = dtype
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self._scatter = torch.empty(0, 0, dtype=torch.float64, device=device)
        #: (rows, d) whose products are the scatter, which does not exist as long as these do.
        self._few: Tensor | None = torch.zeros(0, features, dtype=torch.float64, device=device)

    @property
    def scatter(self) -> Tensor:
        """(d, d)."""
        if self._few is not None:
            self._scatter, self._few = self._few.T @ self._few, None
        return self._scatter

    def update(self, x: Tensor) -> None:
        """Adds samples (rows, d). Raises ValueError as `refuse_large_squares`; nothing is added then."""
        if self._few is not None and (self.count + len(x)) * _FEW <= x.shape[1]:
            samples = x.double()
            count, mean, _ = combined(self.count, self.mean, len(x), samples.mean(0))
            few = torch.cat([self._few + (self.mean - mean), samples - mean])
            refuse_large_squares(few.square().sum(0), x, self.dtype)
            self.count, self.mean, self._few = count, mean, few
            return
        # Each part is added whole; a bad one must leave nothing of its batch.
        if x.dtype == torch.uint8:
            parts = [_of_bytes(part) for part in torch.split(x, _INTEGER_ROWS)]
        else:
            parts = [_of_floats(x, self.dtype)]
        for count, mean, scatter in parts:
            self._add(count, mean, scatter)

    def merge(self, other: Moments) -> None:
        """Adds another's samples: the same as one stream of both, but for the last rounding."""
        self._add(other.count, other.mean.to(self.mean), other.scatter.to(self.scatter))

    def spectrum(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Components (count, d), their sums of squares (count), falling, and the sum over all components."""
        if self._few is not None:
            _, values, components = torch.linalg.svd(self._few, full_matrices=False)
            return components[:count], values[:count].square(), self._few.square().sum()
        squares, vectors = torch.linalg.eigh(self.scatter)
        top = slice(-count, None)
        return vectors[:, top].T.flip(0), squares[top].flip(0).clamp(min=0), self.scatter.trace()

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "scatter": self.scatter}

    def to(self, device: torch.device) -> None:
        """Moves what is kept, in place."""
        self.mean, self._scatter = self.mean.to(device), self._scatter.to(device)
        self._few = None if self._few is None else self._few.to(device)

    @classmethod
    def of(cls, count: int, dtype: torch.dtype, tensors: Mapping[str, Tensor], path: Path) -> Moments:
        """The inverse of `tensors`."""
        features = len(tensors.get("mean", torch.empty(0)))
        state = cls(0, dtype, torch.device("cpu"))
        state.count = count
        state.mean = take(tensors, "mean", torch.float64, (features,), path)
        state._scatter, state._few = take(tensors, "scatter", torch.float64, (features, features), path), None
        return state

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        joint = self.scatter
        self.count, self.mean, step = combined(self.count, self.mean, count, mean)
        joint += scatter
        joint.addr_(step, step)


Part = tuple[int, Tensor, Tensor]


def _of_bytes(x: Tensor) -> Part:
    """The moments of uint8 samples; every integer in them is exact."""
    centred = (x ^ 128).view(torch.int8)
    rows, features = x.shape
    # A result of one number is wrong on the CPU; cuBLAS wants more than 16, in eights.
    takes = features > 1 if x.is_cpu else features > 16 and features % 8 == 0
    if takes and _multiplies_integers(x.device):
        if x.is_cpu:
            left, right, ones = centred.T, centred, centred.new_ones(rows, 32)
        else:
            # cuBLAS has products of int8 for a matrix and a transposed one alone. Rows of zeros add nothing.
            left = centred.new_zeros(features, rows + -rows % 16)
            left[:, :rows] = centred.T
            right, ones = left.T, left.new_ones(32, left.shape[1]).T
        product = torch._int_mm(left, right).double()
        # Sums by the same product are fifty times as quick as `sum`.
        sums = torch._int_mm(left, ones)[:, 0].double()
    else:
        product = torch.zeros(features, features, dtype=torch.float64, device=x.device)
        for part in torch.split(centred, _FLOAT_ROWS):
            product += gram(part.float())
        sums = centred.sum(0, dtype=torch.int64).double()
    return rows, sums / rows + 128, product - torch.outer(sums, sums / rows)


@functools.cache
def _multiplies_integers(device: torch.device) -> bool:
    """Whether PyTorch's product of int8 is there, and exact: instructions of older processors saturate."""
    extremes = torch.tensor([[-128], [127]], dtype=torch.int8).repeat(16, 64)
    try:
        other = extremes.T.contiguous() if device.type == "cpu" else extremes.to(device).T
        product = torch._int_mm(extremes.to(device), other)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(product.cpu().long(), extremes.long() @ extremes.T.long())


def _of_floats(x: Tensor, results: torch.dtype) -> Part:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # About numbers near the mean that need no rounding; what is left of the mean is taken off after.
    shift = x[:_ROWS].mean(0, dtype=torch.float64).to(dtype)
    scatter = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    rest = scatter.new_zeros(x.shape[1])
    for part in torch.split(x, _COPIED_ROWS if x.is_cpu else _ROWS):
        products, sums = _scatter(part.to(dtype), shift)
        scatter += products
        rest += sums
    # float32 samples are summed in float32, whatever results will be.
    refuse_large_squares(scatter.diagonal(), x, results if dtype == torch.float64 else torch.float32)
    return len(x), shift.double() + rest / len(x), scatter - torch.outer(rest, rest / len(x))


def _scatter(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (xᵢ − shift)·(xᵢ − shift)ᵀ and Σ (xᵢ − shift) of rows, summed in their dtype and perhaps beyond."""
    if x.is_cpu:
        return ops.pca_scatter(x, shift)  # type: ignore[no-any-return]
    centred = x - shift
    # A product with ones: `sum` over rows is much slower.
    return gram(centred), centred.new_ones(len(centred)) @ centred
