"""Finds and loads the native library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

_CORRUPT = re.compile(r"infold/corrupt: field `(?P<field>[^`]*)`: (?P<detail>.*)")


class CorruptWeightError(RuntimeError):
    """A packed weight or a file whose bytes contradict each other or their checksums.

    ``tensor`` is the qualified name of the tensor (or the file), ``field`` the field at fault.
    """

    def __init__(self, tensor: str, field: str, detail: str) -> None:
        super().__init__(f"{tensor}: field `{field}`: {detail}")
        self.tensor = tensor
        self.field = field
        self.detail = detail

    def __reduce__(self) -> tuple[type[CorruptWeightError], tuple[str, str, str]]:
        return type(self), (self.tensor, self.field, self.detail)


def library_path() -> str:
    """The path of the native library, for ``torch.ops.load_library`` without this package."""
    path = Path(__file__).with_name("libinfold.so")
    if not path.is_file():
        raise ImportError(f"{path} is missing: build it with `make build`, or reinstall with `pip install .`")
    return str(path)


torch.ops.load_library(library_path())  # type: ignore[no-untyped-call]
ops: Any = torch.ops.infold


def build_info() -> dict[str, Any]:
    """What the library was built with: version, format version, CUDA architectures and kernels, CPU instruction set."""
    info: dict[str, Any] = json.loads(ops.build_info())
    return info


def as_corrupt(error: Exception, tensor: str) -> CorruptWeightError:
    """The error that a caller should see for the library's ``error`` while reading ``tensor``."""
    message = str(error).splitlines()[0]
    match = _CORRUPT.search(message)
    if match:
        return CorruptWeightError(tensor, match["field"], match["detail"])
    field, _, detail = message.partition(": ")
    return CorruptWeightError(tensor, field, detail)
