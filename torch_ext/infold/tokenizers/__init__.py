"""Inputs as a few principal components, and training runs as splines: Spline-PCA."""

from __future__ import annotations

from infold.tokenizers.patches import from_patches, to_patches
from infold.tokenizers.sparse_pca import SparsePCA

__all__: list[str] = ["SparsePCA", "from_patches", "to_patches"]
