"""Amplitudes and phases of spectra, a penalty on phases, and what describes their distribution.

A block's DC and, where its size is even, its Nyquist frequency are real: they have no phase but a sign. The others are
the *free* frequencies, and what is said of phases here is said of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from infold.spectral.packed import circulant, pack_spectrum


class Polar(NamedTuple):
    """Amplitudes, and phases in radians from -π to π, of one shape."""

    amplitude: Tensor
    phase: Tensor


def polar(spectrum: Tensor) -> Polar:
    """Amplitudes and phases of packed spectra (..., n), both (..., n//2 + 1); or of complex numbers, in their shape.

    A block's amplitudes have the norm of the block: those of free frequencies hold the sqrt(2) of the packed form.
    Phases are those of `torch.fft.rfft`. The dtype is float32 or float64. Differentiable; at amplitude 0, where neither
    has a derivative and the phase is 0, the gradient is 0.
    """
    if not spectrum.is_complex():
        n = _block(spectrum)
        real = spectrum[..., : n // 2 + 1]
        imag = torch.nn.functional.pad(spectrum[..., n // 2 + 1 :], (1, 1 - n % 2 if n > 1 else 0))
        spectrum = _complex(real, imag)
    return Polar(spectrum.abs(), spectrum.angle())


def free_frequencies(spectrum: Tensor) -> Tensor:
    """The complex numbers (..., (n-1)//2) of packed spectra (..., n) at their free frequencies. Differentiable.

    A complex tensor is returned as it is: of a half-spectrum, pass ``half[..., 1 : (n + 1) // 2]``.
    """
    if spectrum.is_complex():
        return spectrum
    n = _block(spectrum)
    return _complex(spectrum[..., 1 : (n + 1) // 2], spectrum[..., n // 2 + 1 :])


@torch.no_grad()
def layer_frequencies(layer: nn.Module, block: int | None = None) -> Tensor:
    """The complex numbers (count,) that a layer's weight has at its free frequencies.

    They are those of a `infold.nn.FrequencyLinear`'s blocks. For any layer with a matrix as its ``weight``
    (`torch.nn.Linear`, packed layers), they are those of its orthonormal 2-D transform, one of each conjugate pair; or,
    if ``block`` is given, of the nearest block-circulant matrix. Raises ValueError for other layers and for a block
    that is not positive.
    """
    packed_spectrum = getattr(layer, "packed_spectrum", None)
    if callable(packed_spectrum):
        return free_frequencies(cast(Callable[[], Tensor], packed_spectrum)()).flatten()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"layer: expected a packed spectrum or a matrix as its weight, got a {type(layer).__name__}")
    weight = weight if weight.dtype == torch.float64 else weight.float()
    if block is not None:
        if block < 1:
            raise ValueError(f"block: expected a positive integer, got {block}")
        return free_frequencies(pack_spectrum(circulant(weight, block))).flatten()
    rows, cols = weight.shape
    half = torch.fft.rfft2(weight, norm="ortho")
    # Columns that are their own conjugates hold each pair of rows twice.
    own = half[1 : (rows + 1) // 2, [0] if cols % 2 else [0, cols // 2]]
    # sqrt(2) for the conjugates that are left out, as in packed spectra.
    return torch.cat([half[:, 1 : (cols + 1) // 2].flatten(), own.flatten()]) * 2**0.5


def phase_regularizer(
    spectrum: Tensor, harmonic: int = 4, target: float | Tensor = 0.0, *, weighted: bool = True, eps: float = 1e-3
) -> Tensor:
    """A penalty of 0 to 1, a scalar, on phases θ that are far from ``target`` + 2πj / ``harmonic``, j an integer:

        mean of ½·(1 - cos(harmonic·(θ - target)))

    Uniformly distributed phases give ½. With harmonic 4, phases and differences of phases are pulled to same,
    unrelated and opposite (0, ±90 and 180 degrees); with 1, to the target alone.

    spectrum: packed spectra (..., n), of which free frequencies count, or complex numbers (...).
    target: radians; a tensor is broadcast against the free frequencies, (..., (n-1)//2), or the complex numbers.
    weighted: the mean is weighted with squared amplitudes, so that what is penalised is a share of the energy, and 0 if
        there is none. Otherwise all free frequencies count alike, and a number of amplitude 0 as ½.
    eps: an amplitude below which a phase counts less. It makes the penalty smooth where phases are not, at 0:
        e^(iθ) is z / sqrt(|z|² + eps²). Gradients are at most about harmonic / eps before the mean.

    Differentiable any number of times, by amplitudes too. Raises ValueError for a harmonic below 1 and an eps that is
    not positive.
    """
    if harmonic < 1:
        raise ValueError(f"harmonic: expected a positive integer, got {harmonic}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    z = free_frequencies(spectrum)
    energy = z.real.square() + z.imag.square()
    # A product, for the derivative of a power is NaN at 0.
    unit = z * (energy + eps**2).rsqrt()
    turned = unit
    for _ in range(harmonic - 1):
        turned = turned * unit
    angle = harmonic * torch.as_tensor(target, dtype=energy.dtype, device=energy.device)
    penalty = (1 - (turned.real * angle.cos() + turned.imag * angle.sin())) / 2
    if weighted:
        return (energy * penalty).sum() / (energy.expand_as(penalty).sum() + eps**2)
    return penalty.sum() / max(penalty.numel(), 1)


@torch.no_grad()
def phase_histogram(spectrum: Tensor, bins: int = 36, *, weighted: bool = False) -> tuple[Tensor, Tensor]:
    """How many free frequencies have a phase in each of ``bins`` equal parts of -π to π.

    Takes what `phase_regularizer` takes; returns counts (bins,), float64, and edges (bins + 1,) in radians. A number of
    amplitude 0 has no phase and is not counted. ``weighted`` adds squared amplitudes up instead. Raises ValueError for
    fewer than one bin.
    """
    if bins < 1:
        raise ValueError(f"bins: expected a positive integer, got {bins}")
    z = _with_phase(spectrum)
    index = ((z.angle() + math.pi) * (bins / math.tau)).long().clamp(0, bins - 1)
    weights = z.abs().square() if weighted else torch.ones(len(z), dtype=torch.float64, device=z.device)
    counts = torch.zeros(bins, dtype=torch.float64, device=z.device).index_add_(0, index, weights)
    return counts, torch.linspace(-math.pi, math.pi, bins + 1, dtype=torch.float64, device=z.device)


@torch.no_grad()
def resultant_length(spectrum: Tensor, harmonic: int = 1, *, weighted: bool = False) -> float:
    """|mean of e^(i·harmonic·θ)| over free frequencies, from 0 to 1: how far phases agree on multiples of
    2π / ``harmonic``, wherever the first lies.

    Takes what `phase_regularizer` takes. N uniform phases give about 1 / sqrt(N), and exceed sqrt(3 / N) in one case of
    twenty (Rayleigh's test). NaN if no number has an amplitude. Raises ValueError for a harmonic below 1.
    """
    if harmonic < 1:
        raise ValueError(f"harmonic: expected a positive integer, got {harmonic}")
    z = _with_phase(spectrum)
    turned = torch.polar(torch.ones_like(z.real), harmonic * z.angle())
    weights = z.abs().square() if weighted else torch.ones_like(z.real)
    return float((weights * turned).sum().abs() / weights.sum())


def _with_phase(spectrum: Tensor) -> Tensor:
    """The numbers that have a phase, in complex128."""
    z = free_frequencies(spectrum.detach()).flatten().to(torch.complex128)
    return z[z != 0]


def _block(spectrum: Tensor) -> int:
    if spectrum.ndim < 1 or not spectrum.shape[-1] or not spectrum.is_floating_point():
        shape = tuple(spectrum.shape)
        raise ValueError(f"spectrum: expected (..., n) real or complex numbers, got {spectrum.dtype} {shape}")
    return spectrum.shape[-1]


def _complex(real: Tensor, imag: Tensor) -> Tensor:
    dtype = torch.float64 if real.dtype == torch.float64 else torch.float32
    return torch.complex(real.to(dtype), imag.to(dtype))
