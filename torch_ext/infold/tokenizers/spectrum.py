"""What every fit of PCA shares: the checks of a batch, products at full precision, and the components that come out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Numbers that are converted at a time: a few of these fit in a cache, and fill a GPU.
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}


class Spectrum(NamedTuple):
    """Leading principal components, by falling variance.

    components: (k, d), orthonormal rows, and mean: (d), both float32, or float64 for data in float64.
    variance: (k) and total: (), float64, of n − 1 degrees of freedom; total is that of all features.
    """

    components: Tensor
    mean: Tensor
    variance: Tensor
    total: Tensor
    samples: int


def check_batch(x: object, features: int | None = None, device: torch.device | None = None) -> Tensor:
    """A batch (samples, features) as it must be, without its history of gradients.

    features, device: those of earlier batches, if there were any. Raises ValueError for anything else; values are not
    looked at.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"x: expected a tensor of shape (samples, features), got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x: expected a float or uint8 tensor, got {x.dtype}")
    if x.layout != torch.strided or x.dim() != 2:
        raise ValueError(f"x: expected a dense shape (samples, features), got {tuple(x.shape)} of {x.layout}")
    if not x.numel():
        raise ValueError(f"x: expected at least one sample and one feature, got shape {tuple(x.shape)}")
    if features is not None and x.shape[1] != features:
        raise ValueError(f"x: expected {features} features, as in earlier batches, got {x.shape[1]}")
    if device is not None and x.device != device:
        raise ValueError(f"x: expected a tensor on {device}, as earlier batches, got one on {x.device}")
    return x.detach()


def require_finite(x: Tensor) -> None:
    """Raises ValueError, which says where, for a batch with a value that is NaN or infinite."""
    if not x.is_floating_point():
        return
    first = 0
    for part in torch.split(x, chunk_rows(x)):
        # A sum says it without a mask; in float64, that of finite halves and floats stays finite.
        if not part.sum(dtype=torch.float64).isfinite():
            bad = part.isfinite().logical_not().nonzero()
            if len(bad):
                row, column = bad[0].tolist()
                value = float(part[row, column])
                raise ValueError(f"x: expected finite values, got {value} at row {first + row}, column {column}")
        first += len(part)


def largest(x: Tensor) -> float:
    """The largest magnitude of a tensor."""
    low, high = x.aminmax()
    return max(-float(low), float(high))


def too_large(x: Tensor) -> ValueError:
    """The error for values that are finite, but whose sums of squares are not."""
    return ValueError(f"x: expected values whose sums of squares {work_dtype(x)} holds, got up to {largest(x):g}")


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a batch is computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunk_rows(x: Tensor) -> int:
    """Rows of a batch to convert at a time."""
    return max(64, _CHUNK.get(x.device.type, 1 << 20) // x.shape[1])


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products as precise as their dtype, whatever the caller has allowed (autocast, TF32, bfloat16), and no gradients."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def flip_signs(components: Tensor) -> Tensor:
    """Makes the largest entry of each row positive, in place: a component's sign is arbitrary."""
    for rows in torch.split(components, 64):
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        rows *= torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)
    return components


def complete(rows: Tensor, count: int) -> Tensor:
    """Orthonormal rows, to which others orthogonal to them are added until there are ``count``."""
    missing = count - len(rows)
    if missing <= 0:
        return rows[:count]
    generator = torch.Generator().manual_seed(0)
    extra = torch.randn(missing, rows.shape[1], generator=generator, dtype=torch.float64).to(rows.device)
    known = rows.double()
    # Twice: once leaves what rounding keeps of a direction that is almost among the rows.
    for _ in range(2):
        extra = extra - (extra @ known.T) @ known
        extra = torch.linalg.qr(extra.T).Q.T
    return torch.cat([rows, extra.to(rows.dtype)])
