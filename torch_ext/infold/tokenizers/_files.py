"""States of this package in safetensors files: written atomically, versioned, verified before anything is used."""

from __future__ import annotations

import contextlib
import errno
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from infold._library import CorruptWeightError
from infold.files import destination, replacing

#: Beside the tensors: ``kind`` and ``version`` of the state, its ``metadata`` and the tensors' ``checksums`` as JSON.
_FIELDS = ("kind", "version", "metadata", "checksums")
_CHECKSUM = "metadata_checksum"


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
    fields = {
        "kind": kind,
        "version": str(version),
        "metadata": json.dumps(dict(metadata), allow_nan=False),
        "checksums": json.dumps({name: _checksum(tensor) for name, tensor in state.items()}),
    }
    with replacing(path) as temporary:
        save_file(state, temporary, {**fields, _CHECKSUM: _text_checksum(fields)})


def load_state(path: str | Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the metadata of a file of `save_state`.

    Raises CorruptWeightError for a file that is truncated or whose bytes do not fit their checksums, and ValueError for
    an intact file of another kind or version, or of something else.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file", str(path))
    try:
        with safe_open(path, "pt") as file:
            fields = file.metadata() or {}
            # Copies: what is read maps the file, which may change.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CorruptWeightError(str(path), "file", str(error)) from error
    if not {*_FIELDS, _CHECKSUM} <= fields.keys():
        raise ValueError(f"{path}: expected a file of kind {kind!r}, got one without its metadata")
    found = _text_checksum(fields)
    if fields[_CHECKSUM] != found:
        raise CorruptWeightError(str(path), _CHECKSUM, f"expected {fields[_CHECKSUM]}, got {found}")
    if fields["kind"] != kind:
        raise ValueError(f"{path}: expected a file of kind {kind!r}, got {fields['kind']!r}")
    if fields["version"] != str(version):
        raise ValueError(f"{path}: expected version {version} of {kind!r}, got {fields['version']}")
    checksums, metadata = (_object(fields[name], name, path) for name in ("checksums", "metadata"))
    for name in checksums.keys() - tensors.keys():
        raise CorruptWeightError(f"{path}: {name}", "checksums", "expected the tensor in the file, got none")
    for name, tensor in tensors.items():
        if checksums.get(name) != _checksum(tensor):
            detail = f"expected {checksums.get(name)}, got {_checksum(tensor)}"
            raise CorruptWeightError(f"{path}: {name}", "checksum", detail)
    return tensors, metadata


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
    start = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, start)


def _text_checksum(fields: Mapping[str, str]) -> str:
    return str(zlib.crc32("\n".join(fields[name] for name in _FIELDS).encode()))


def _object(text: str, field: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptWeightError(str(path), field, f"expected JSON, got {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise CorruptWeightError(str(path), field, f"expected an object, got {type(value).__name__}")
    return value
