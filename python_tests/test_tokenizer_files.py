"""States in files: complete or not at all, and refused by name when damaged."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from infold import CorruptWeightError
from infold.tokenizers._files import load_state, save_state, take
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

METADATA = {"n": 3, "names": ["a", "b"], "rate": 0.25, "none": None}


def tensors() -> dict[str, Tensor]:
    wide = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    return {
        "wide": wide.T,
        "row": wide[1],
        "count": torch.tensor(7),
        "empty": torch.empty(0, 5),
        "half": wide.bfloat16(),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_state(tmp_path / "state", "Thing", 2, tensors(), METADATA)
    return tmp_path / "state"


def test_a_state_comes_back(file: Path) -> None:
    found, metadata = load_state(file, "Thing", 2)
    assert os.listdir(file.parent) == ["state"]
    assert metadata == METADATA
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    save_state(file, "Thing", 2, {}, {})
    assert load_state(file, "Thing", 2) == ({}, {})


def test_a_link_is_followed_and_a_folder_refused(file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(file)
    save_state(link, "Thing", 3, {}, {})
    assert link.is_symlink()
    assert load_state(file, "Thing", 3) == ({}, {})
    with pytest.raises(IsADirectoryError):
        load_state(file.parent, "Thing", 2)
    with pytest.raises(IsADirectoryError):
        save_state(file.parent, "Thing", 2, {}, {})
    with pytest.raises(FileNotFoundError):
        save_state(file.parent / "none" / "state", "Thing", 2, {}, {})


def test_what_cannot_be_written_leaves_the_file(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        save_state(file, "Thing", 2, {}, {"rate": float("nan")})
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["state"]


def test_another_kind_or_version_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="expected a file of kind 'Other', got 'Thing'"):
        load_state(file, "Other", 2)
    with pytest.raises(ValueError, match="expected version 1 of 'Thing', got 2"):
        load_state(file, "Thing", 1)
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="without its metadata"):
        load_state(file, "Thing", 2)


def test_a_truncated_file_is_refused(file: Path) -> None:
    data = file.read_bytes()
    for length in range(0, len(data), 3):
        file.write_bytes(data[:length])
        with pytest.raises(CorruptWeightError):
            load_state(file, "Thing", 2)


def test_a_flipped_bit_is_refused_wherever_it_is(file: Path) -> None:
    data = file.read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        # The name of a field may be what is damaged: then it is no such file.
        with pytest.raises((CorruptWeightError, ValueError)):
            load_state(file, "Thing", 2)


def test_damage_is_named(file: Path) -> None:
    data = bytearray(file.read_bytes())
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    begin = 8 + struct.unpack("<Q", data[:8])[0] + header["wide"]["data_offsets"][0]
    data[begin] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptWeightError, match="wide: field `checksum`"):
        load_state(file, "Thing", 2)


@pytest.mark.parametrize(
    ("field", "text"), [("metadata", "[]"), ("metadata", "{"), ("checksums", "3"), ("checksums", '{"gone": 1}')]
)
def test_a_forged_field_is_named(file: Path, field: str, text: str) -> None:
    with safe_open(file, "pt") as opened:
        fields = opened.metadata()
    fields[field] = text
    order = ("kind", "version", "metadata", "checksums")
    fields["metadata_checksum"] = str(zlib.crc32("\n".join(fields[name] for name in order).encode()))
    save_file({}, file, fields)
    with pytest.raises(CorruptWeightError, match=f"`{field}`"):
        load_state(file, "Thing", 2)


def test_take_checks_dtype_and_shape(file: Path) -> None:
    found, _ = load_state(file, "Thing", 2)
    assert take(found, "wide", torch.float64, (4, None), file) is found["wide"]
    for name, dtype, shape in (
        ("wide", torch.float32, (4, 3)),
        ("wide", torch.float64, (3, 4)),
        ("wide", torch.float64, (4, 3, 1)),
        ("narrow", torch.float64, (4, 3)),
    ):
        with pytest.raises(CorruptWeightError, match=name):
            take(found, name, dtype, shape, file)
