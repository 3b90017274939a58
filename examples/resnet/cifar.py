"""CIFAR-10 from its authors' Python files, as torchvision leaves them, without trusting what is in them."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FILES = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}


class Split(NamedTuple):
    """Images (count, 3, 32, 32) of bytes, and labels (count) from 0 to 9."""

    images: Tensor
    labels: Tensor


def load(folder: Path, split: str) -> Split:
    """One of ``"train"`` and ``"test"``. folder: ``cifar-10-batches-py``, or the one it lies in.

    Raises ValueError, which names the file, for one that holds anything but images and labels.
    """
    folder = folder / "cifar-10-batches-py" if (folder / "cifar-10-batches-py").is_dir() else folder
    parts = [_read(folder / name) for name in _FILES[split]]
    return Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def _read(path: Path) -> Split:
    with open(path, "rb") as file:
        try:
            found = _Unpickler(file, encoding="bytes").load()
        except Exception as error:  # a damaged pickle raises anything
            raise ValueError(f"{path}: expected a batch of CIFAR-10, got {error!r}") from error
    # Python 2 wrote the keys as bytes.
    entries = {key.decode() if isinstance(key, bytes) else key: value for key, value in _items(found)}
    data, labels = entries.get("data"), entries.get("labels")
    if not isinstance(data, _Array) or len(data.shape) != 2 or data.shape[1] != 3072:
        raise ValueError(f"{path}: data: expected (images, 3072) bytes, got {getattr(data, 'shape', data)}")
    if not isinstance(labels, list) or len(labels) != data.shape[0] or not all(label in range(10) for label in labels):
        raise ValueError(f"{path}: labels: expected {data.shape[0]} from 0 to 9")
    images = torch.frombuffer(bytearray(data.raw), dtype=torch.uint8) if data.raw else torch.empty(0).byte()
    return Split(images.reshape(-1, 3, 32, 32), torch.tensor(labels))


def _items(found: Any) -> list[tuple[Any, Any]]:
    return list(found.items()) if isinstance(found, dict) else []


class _Dtype:
    """Stands for NumPy's dtype: bytes alone are read."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"dtype: expected 'u1', got {code!r}")

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands for NumPy's array of bytes."""

    shape: tuple[int, ...] = ()
    raw = b""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, raw = state
        whole = isinstance(dtype, _Dtype) and not by_columns and isinstance(raw, bytes)
        if not whole or min(shape) < 0 or math.prod(shape) != len(raw):
            raise pickle.UnpicklingError(f"array: expected bytes by rows of shape {shape}")
        self.shape, self.raw = tuple(shape), raw


class _Unpickler(pickle._Unpickler):  # the one in Python: a damaged file cannot make the other take all memory
    """Makes arrays of bytes, and nothing else that a pickle may ask for."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
            # How Python 3 writes bytes for Python 2.
            ("_codecs", "encode"): lambda text, _: text.encode("latin-1"),
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"expected an array of bytes, got {module}.{name}")
        return allowed[module, name]
