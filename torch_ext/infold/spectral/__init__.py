"""Spectra of real blocks as real numbers, what block-circulant weights look like in time, and tools for phases."""

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

__all__ = [
    "PhaseRecorder",
    "Polar",
    "circulant",
    "dense",
    "free_frequencies",
    "layer_frequencies",
    "pack_spectrum",
    "phase_histogram",
    "phase_regularizer",
    "plot_phase_histogram",
    "plot_phase_space",
    "polar",
    "resultant_length",
    "unpack_spectrum",
]
