"""Inputs as a few principal components, and training runs as splines: Spline-PCA."""

from __future__ import annotations

from infold.tokenizers.patches import from_patches, to_patches

__all__: list[str] = ["from_patches", "to_patches"]
