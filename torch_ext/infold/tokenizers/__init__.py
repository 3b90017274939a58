"""Inputs as a few principal components, and training runs as splines: Spline-PCA."""

from __future__ import annotations

__all__: list[str] = []
