"""MNIST as every stage sees it, and its tokenizers, each fitted once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from infold.tokenizers import PCA, PCATokenizer, SplinePCATokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mnist

#: The largest tokenizer; smaller ones are its first components.
MOST = 128
COMPONENTS = (16, 32, 64, MOST)
KNOTS = 8
CHUNK = 4096
SUBSET = mnist.SUBSET


class Part(NamedTuple):
    """Inputs (count, features) or (count, 1, 28, 28), float32, and labels (count)."""

    x: Tensor
    y: Tensor


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

    @cached_property
    def _made(self) -> dict[str, object]:
        return {}

    def _once(self, name: str, make: Callable[[], object]) -> object:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def tokenizer(self, name: str) -> PCATokenizer:
        """``pca-k``; ``spline-k``, as `SplinePCATokenizer.fit` makes it."""
        kind, k, x = *name.split("-"), self.images["train"].x
        fits: dict[str, Callable[[], PCATokenizer]] = {
            "pca": lambda: PCATokenizer.fit(x, int(k)),
            "spline": lambda: SplinePCATokenizer.fit(x, int(k), knots=KNOTS),
        }
        found = self._once(name, fits[kind])
        assert isinstance(found, PCATokenizer)
        return found

    def tokens(self, name: str) -> dict[str, Part]:
        """A tokenizer's tokens (count, k) by part, divided by one number: their root mean square in training."""

        def make() -> dict[str, Part]:
            tokenizer = self.tokenizer(name)
            found = {
                part: Part(torch.cat([tokenizer(chunk) for chunk in x.split(CHUNK)]), y)
                for part, (x, y) in self.images.items()
            }
            scale = found["train"].x.square().mean().sqrt()
            return {part: Part(x / scale, y) for part, (x, y) in found.items()}

        found = self._once(f"tokens of {name}", make)
        assert isinstance(found, dict)
        return found

    def rebuilt(self, k: int) -> dict[str, Part]:
        """Images of which only the first k components are left, (count, 784)."""
        tokenizer = self.tokenizer(f"pca-{k}")
        return {part: Part(tokenizer.inverse(tokenizer(x)), y) for part, (x, y) in self.images.items()}


def as_images(parts: dict[str, Part]) -> dict[str, Part]:
    """(count, 784) as (count, 1, 28, 28)."""
    return {name: Part(x.view(-1, 1, 28, 28), y) for name, (x, y) in parts.items()}
