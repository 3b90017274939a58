"""What PCAs of any kind share: what samples have to be, how they are summed, components' signs."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

#: Parts that columns are cut into: of their products with one another, those below the diagonal are not made.
_PARTS = 7
_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dtype(x: Tensor) -> None:
    """Raises ValueError for what is no tensor, and for a dtype that is neither uint8 nor a real float's."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x: expected a tensor, got {type(x).__module__}.{type(x).__qualname__}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x: expected uint8 or a real float dtype, got {x.dtype}")


def check_rows(x: Tensor, features: int | None = None) -> None:
    """Raises ValueError for samples that are not (samples, features), for none, and as `check_dtype`."""
    check_dtype(x)
    if x.dim() != 2 or not x.numel():
        raise ValueError(f"x: expected shape [samples, features], one or more of each, got {list(x.shape)}")
    if features is not None and x.shape[1] != features:
        raise ValueError(f"x: expected {features} features, as before, got {x.shape[1]}")


def refuse_not_finite(x: Tensor) -> None:
    """Raises ValueError that names the first element of x (samples, ...) that is NaN or infinite; else returns."""
    for start, part in zip(range(0, len(x), 4096), torch.split(x, 4096), strict=False):
        wrong = (~part.isfinite()).nonzero()
        if len(wrong):
            place = wrong[0].tolist()
            value = float(part[tuple(place)])
            raise ValueError(f"x: expected finite numbers, got {value} at {[start + place[0], *place[1:]]}")


def refuse_large_squares(sums: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError where sums of squares of x are not in ``dtype``, which results will have, or x is not finite.

    sums: of any shape, in float64 or as exact as x is.
    """
    if not bool(sums.to(dtype).isfinite().all()):
        refuse_not_finite(x)
        remedy = "" if dtype == torch.float64 else "; pass float64 from the first batch on"
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"x: expected numbers whose squares are in {name}, got larger ones{remedy}")


def combined(count: int, mean: Tensor, more: int, their_mean: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count and mean of two sets of samples, and the row whose outer product their scatters lack to be the joint one.

    That of Chan, Golub and LeVeque (1982), for means of any shape.
    """
    total, shift = count + more, their_mean - mean
    return total, mean + shift * (more / total), shift * math.sqrt(count * more / total)


class _ExactProducts:
    """While one thread or more is inside, float32 products of the process are float32's; then as they were before."""

    _backends: ClassVar = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[str] = []

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                # `torch.get_float32_matmul_precision` raises where a caller has set one backend alone.
                self._before = [backend.fp32_precision for backend in self._backends]
                self._set(["ieee"] * len(self._backends))

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._set(self._before)

    def _set(self, precisions: list[str]) -> None:
        for backend, precision in zip(self._backends, precisions, strict=True):
            backend.fp32_precision = precision


_exact_products = _ExactProducts()


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products as exact as their dtype is, whatever the caller allows (autocast, TF32), and no gradients."""
    with _exact_products, torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def rounded(mean: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A mean in another dtype, and what that leaves: where it is large, not small beside the samples' deviations."""
    near = mean.to(dtype)
    return near, (mean - near.to(mean.dtype)).to(dtype)


def gram(x: Tensor) -> Tensor:
    """xᵀ·x of (rows, columns), the products of the upper block triangle alone."""
    columns = x.shape[1]
    step = -(-columns // _PARTS) if columns >= 128 else max(columns, 1)
    out = x.new_empty(columns, columns)
    for start in range(0, columns, step):
        here = slice(start, start + step)
        product = x[:, here].T @ x[:, start:]
        out[here, start:] = product
        out[start:, here] = product.T
    return out


def with_signs(components: Tensor) -> Tensor:
    """Rows (k, features) with the sign that makes each one's largest entry positive."""
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return components * torch.where(largest < 0, -1.0, 1.0).to(components)
