"""Files that appear complete or not at all, and safetensors files in which no damage goes unseen."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from infold._library import CorruptWeightError

#: Metadata of every file: the tensors' checksums, as JSON, and one of the metadata.
CHECKSUMS, _CHECKSUM = "checksums", "metadata_checksum"


def destination(path: str | Path) -> Path:
    """Where a file can be written: what a link names is replaced, not the link. Raises OSError where none can be."""
    path = Path(path).resolve()
    _refuse_folder(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "expected a folder", str(path.parent))
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in the place of ``path``, which it takes, synced, once it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # With the mode that any new file gets here; safetensors' own would be its owner's alone.
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write(
    path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str], checksum: Callable[[Tensor], int]
) -> None:
    """Writes contiguous tensors of the CPU, and metadata to which it adds the checksums."""
    metadata = {**metadata, CHECKSUMS: json.dumps({name: checksum(tensor) for name, tensor in tensors.items()})}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {**metadata, _CHECKSUM: metadata_checksum(metadata, metadata)})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, which map the file, and metadata, unverified. Raises CorruptWeightError for no safetensors file."""
    _refuse_folder(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptWeightError(str(path), "file", str(error)) from error


def verify(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    fields: Iterable[str],
    checksum: Callable[[Tensor], int],
    path: Path,
    where: str = "",
) -> None:
    """Raises CorruptWeightError where what was read does not fit its checksums; it names a tensor after ``where``.

    fields: those of the metadata, in the order in which they were written.
    """
    expected, text = metadata.get(_CHECKSUM), metadata_checksum(metadata, fields)
    if expected != text:
        raise CorruptWeightError(str(path), _CHECKSUM, f"expected {expected}, got {text}")
    checksums = read_object(metadata, CHECKSUMS, path, int)
    for name in checksums.keys() - tensors.keys():
        raise CorruptWeightError(where + name, CHECKSUMS, "expected the tensor in the file, got none")
    for name, tensor in tensors.items():
        found = checksum(tensor)
        if checksums.get(name) != found:
            raise CorruptWeightError(where + name, "checksum", f"expected {checksums.get(name)}, got {found}")


def read_object(metadata: Mapping[str, str], field: str, path: Path, kind: type = object) -> dict[str, Any]:
    """An object of the metadata, whose values are all of one kind. Raises CorruptWeightError for anything else."""
    try:
        value = json.loads(metadata[field])
    except (KeyError, ValueError, RecursionError) as error:
        raise CorruptWeightError(str(path), field, f"expected JSON, got {type(error).__name__}") from error
    if not isinstance(value, dict) or not all(isinstance(item, kind) for item in value.values()):
        raise CorruptWeightError(str(path), field, f"expected an object with values of type {kind.__name__}")
    return value


def tensor_checksum(tensor: Tensor, start: int = 0) -> int:
    """Of the bytes, after those of which ``start`` is the checksum."""
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, start)


def metadata_checksum(metadata: Mapping[str, str], fields: Iterable[str]) -> str:
    return str(zlib.crc32("\n".join(metadata.get(field, "") for field in fields).encode()))


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file", str(path))
