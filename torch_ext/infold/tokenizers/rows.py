"""What PCAs of any kind share: what samples have to be, how they are summed, components' signs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_rows(x: Tensor, features: int | None = None) -> Tensor:
    """Samples (samples, features) as they are. Raises ValueError for another shape or dtype, and for no samples."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"x: expected uint8 or a real float dtype, got {x.dtype}")
    if x.dim() != 2 or not x.numel():
        raise ValueError(f"x: expected shape [samples, features], one or more of each, got {list(x.shape)}")
    if features is not None and x.shape[1] != features:
        raise ValueError(f"x: expected {features} features, as before, got {x.shape[1]}")
    return x.detach()


def refuse_not_finite(x: Tensor) -> None:
    """Raises ValueError that names the first element that is NaN or infinite; returns if there is none."""
    for start, part in zip(range(0, len(x), 4096), torch.split(x, 4096), strict=True):
        wrong = (~part.isfinite()).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            raise ValueError(f"x: expected finite numbers, got {float(part[row, column])} at [{start + row}, {column}]")


def combined(count: int, mean: Tensor, more: int, their_mean: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count and mean of two sets of samples, and the row whose outer product their scatters lack to be the joint one.

    That of Chan, Golub and LeVeque (1982), for means of any shape.
    """
    total, shift = count + more, their_mean - mean
    return total, mean + shift * (more / total), shift * math.sqrt(count * more / total)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products as exact as their dtype is, whatever the caller allows (autocast, TF32), and no gradients."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def with_signs(components: Tensor) -> Tensor:
    """Rows (k, features) with the sign that makes each one's largest entry positive."""
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return components * torch.where(largest < 0, -1.0, 1.0).to(components)
