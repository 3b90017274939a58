"""Pictures of phases. They need matplotlib, the optional extra ``plot``, which is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infold.spectral.phase import free_frequencies, layer_frequencies, phase_histogram


def plot_phase_histogram(
    source: Tensor | nn.Module, path: str | Path, *, bins: int = 36, weighted: bool = False, title: str = ""
) -> None:
    """Draws how phases are distributed over the circle, as a PNG (or what ``path`` ends in).

    source: a layer (`layer_frequencies`), packed spectra, or complex numbers. ``bins`` and ``weighted`` are those of
    `phase_histogram`. Raises ImportError without matplotlib.
    """
    counts, edges = phase_histogram(_numbers(source), bins, weighted=weighted)
    drawing = figure(4.5, 4.5)
    axes = drawing.add_subplot(projection="polar")
    share = (counts / counts.sum().clamp(min=torch.finfo(torch.float64).tiny)).numpy(force=True)
    left = edges[:-1].numpy(force=True)
    axes.bar(left, share, width=float(edges[1] - edges[0]), align="edge", edgecolor="white", linewidth=0.5)
    axes.set_title(title or ("share of the energy by phase" if weighted else "share of the frequencies by phase"))
    drawing.savefig(path, dpi=120)


def plot_phase_space(source: Tensor | nn.Module, path: str | Path, *, points: int = 4096, title: str = "") -> None:
    """Draws spectra in the complex plane, each number a point, as a PNG (or what ``path`` ends in).

    source: as for `plot_phase_histogram`. Of more than ``points`` numbers, evenly chosen ones are drawn. Raises
    ImportError without matplotlib, ValueError for fewer than one point.
    """
    if points < 1:
        raise ValueError(f"points: expected a positive integer, got {points}")
    z = _numbers(source).flatten()
    z = z[:: -(-len(z) // points) or 1].cpu()
    drawing = figure(4.5, 4.5)
    axes = drawing.add_subplot()
    axes.scatter(z.real.numpy(), z.imag.numpy(), s=4, alpha=0.5, linewidths=0)
    limit = 1.05 * float(z.abs().max()) if len(z) else 0.0
    limit = limit or 1.0
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), xlabel="real part", ylabel="imaginary part", aspect="equal")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set_title(title or f"{len(z):,} frequencies")
    drawing.savefig(path, dpi=120)


def figure(width: float, height: float) -> Any:
    """A matplotlib figure that no display and no global state knows of."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'infold[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _numbers(source: Tensor | nn.Module) -> Tensor:
    return layer_frequencies(source) if isinstance(source, nn.Module) else free_frequencies(source.detach())
