"""Images, sequences and volumes as non-overlapping patches, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def to_patches(x: Tensor, size: int | Sequence[int]) -> Tensor:
    """Patches of x (batch, channels, *spatial), 1 to 3 spatial dimensions → (batch, patches, channels · prod(size)).

    size: the edge of a patch, or one for each spatial dimension. Patches come in row-major order; a patch's values are
    ordered as (channels, *size). The dtype is kept. Raises ValueError where the sizes do not divide.
    """
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"x: expected (batch, channels, 1 to 3 spatial dimensions), got {list(x.shape)}")
    batch, channels, *spatial = x.shape
    edges = _edges(size, spatial)
    counts = [n // edge for n, edge in zip(spatial, edges, strict=True)]
    pairs = [n for pair in zip(counts, edges, strict=True) for n in pair]
    d = len(spatial)
    order = [0, *range(2, 2 + 2 * d, 2), 1, *range(3, 3 + 2 * d, 2)]
    cut = x.reshape(batch, channels, *pairs).permute(order)
    return cut.reshape(batch, math.prod(counts), channels * math.prod(edges))


def from_patches(patches: Tensor, channels: int, image_size: int | Sequence[int], size: int | Sequence[int]) -> Tensor:
    """The inverse of `to_patches`: (batch, patches, channels · prod(size)) → (batch, channels, *image_size).

    An int for image_size is a square when size is an int too; otherwise both have one entry per spatial dimension, or
    size is one edge for all. Raises ValueError where the sizes do not divide or do not give the shape of patches.
    """
    if isinstance(image_size, int):
        image_size = (image_size,) * (2 if isinstance(size, int) else len(size))
    spatial = list(image_size)
    if not 1 <= len(spatial) <= 3:
        raise ValueError(f"image_size: expected 1 to 3 sizes, got {spatial}")
    edges = _edges(size, spatial)
    counts = [n // edge for n, edge in zip(spatial, edges, strict=True)]
    expected = [math.prod(counts), channels * math.prod(edges)]
    if patches.ndim != 3 or list(patches.shape[1:]) != expected:
        raise ValueError(f"patches: expected (batch, {expected[0]}, {expected[1]}), got {list(patches.shape)}")
    d = len(spatial)
    order = [0, 1 + d, *(axis for i in range(d) for axis in (1 + i, 2 + d + i))]
    whole = patches.reshape(len(patches), *counts, channels, *edges).permute(order)
    return whole.reshape(len(patches), channels, *spatial)


def _edges(size: int | Sequence[int], spatial: Sequence[int]) -> list[int]:
    edges = [size] * len(spatial) if isinstance(size, int) else list(size)
    if len(edges) != len(spatial) or any(edge < 1 or n % edge for n, edge in zip(spatial, edges, strict=True)):
        raise ValueError(f"size: expected {len(spatial)} sizes that divide {list(spatial)}, got {edges}")
    return edges
