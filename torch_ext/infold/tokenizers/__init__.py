"""Inputs as a few principal components, and training runs as splines: Spline-PCA."""

from __future__ import annotations

from infold.tokenizers.modules import BANDS, PCATokenizer, SplinePCATokenizer
from infold.tokenizers.monotone import MonotoneSpline
from infold.tokenizers.patches import from_patches, to_patches
from infold.tokenizers.pca import PCA
from infold.tokenizers.separable_pca import SeparablePCA
from infold.tokenizers.sparse_pca import SparsePCA
from infold.tokenizers.splines import BSpline, FitError, clamped_knots, fit_bspline
from infold.tokenizers.trajectories import TrajectoryRecorder
from infold.tokenizers.trajectory_report import Trajectory

__all__ = [
    "BANDS",
    "PCA",
    "BSpline",
    "FitError",
    "MonotoneSpline",
    "PCATokenizer",
    "SeparablePCA",
    "SparsePCA",
    "SplinePCATokenizer",
    "Trajectory",
    "TrajectoryRecorder",
    "clamped_knots",
    "fit_bspline",
    "from_patches",
    "to_patches",
]
