"""Exact streaming PCA: the count, sums and scatter matrix of everything seen, which add up (Chan et al., 1982)."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from infold.tokenizers.spectrum import Spectrum, check_batch, flip_signs, require_finite, too_large, work_dtype

#: Bytes minus this are int8, whose products are exact.
_MIDDLE = 128
#: Rows whose int8 products sum to less than 2^31, and those whose sum float32 still holds exactly (2^24).
_INT_ROWS, _EXACT_ROWS = 1 << 16, 1 << 10
#: Rows of floats whose products are summed in float32 before they go into float64, and the least width of a block.
_FLOAT_ROWS, _WIDTH = 1 << 10, 112


@dataclass
class Moments:
    """Sums of x − shift and of its outer products, over ``count`` samples.

    shift, sums: (d), scatter: (d, d), float64. whole: all samples were bytes. Then shift is the middle of their range,
    every sum is an integer that float64 holds exactly (below 10¹¹ samples), and the order in which samples came leaves
    no trace. Otherwise shift is the mean and sums are zero, so that a large mean costs no digits.
    """

    count: int
    shift: Tensor
    sums: Tensor
    scatter: Tensor
    whole: bool
    dtype: torch.dtype

    method = "moments"

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Of a batch (n, d). Raises ValueError for values that are NaN, infinite, or too large to square."""
        features = x.shape[1]
        sums = torch.zeros(features, dtype=torch.float64, device=x.device)
        scatter = torch.zeros(features, features, dtype=torch.float64, device=x.device)
        if x.dtype == torch.uint8:
            _add_bytes(x, sums, scatter)
            return cls(len(x), torch.full_like(sums, _MIDDLE), sums, scatter, True, torch.float32)
        shift = _add_floats(x, sums, scatter)
        moments = cls(len(x), shift, sums, scatter, False, work_dtype(x))
        moments._centre()
        return moments

    @property
    def features(self) -> int:
        return len(self.shift)

    @property
    def device(self) -> torch.device:
        return self.shift.device

    @property
    def mean(self) -> Tensor:
        """(d), float64."""
        return self.shift + self.sums / self.count

    def update(self, x: Tensor) -> None:
        """Adds a batch; an error leaves everything as it was."""
        self.merge(Moments.of(check_batch(x, self.features, self.device)))

    def merge(self, other: Moments) -> None:
        """Adds the samples of ``other``, which stays as it is."""
        if self.whole and other.whole:
            self.sums += other.sums
            self.scatter += other.scatter
        else:
            if self.whole:
                self._centre()
            if other.whole:
                other = other.to(other.device)
                other._centre()
            total = self.count + other.count
            delta = other.shift - self.shift
            self.scatter += other.scatter
            self.scatter.addr_(delta, delta, alpha=self.count * other.count / total)
            self.shift = self.shift + delta * (other.count / total)
        self.count += other.count
        self.dtype = torch.promote_types(self.dtype, other.dtype)

    def spectrum(self, components: int) -> Spectrum:
        """The leading components, of at least two samples."""
        covariance = self.scatter.addr(self.sums, self.sums, alpha=-1 / self.count) / (self.count - 1)
        values, vectors = torch.linalg.eigh(covariance)
        leading = flip_signs(vectors[:, -components:].flip(1).T.contiguous())
        variance = values[-components:].flip(0).clamp(min=0)
        total = covariance.trace()
        return Spectrum(leading.to(self.dtype), self.mean.to(self.dtype), variance, total, self.count)

    def to(self, device: torch.device) -> Moments:
        """A copy on a device."""
        shift, sums, scatter = (tensor.to(device, copy=True) for tensor in (self.shift, self.sums, self.scatter))
        return Moments(self.count, shift, sums, scatter, self.whole, self.dtype)

    def _centre(self) -> None:
        """Makes shift the mean."""
        self.scatter = self.scatter.addr_(self.sums, self.sums, alpha=-1 / self.count)
        self.shift = self.mean
        self.sums = torch.zeros_like(self.sums)
        self.whole = False


def _add_bytes(x: Tensor, sums: Tensor, scatter: Tensor) -> None:
    """Adds the sums of x − 128 and of its outer products, exactly."""
    features = x.shape[1]
    aligned = x.device.type == "cpu" or (features % 8 == 0 and features > 16)
    if aligned and _has_integer_products(x.device):
        for part in torch.split(x, _INT_ROWS):
            # x − 128 is x with its high bit flipped.
            signed = (part ^ _MIDDLE).view(torch.int8)
            if x.device.type != "cpu" and len(signed) % 8:
                signed = torch.nn.functional.pad(signed, (0, 0, 0, -len(signed) % 8))
            scatter += torch._int_mm(signed.t().contiguous(), signed)
            # One row of ones would do; CUDA wants more than 16.
            sums += torch._int_mm(signed.new_ones(24, len(signed)), signed)[0]
        return
    for part in torch.split(x, _EXACT_ROWS):
        shifted = part.float() - _MIDDLE
        sums += shifted.sum(0)
        _add_products(shifted, scatter)
    _mirror(scatter)


@functools.cache
def _has_integer_products(device: torch.device) -> bool:
    """Whether PyTorch multiplies int8 matrices here, and without saturating where sums are largest."""
    extremes = torch.tensor([[-128], [127]], dtype=torch.int8).repeat(16, 64)
    try:
        product = torch._int_mm(extremes.to(device), extremes.t().contiguous().to(device))
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(product.cpu().long(), extremes.long() @ extremes.long().T)


def _add_floats(x: Tensor, sums: Tensor, scatter: Tensor) -> Tensor:
    """Adds the sums of x − shift and of its outer products; the shift (d) is about the mean."""
    dtype = work_dtype(x)
    shift: Tensor = x[:_FLOAT_ROWS].mean(0, dtype=torch.float64).to(dtype)
    for part in torch.split(x, _FLOAT_ROWS):
        shifted = part.to(dtype) - shift
        sums += shifted.sum(0)
        _add_products(shifted, scatter)
    _mirror(scatter)
    if not (sums.isfinite().all() and scatter.diagonal().isfinite().all()):
        require_finite(x)
        raise too_large(x)
    return shift.double()


def _edges(features: int) -> list[int]:
    """Where blocks of columns begin and end: narrower ones skip more of a symmetric product, and multiply slower."""
    blocks = max(1, min(7, features // _WIDTH))
    return [features * block // blocks // 16 * 16 for block in range(blocks)] + [features]


def _add_products(rows: Tensor, scatter: Tensor) -> None:
    """Adds rowsᵀ·rows to the upper triangle of ``scatter``, and to some of the rest."""
    edges = _edges(rows.shape[1])
    for start, end in itertools.pairwise(edges):
        scatter[start:end, start:] += rows[:, start:end].t() @ rows[:, start:]


def _mirror(scatter: Tensor) -> None:
    """Fills what `_add_products` has left out."""
    edges = _edges(len(scatter))
    for start, end in itertools.pairwise(edges):
        scatter[end:, start:end] = scatter[start:end, end:].t()
