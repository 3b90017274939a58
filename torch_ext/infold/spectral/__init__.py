"""Spectra of real blocks as real numbers, sparse spectra, and tools for phases."""

from infold.spectral.packed import circulant, dense, pack_spectrum, unpack_spectrum
from infold.spectral.phase import (
    Polar,
    free_frequencies,
    layer_frequencies,
    phase_histogram,
    phase_regularizer,
    polar,
    resultant_length,
)
from infold.spectral.plot import plot_phase_histogram, plot_phase_space
from infold.spectral.recorder import PhaseRecorder
from infold.spectral.sparse import by_output_frequency, half_plane, half_plane_size, largest, sparse_dense

__all__ = [
    "PhaseRecorder",
    "Polar",
    "by_output_frequency",
    "circulant",
    "dense",
    "free_frequencies",
    "half_plane",
    "half_plane_size",
    "largest",
    "layer_frequencies",
    "pack_spectrum",
    "phase_histogram",
    "phase_regularizer",
    "plot_phase_histogram",
    "plot_phase_space",
    "polar",
    "resultant_length",
    "sparse_dense",
    "unpack_spectrum",
]
