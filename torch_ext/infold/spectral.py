"""Spectra of real blocks as real numbers, and what block-circulant weights look like in time.

A packed spectrum of a block of ``n`` is its orthonormal real Fourier transform,
``[Re_0, Re_1, ..., Re_{n//2}, Im_1, ..., Im_{(n-1)//2}]``: ``n`` numbers of as many degrees of freedom, those of a pair
of conjugate frequencies scaled by sqrt(2), so that norms are those of the block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_spectrum(blocks: Tensor) -> Tensor:
    """The packed spectra (..., n) of real blocks (..., n), float32 or float64. Differentiable."""
    n = blocks.shape[-1]
    spectrum = torch.fft.rfft(blocks, norm="ortho")
    scale = _scale(n, blocks)
    return torch.cat([spectrum.real * scale, spectrum.imag[..., 1 : (n + 1) // 2] * 2**0.5], -1)


def unpack_spectrum(spectrum: Tensor) -> Tensor:
    """The real blocks (..., n) of packed spectra (..., n): the inverse of `pack_spectrum`. Differentiable."""
    n = spectrum.shape[-1]
    real = spectrum[..., : n // 2 + 1] / _scale(n, spectrum)
    imag = torch.nn.functional.pad(spectrum[..., n // 2 + 1 :] / 2**0.5, (1, 1 - n % 2 if n > 1 else 0))
    blocks: Tensor = torch.fft.irfft(torch.complex(real, imag), n, norm="ortho")
    return blocks


def _scale(n: int, like: Tensor) -> Tensor:
    """sqrt(2) for frequencies that stand for their conjugates too."""
    scale = torch.full((n // 2 + 1,), 2**0.5, dtype=like.dtype, device=like.device)
    scale[0] = 1
    if n % 2 == 0:
        scale[-1] = 1
    return scale


def circulant(weight: Tensor, block: int) -> Tensor:
    """The blocks (P, Q, block) of the block-circulant matrix nearest to ``weight`` (out_features, in_features).

    They are the means over circular diagonals, where a block is cut short over the elements that it has.
    """
    out_features, in_features = weight.shape
    rows, cols = -(-out_features // block), -(-in_features // block)
    pad = (0, cols * block - in_features, 0, rows * block - out_features)
    tiles = torch.nn.functional.pad(weight, pad).view(rows, block, cols, block).transpose(1, 2)
    exist = torch.nn.functional.pad(torch.ones_like(weight), pad).view(rows, block, cols, block).transpose(1, 2)
    index = torch.arange(block, device=weight.device)
    # [m, j]: the row of the element in column j that lies m below the diagonal.
    below = (index[:, None] + index) % block
    sums, counts = (tensor[..., below, index].sum(-1) for tensor in (tiles, exist))
    return sums / counts.clamp(min=1)


def dense(blocks: Tensor, out_features: int, in_features: int) -> Tensor:
    """The (out_features, in_features) matrix of circular convolutions with ``blocks`` (P, Q, n). Differentiable."""
    rows, cols, block = blocks.shape
    index = torch.arange(block, device=blocks.device)
    tiles = blocks[..., (index[:, None] - index) % block]
    return tiles.transpose(1, 2).reshape(rows * block, cols * block)[:out_features, :in_features]


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
