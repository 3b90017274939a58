"""States of this package in safetensors files: written atomically, versioned, verified before anything is used."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infold._library import CorruptWeightError
from infold.checked_files import CHECKSUMS, destination, read, read_object, tensor_checksum, verify, write

#: Beside the tensors: ``kind`` and ``version`` of the state, its ``metadata`` and the tensors' ``checksums`` as JSON.
_FIELDS = ("kind", "version", "metadata", CHECKSUMS)


def save_state(
    path: str | Path, kind: str, version: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Writes tensors (any device and strides) and JSON values; the file appears complete or not at all.

    kind, version: what `load_state` will ask for. Raises OSError where no file can be written, ValueError for a number
    that JSON does not have and TypeError for a value of another type.
    """
    path = destination(path)
    # Copies, since safetensors stores no views.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(dict(metadata), allow_nan=False)
    write(path, state, {"kind": kind, "version": str(version), "metadata": text}, _checksum)


def load_state(path: str | Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the metadata of a file of `save_state`.

    Raises CorruptWeightError for a file that is truncated or whose bytes do not fit their checksums, and ValueError for
    an intact file of another kind or version, or of something else.
    """
    path = Path(path)
    mapped, fields = read(path)
    # What maps the file may change with it.
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    if not set(_FIELDS) <= fields.keys():
        raise ValueError(f"{path}: expected a file of kind {kind!r}, got one without its metadata")
    verify(tensors, fields, _FIELDS, _checksum, path, f"{path}: ")
    if fields["kind"] != kind:
        raise ValueError(f"{path}: expected a file of kind {kind!r}, got {fields['kind']!r}")
    if fields["version"] != str(version):
        raise ValueError(f"{path}: expected version {version} of {kind!r}, got {fields['version']}")
    return tensors, read_object(fields, "metadata", path)


def take(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: Sequence[int | None], path: str | Path
) -> Tensor:
    """A tensor of the file at ``path``, which must have a dtype and a shape; None fits any size.

    Raises CorruptWeightError for another and where it is missing: checksums say nothing about who wrote the file.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise CorruptWeightError(f"{path}: {name}", "tensor", "expected one in the file, got none")
    fits = len(tensor.shape) == len(shape) and all(
        want is None or size == want for size, want in zip(tensor.shape, shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        want = f"{dtype} of shape ({', '.join('any' if size is None else str(size) for size in shape)})"
        raise CorruptWeightError(f"{path}: {name}", "tensor", f"expected {want}, got {tensor.dtype} of {tensor.shape}")
    return tensor


def require_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises CorruptWeightError for a tensor with a number that is not finite."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CorruptWeightError(f"{path}: {name}", "tensor", "expected finite numbers")


@contextlib.contextmanager
def reading_metadata(path: str | Path) -> Iterator[None]:
    """Raises CorruptWeightError where metadata lack something, or say what no object of theirs can be."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptWeightError(str(path), "metadata", f"expected what a state has, got {error!r}") from error


def _checksum(tensor: Tensor) -> int:
    """Of the bytes, the dtype and the shape: a header can be damaged as well."""
    return tensor_checksum(tensor, zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode()))
