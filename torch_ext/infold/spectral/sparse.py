"""Sparse two-dimensional spectra of real matrices: which frequencies stand for all, the largest ones, the matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def half_plane(out_features: int, in_features: int, chosen: Tensor | None = None) -> Tensor:
    """Indices (2, K) int64 of frequencies (u, v), of two conjugates the one that stands for both: 0 <= v <= N/2, and
    u <= M/2 where v is 0 or N/2, for a real M = ``out_features`` by N = ``in_features`` matrix.

    All of them by v, then u; or those whose places in that order are ``chosen``.
    """
    edge = out_features // 2 + 1
    inner = (in_features - 1) // 2 * out_features
    if chosen is None:
        chosen = torch.arange(half_plane_size(out_features, in_features))
    inside, after = chosen - edge, chosen - edge - inner
    u = torch.where(inside < 0, chosen, torch.where(after < 0, inside % out_features, after))
    v = torch.where(inside < 0, 0, torch.where(after < 0, 1 + inside // out_features, in_features // 2))
    return torch.stack([u, v])


def half_plane_size(out_features: int, in_features: int) -> int:
    """How many indices `half_plane` has."""
    edges = 2 if in_features % 2 == 0 else 1
    return edges * (out_features // 2 + 1) + (in_features - 1) // 2 * out_features


def by_output_frequency(indices: Tensor, out_features: int) -> Tensor:
    """The order (K,) of half-plane indices in which the product reads them: by min(u, M - u), then u, then v."""
    u, v = indices.long()
    width = int(v.max()) + 1 if v.numel() else 1
    key = (torch.minimum(u, out_features - u) * 2 + (2 * u > out_features)) * width + v
    return torch.argsort(key, stable=True)


def largest(weight: Tensor, degrees: int) -> tuple[Tensor, Tensor]:
    """The sparse spectrum of ``degrees`` real numbers whose matrix is nearest to ``weight`` (M, N), by the Frobenius
    norm.

    Returns coefficients c (K, 2) float32 or float64 and their half-plane indices (2, K): the nearest matrix is
    sum(Re(c exp(2 pi i (u i / M - v j / N)))). A coefficient counts two degrees, for its conjugate too; one that is its
    own conjugate, which is real, counts one.
    """
    weight = weight if weight.dtype == torch.float64 else weight.float()
    rows, cols = weight.shape
    # Of exp(-2 pi i v j / N), while an inverse transform has the conjugate: [u] is the conjugate at -u.
    spectrum = torch.fft.rfft2(weight, norm="forward").flip(0).roll(1, 0).conj().resolve_conj()
    energy = spectrum.abs().square()
    edges = torch.tensor([0] if cols % 2 else [0, cols // 2], device=weight.device)
    energy[rows // 2 + 1 :, edges] = -1
    poles = torch.tensor([0] if rows % 2 else [0, rows // 2], device=weight.device)
    own = (poles[:, None] * energy.shape[1] + edges).flatten()
    energy = energy.flatten()
    alone = energy[own].sort(descending=True, stable=True)
    energy[own] = -1
    pairs = energy.topk(min(degrees // 2, (rows * cols - len(own)) // 2))
    # Those of one degree and those of two: the best of the few ways to share.
    sums = torch.cat([pairs.values.new_zeros(1, dtype=torch.float64), 2 * pairs.values.double().cumsum(0)])
    best = max(
        (float(alone.values[:lone].double().sum() + sums[paired]), lone, paired)
        for lone in range(min(len(own), degrees) + 1)
        for paired in [min((degrees - lone) // 2, len(pairs.values))]
    )
    _, lone, paired = best
    places = torch.cat([own[alone.indices[:lone]], pairs.indices[:paired]])
    weights = torch.cat([weight.new_ones(lone), weight.new_full((paired,), 2)])
    width = spectrum.shape[1]
    coefficients = torch.view_as_real(spectrum.flatten()[places]) * weights[:, None]
    indices = torch.stack([places // width, places % width])
    order = by_output_frequency(indices, rows)
    return coefficients[order], indices[:, order]


def sparse_dense(coefficients: Tensor, indices: Tensor, out_features: int, in_features: int) -> Tensor:
    """The (out_features, in_features) matrix of a sparse spectrum: see `largest`. Differentiable."""
    u, v = indices.long()
    # The inverse transform's exponent is positive in both.
    places = u * in_features + (in_features - v) % in_features
    full = torch.zeros(out_features * in_features, 2, dtype=coefficients.dtype, device=coefficients.device)
    spectrum = torch.view_as_complex(full.index_add(0, places, coefficients))
    return torch.real(torch.fft.ifft2(spectrum.view(out_features, in_features), norm="forward"))
