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
