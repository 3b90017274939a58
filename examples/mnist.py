"""MNIST from IDX files, as its authors publish them, packed by gzip or not."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: The first 1,000 training and 500 test images.
SUBSET = Path(__file__).parent / "data" / "mnist"
_FILES = {"train": "train", "test": "t10k"}


class Split(NamedTuple):
    """Images (count, 784), standardised by the training set's usual mean and deviation, and labels (count)."""

    images: Tensor
    labels: Tensor


def load(folder: Path, split: str) -> Split:
    """One of ``"train"`` and ``"test"``; ValueError for a file that is no IDX file of bytes."""
    images = _read(folder / f"{_FILES[split]}-images-idx3-ubyte").reshape(-1, 784)
    labels = _read(folder / f"{_FILES[split]}-labels-idx1-ubyte")
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images of {split}, but {len(labels)} labels")
    return Split((torch.from_numpy(images).float() / 255 - 0.1307) / 0.3081, torch.from_numpy(labels).long())


def _read(path: Path) -> np.ndarray:
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and not packed.exists():
        raise FileNotFoundError(f"{path}: neither it nor {packed.name} is there")
    data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: expected an IDX file of bytes, got one that begins with {data[:4]!r}")
    head = 4 + 4 * data[3]
    shape = [int(n) for n in np.frombuffer(data[4:head], ">u4")]
    if len(data) != head + math.prod(shape):
        raise ValueError(f"{path}: expected {head + math.prod(shape)} bytes for shape {shape}, got {len(data)}")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape).copy()
