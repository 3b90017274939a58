"""States in files: complete or not at all, and refused by name when damaged."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from infold import CorruptWeightError
from infold.tokenizers import SeparablePCA, SparsePCA
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


def forge(file: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Changes metadata and the checksum that fits them."""
    with safe_open(file, "pt") as opened:
        fields = change(opened.metadata())
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    order = ("kind", "version", "metadata", "checksums")
    checksum = str(zlib.crc32("\n".join(fields[name] for name in order).encode()))
    save_file(tensors, file, {**fields, "metadata_checksum": checksum})


@pytest.mark.parametrize(
    ("field", "text"), [("metadata", "[]"), ("metadata", "{"), ("checksums", "3"), ("checksums", '{"gone": 1}')]
)
def test_a_forged_field_is_named(file: Path, field: str, text: str) -> None:
    forge(file, lambda fields: {**fields, field: text})
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


def samples(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


FITTED = {
    "sparse-pca": lambda: SparsePCA(2, sparsity=2, groups=[0, 0, 1, 1, 2]).fit(samples(9, 5)),
    "separable-pca": lambda: SeparablePCA((2, 1), modes=((1,), (0, 2))).fit(samples(9, 2, 3, 2)),
}


@pytest.mark.parametrize("kind", FITTED)
def test_damaged_pcas_are_refused(kind: str, file: Path) -> None:
    pca = FITTED[kind]()
    with pytest.raises(ValueError, match=f"expected a file of kind '{kind}', got 'Thing'"):
        type(pca).load(file)
    pca.save(file)
    data = file.read_bytes()
    for length in range(0, len(data), 7):
        file.write_bytes(data[:length])
        with pytest.raises(CorruptWeightError):
            type(pca).load(file)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        with pytest.raises((CorruptWeightError, ValueError)):
            type(pca).load(file)
    file.write_bytes(data)
    save_state(file, kind, 2, *load_state(file, kind, 1))
    with pytest.raises(ValueError, match=f"expected version 1 of '{kind}', got 2"):
        type(pca).load(file)


@pytest.mark.parametrize(
    ("kind", "changed", "said"),
    [
        ("sparse-pca", {"components": torch.zeros(2, 4).double()}, {}),
        ("sparse-pca", {"components": torch.zeros(2, 5)}, {}),
        ("sparse-pca", {"projection": torch.zeros(2, 5).double()}, {}),
        ("sparse-pca", {"variance": torch.tensor([1, torch.nan]).double()}, {}),
        ("sparse-pca", {"mean": torch.zeros(5, dtype=torch.int64)}, {}),
        ("sparse-pca", {"mean": None}, {}),
        ("sparse-pca", {"groups": torch.zeros(4, dtype=torch.int64)}, {}),
        ("sparse-pca", {"groups": torch.zeros(5)}, {}),
        ("sparse-pca", {}, {"n_components": 3}),
        ("sparse-pca", {}, {"n_components": "many"}),
        ("sparse-pca", {}, {"sparsity": None}),
        ("sparse-pca", {}, {"penalty": 0.1}),
        ("sparse-pca", {}, {"n_iter": [3]}),
        ("sparse-pca", {}, {"count": None}),
        ("separable-pca", {"mean": torch.zeros(2, 3).double()}, {}),
        ("separable-pca", {"mean": torch.zeros(2, 2, 3).double()}, {}),
        ("separable-pca", {"mean": torch.full((2, 3, 2), torch.inf).double()}, {}),
        ("separable-pca", {"scatter.1": torch.zeros(4, 3).double()}, {}),
        ("separable-pca", {"scatter.1": None}, {}),
        ("separable-pca", {"components.0": torch.zeros(2, 3, dtype=torch.int64)}, {}),
        ("separable-pca", {"components.1": torch.zeros(1, 4)}, {}),
        ("separable-pca", {"variance.0": torch.zeros(2).double()}, {}),
        ("separable-pca", {"discarded": torch.zeros(3).double()}, {}),
        ("separable-pca", {}, {"ranks": [4, 1]}),
        ("separable-pca", {}, {"ranks": 2}),
        ("separable-pca", {}, {"modes": [[0], [0, 2]]}),
        ("separable-pca", {}, {"modes": None}),
        ("separable-pca", {}, {"count": 1}),
    ],
)
def test_pcas_that_make_no_sense_are_refused(
    kind: str, changed: dict[str, Tensor | None], said: dict[str, Any], file: Path
) -> None:
    pca = FITTED[kind]()
    pca.save(file)
    tensors, metadata = load_state(file, kind, 1)
    forged = {name: tensor for name, tensor in {**tensors, **changed}.items() if tensor is not None}
    save_state(file, kind, 1, forged, {**metadata, **said})
    with pytest.raises(CorruptWeightError):
        type(pca).load(file)


def test_a_number_without_end_is_refused(file: Path) -> None:
    """JSON may hold one that no JSON of ours does."""
    FITTED["sparse-pca"]().save(file)
    forge(file, lambda f: {**f, "metadata": f["metadata"].replace('"count": 9', '"count": 1e999')})
    with pytest.raises(CorruptWeightError, match="`metadata`"):
        SparsePCA.load(file)
