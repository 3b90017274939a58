"""MNIST as every stage sees it, and its PCA, fitted once."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mnist

#: The largest tokenizer; smaller ones are its first components.
MOST = 128
COMPONENTS = (16, 32, 64, MOST)
SUBSET = mnist.SUBSET


class Part(NamedTuple):
    """Inputs (count, features) or (count, 1, 28, 28), float32, and labels (count)."""

    x: Tensor
    y: Tensor


class PCA:
    """The first components by the exact eigendecomposition of the covariance."""

    def __init__(self, n_components: int) -> None:
        self.n_components = n_components

    def fit(self, x: Tensor) -> PCA:
        self.mean_ = x.mean(0)
        centred = (x - self.mean_).double()
        values, vectors = torch.linalg.eigh(centred.T @ centred / (len(x) - 1))
        self.explained_variance_ = values.flip(0)[: self.n_components]
        self.explained_variance_ratio_ = self.explained_variance_ / values.sum()
        self.components_ = vectors.flip(1)[:, : self.n_components].T.float().contiguous()
        return self

    def transform(self, x: Tensor) -> Tensor:
        return (x - self.mean_) @ self.components_.T


@dataclass(frozen=True)
class Mnist:
    """MNIST in three parts: the last twelfth of the training images (5,000 of 60,000) is for validation."""

    folder: Path

    @cached_property
    def images(self) -> dict[str, Part]:
        """Standardised pixels (count, 784) by part."""
        train, test = mnist.load(self.folder, "train"), mnist.load(self.folder, "test")
        held = len(train.labels) // 12
        return {
            "train": Part(train.images[:-held], train.labels[:-held]),
            "validation": Part(train.images[-held:], train.labels[-held:]),
            "test": Part(test.images, test.labels),
        }

    @cached_property
    def pca(self) -> PCA:
        """Of the training part's images, `MOST` components."""
        return PCA(MOST).fit(self.images["train"].x)

    def tokens(self, k: int) -> dict[str, Part]:
        """The first k components (count, k) by part, divided by one number: the root of their mean variance."""
        scale = self.pca.explained_variance_[:k].mean().sqrt().float()
        return {name: Part(self.pca.transform(x)[:, :k] / scale, y) for name, (x, y) in self.images.items()}

    def rebuilt(self, k: int) -> dict[str, Part]:
        """Images of which only the first k components are left, (count, 784)."""
        basis = self.pca.components_[:k]
        return {
            name: Part(self.pca.transform(x)[:, :k] @ basis + self.pca.mean_, y) for name, (x, y) in self.images.items()
        }


def as_images(parts: dict[str, Part]) -> dict[str, Part]:
    """(count, 784) as (count, 1, 28, 28)."""
    return {name: Part(x.view(-1, 1, 28, 28), y) for name, (x, y) in parts.items()}
