"""PCA of all samples at once: exact, and randomized (Halko et al., 2011)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from infold.tokenizers.spectrum import Spectrum, chunk_rows, flip_signs, require_finite, too_large, work_dtype

#: Directions beyond the components, and multiplications by the scatter matrix.
_OVERSAMPLING, _POWERS = 16, 5


def exact(x: Tensor, components: int) -> Spectrum:
    """From the singular values of the centred samples, in float64; a copy of them is made."""
    require_finite(x)
    mean = x.mean(0, dtype=torch.float64)
    centred = x.double() - mean
    total = centred.square().sum() / (len(x) - 1)
    if not total.isfinite():
        raise too_large(x)
    if len(x) > x.shape[1]:
        # R has the same singular values and right vectors.
        centred = torch.linalg.qr(centred, mode="r").R
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    leading = flip_signs(right[:components].contiguous())
    variance = values[:components].square() / (len(x) - 1)
    dtype = work_dtype(x)
    return Spectrum(leading.to(dtype), mean.to(dtype), variance, total, len(x))


def randomized(x: Tensor, components: int, seed: int) -> Spectrum:
    """Subspace iteration from random directions; rows are centred some at a time, so no copy of the data is made.

    Variances are those along the components found: at most the true ones.
    """
    require_finite(x)
    features, dtype = x.shape[1], work_dtype(x)
    mean = x.mean(0, dtype=torch.float64)
    high = mean.to(dtype)
    low = (mean - high).to(dtype)

    def parts() -> Iterator[Tensor]:
        for part in torch.split(x, chunk_rows(x)):
            yield (part.to(dtype) - high).sub_(low)

    width = min(components + _OVERSAMPLING, features, len(x))
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(features, width, generator=generator, dtype=torch.float64)).Q
    directions = directions.to(x.device)
    for _ in range(_POWERS):
        now, product = directions.to(dtype), torch.zeros_like(directions)
        for part in parts():
            product += part.T @ (part @ now)
        directions = torch.linalg.qr(product).Q
    now, total = directions.to(dtype), mean.new_zeros(())
    gram = mean.new_zeros(width, width)
    for part in parts():
        seen = (part @ now).double()
        gram += seen.T @ seen
        total += part.square().sum(dtype=torch.float64)
    if not (total.isfinite() and gram.isfinite().all()):
        raise too_large(x)
    values, vectors = torch.linalg.eigh(gram)
    leading = (directions @ vectors[:, -components:].flip(1)).T.contiguous()
    variance = values[-components:].flip(0).clamp(min=0) / (len(x) - 1)
    return Spectrum(flip_signs(leading).to(dtype), mean.to(dtype), variance, total / (len(x) - 1), len(x))
