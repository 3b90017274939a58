"""Packed models in files: complete or not at all, verified, and never trusted."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import infold
import pytest
import torch
from conftest import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st
from infold import CorruptWeightError, FusedConfig
from infold.checked_files import metadata_checksum, tensor_checksum
from infold.nn import PackedModule
from safetensors import safe_open
from safetensors.torch import save_file
from test_convert import gpt2, llama
from torch import nn


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 32, bias=False))


def packed_file(path: Path, config: FusedConfig | None = None) -> nn.Sequential:
    model = small()
    infold.convert(model, config or CONFIGS["ecsq"], progress=False)
    infold.save(model, path)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_saved_model_comes_back(build: Any, tmp_path: Path, config: FusedConfig) -> None:
    model = build()
    infold.convert(model, config, progress=False)
    infold.save(model, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == ["model.safetensors"]
    other = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    infold.load_into(other, tmp_path / "model.safetensors")
    assert equal(state(other), state(model))
    tokens = torch.randint(0, 300, (1, 9))
    with torch.no_grad():
        assert torch.equal(other(tokens).logits, model(tokens).logits)
    if build is gpt2:
        assert other.lm_head.payload is other.transformer.wte.payload
        stored = (tmp_path / "model.safetensors").stat().st_size
        assert stored < 1.1 * sum(t.numel() * t.element_size() for t in model.parameters()) + 40_000


def test_loading_into_a_converted_model(tmp_path: Path) -> None:
    model = packed_file(tmp_path / "a", FusedConfig("ecsq", bits=3))
    other = small()
    infold.convert(other, CONFIGS["int8"], progress=False)
    infold.load_into(other, tmp_path / "a")
    assert equal(state(other), state(model))


def test_loading_keeps_the_models_dtype_and_reaches_meta(tmp_path: Path) -> None:
    source = small().bfloat16()
    infold.convert(source, FusedConfig(), progress=False)
    infold.save(source, tmp_path / "a")
    indices = torch.tensor([1, 2])
    into_float = small()
    infold.load_into(into_float, tmp_path / "a")
    assert {p.dtype for p in into_float.parameters() if p.is_floating_point()} == {torch.float32}
    assert into_float(indices).dtype == torch.float32
    with torch.device("meta"):
        empty = small()
    infold.load_into(empty, tmp_path / "a")
    assert not any(tensor.is_meta for tensor in empty.state_dict().values())
    torch.testing.assert_close(empty(indices).float(), source(indices).float(), rtol=0.1, atol=0.1)


def test_hooks_are_not_lost(tmp_path: Path) -> None:
    packed_file(tmp_path / "a")
    model = small()
    model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="1: expected a plain layer, got one with hooks"):
        infold.load_into(model, tmp_path / "a")


def test_trained_scales_are_kept(tmp_path: Path) -> None:
    model = small()
    infold.convert(model, FusedConfig("int8", trainable_scales=True), progress=False)
    with torch.no_grad():
        model[1].scales.mul_(1.01)  # type: ignore[union-attr, operator]
    infold.save(model, tmp_path / "a")
    other = small()
    infold.load_into(other, tmp_path / "a")
    assert equal(state(other), state(model))
    assert other[1].scales.requires_grad  # type: ignore[union-attr]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_file(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("infold.checked_files.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        infold.save(model, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def test_the_wrong_model_is_named_and_left_alone(tmp_path: Path) -> None:
    packed_file(tmp_path / "a")
    for wrong, message in [
        (nn.Sequential(nn.Embedding(50, 64), nn.ReLU()), "1: expected a layer of kind 'linear', got ReLU"),
        (nn.Sequential(nn.Embedding(50, 64)), "1: expected a layer of the model"),
        (nn.Sequential(*small()[:3], nn.Linear(96, 33, bias=False)), r"3: expected a weight of \(33, 96\)"),
        (nn.Sequential(*small()[:2], nn.Identity(), small()[3]), "unexpected"),
        (nn.Sequential(*small(), nn.Linear(3, 3)), "missing"),
    ]:
        before = state(wrong)
        with pytest.raises(ValueError, match=message):
            infold.load_into(wrong, tmp_path / "a")
        assert equal(state(wrong), before)
        assert not any(isinstance(module, PackedModule) for module in wrong.modules())


def rewritten(path: Path, change: Any) -> None:
    """Applies `change(tensors, metadata)` to a file, with matching checksums of whole tensors."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    if "metadata_checksum" in metadata:
        metadata["metadata_checksum"] = metadata_checksum(metadata, ("format", "modules", "aliases", "checksums"))
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("name", ["1.payload", "1.directory", "1.tables", "1.scales", "2.weight", "1.bias"])
def test_a_flipped_bit_is_named(tmp_path: Path, name: str) -> None:
    packed_file(tmp_path / "a")

    def flip(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        tensors[name].flatten().view(torch.uint8)[1] ^= 16

    rewritten(tmp_path / "a", flip)
    model = small()
    before = state(model)
    with pytest.raises(CorruptWeightError) as raised:
        infold.load_into(model, tmp_path / "a")
    assert (raised.value.tensor, raised.value.field) == (name, "checksum")
    assert equal(state(model), before)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    for change, tensor, field in [
        (lambda t, m: t.pop("1.payload"), "1.payload", "checksums"),
        (lambda t, m: m.pop("format"), "a", "format"),
        (lambda t, m: m.update(format="infold-9"), "a", "format"),
        (lambda t, m: m.update(modules="{"), "a", "modules"),
        (lambda t, m: m.update(modules="[]"), "a", "modules"),
        (lambda t, m: m.update(aliases=json.dumps({"0.payload": "nowhere"})), "0.payload", "aliases"),
        (lambda t, m: m.update(aliases=json.dumps({"0.payload": ["1.payload"]})), "a", "aliases"),
        (lambda t, m: m.update(modules=json.dumps({"0": "embedding"})), "a", "modules"),
        (lambda t, m: m.update(modules="[" * 200_000), "a", "modules"),
    ]:
        packed_file(tmp_path / "a")
        rewritten(tmp_path / "a", change)
        with pytest.raises(CorruptWeightError) as raised:
            infold.load_into(small(), tmp_path / "a")
        assert raised.value.tensor.endswith(tensor)
        assert raised.value.field == field


def test_wrong_dtypes_are_named(tmp_path: Path) -> None:
    def retype(name: str, dtype: torch.dtype) -> Any:
        def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
            tensors[name] = tensors[name].to(dtype)
            checksums = json.loads(metadata["checksums"])
            checksums[name] = tensor_checksum(tensors[name])
            metadata["checksums"] = json.dumps(checksums)

        return change

    for name, dtype, error in [
        ("1.payload", torch.int32, CorruptWeightError),
        ("1.scales", torch.int64, CorruptWeightError),
        ("1.bias", torch.int8, ValueError),
    ]:
        packed_file(tmp_path / "a")
        rewritten(tmp_path / "a", retype(name, dtype))
        model = small()
        before = state(model)
        with pytest.raises(error):
            infold.load_into(model, tmp_path / "a")
        assert equal(state(model), before)


def test_a_newer_version_is_named(tmp_path: Path) -> None:
    packed_file(tmp_path / "a")

    def newer(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors["1.tables"][4] = 9
        checksums = json.loads(metadata["checksums"])
        checksums["1.tables"] = zlib.crc32(tensors["1.tables"].numpy())
        metadata["checksums"] = json.dumps(checksums)

    rewritten(tmp_path / "a", newer)
    with pytest.raises(CorruptWeightError, match="1: field `version`: expected at most 3, got 9"):
        infold.load_into(small(), tmp_path / "a")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_is_an_error_and_changes_nothing(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damage") / "a"
    packed_file(path, replace(CONFIGS["ecsq"], layout="fast"))
    raw = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["truncate", "flip", "flip in the header", "header length", "noise"]))
    if kind == "truncate":
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    elif kind == "flip":
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "flip in the header":
        raw[data.draw(st.integers(0, struct.unpack("<Q", raw[:8])[0] + 7))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "header length":
        raw[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    else:
        at = data.draw(st.integers(0, len(raw) - 65))
        raw[at : at + 64] = data.draw(st.binary(min_size=64, max_size=64))
    unharmed = bytes(raw) == path.read_bytes()
    whole = small()
    infold.load_into(whole, path)
    path.write_bytes(raw)
    model = small()
    before = state(model)
    try:
        infold.load_into(model, path)
    except (CorruptWeightError, ValueError):
        assert equal(state(model), before)
    else:
        # A flip may land where it says nothing (JSON's blanks); what was loaded must be what was saved.
        assert unharmed or (equal(state(model), state(whole)) and repr(model) == repr(whole))


def test_files_appear_where_and_as_any_other(tmp_path: Path) -> None:
    model = small()
    infold.convert(model, CONFIGS["lossless"], progress=False)
    (tmp_path / "real").write_bytes(b"before")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    infold.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    infold.load_into(small(), tmp_path / "real")
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "real").stat().st_mode == plain.stat().st_mode
    with pytest.raises(FileNotFoundError, match="nowhere"):
        infold.save(model, tmp_path / "nowhere" / "a")
    for call in (infold.save, infold.load_into):
        with pytest.raises(IsADirectoryError, match=str(tmp_path)):
            call(model, tmp_path)


def test_what_is_no_file_of_ours_is_not_called_corrupt(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "a", {"format": "pt"})
    with pytest.raises(ValueError, match=r"expected a file of infold\.save"):
        infold.load_into(small(), tmp_path / "a")
    model = packed_file(tmp_path / "b")
    with pytest.raises(ValueError, match="expected a module that contains layers"):
        infold.save(model[1], tmp_path / "c")


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(CorruptWeightError("layer", "payload", "expected 1, got 2")))
    assert (error.tensor, error.field, str(error)) == ("layer", "payload", "layer: field `payload`: expected 1, got 2")
