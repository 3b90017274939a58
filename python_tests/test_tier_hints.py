"""tier_hints.json: what goes in comes out, hostile files are errors with a name, other tools read the exports."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from accelerate.utils import check_device_map
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from infold.tiers import TierSpec, attach, load, plan, save, to_device_map, to_llama_cpp
from infold.tiers.gguf import gguf_name
from infold.tiers.hints import parse
from infold.tiers.plan import Plan
from torch import Tensor, nn

HBM, CPU, SSD = TierSpec("HBM", 1, 800), TierSpec("CPU", 5, 26), TierSpec("SSD", 30, 7, on_disk=True)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))


def three_tiers(model: nn.Module) -> Plan:
    ranks = {name: float(i) for i, name in enumerate(("0", "2", "3", "4"))}
    return plan(
        model,
        [HBM, CPU, SSD],
        {"HBM": 24_000, "CPU": 17_000},
        "importance",
        scores=ranks,
        nbytes={"2": 20_000},
        buffers=1,
    )


@pytest.fixture
def hints(tmp_path: Path) -> Path:
    path = tmp_path / "tier_hints.json"
    save(three_tiers(network()), path)
    return path


def test_what_is_saved_is_loaded(hints: Path) -> None:
    made = three_tiers(network())
    assert len({placement.tier for placement in made.placements.values()}) == 3
    assert load(hints) == made
    assert load(hints, network()) == made
    assert [path.name for path in hints.parent.iterdir()] == ["tier_hints.json"]


def test_a_failed_save_leaves_the_old_file(hints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hints.read_bytes()

    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(three_tiers(network()), hints)
    assert hints.read_bytes() == before
    assert [path.name for path in hints.parent.iterdir()] == ["tier_hints.json"]


def test_scores_that_json_has_not_are_refused(tmp_path: Path) -> None:
    model = network()
    made = plan(model, [HBM], scores={"0": float("inf")}, objective="layer-order")
    with pytest.raises(ValueError, match="0: score: expected a finite number, got inf"):
        save(made, tmp_path / "hints.json")
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused_by_name(hints: Path) -> None:
    longer = nn.Sequential(*network(), nn.Linear(8, 8))
    another = rf"{hints}: expected a plan of this model, got one of another: "
    with pytest.raises(ValueError, match=another + "the plan has no units '5'$"):
        load(hints, longer)
    with pytest.raises(ValueError, match=another + "the model has no units '4'$"):
        load(hints, network()[:4])
    with pytest.raises(ValueError, match=another + "shapes or dtypes of parameters differ"):
        load(hints, network().double())
    # Of hundreds, a few are named.
    many = nn.ModuleDict({f"layer{index:03}": nn.Linear(2, 2) for index in range(300)})
    some = "'layer000', 'layer001', 'layer002', 'layer003', 'layer004' and 295 more"
    with pytest.raises(ValueError, match=another + f"the model has no units '0', '2', '3', '4'; .* no units {some}$"):
        load(hints, many)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{}", "format: expected 'infold-tiers', got none"),
        (b"", "expected JSON, got nothing"),
        (b" \n", "expected JSON, got nothing"),
        (b"hello", r"expected JSON, got something else: Expecting value: line 1"),
        (b"\xff\xfe", "expected JSON, got something else: 'utf-8' codec"),
        (b"[" * 100_000, "expected JSON, got some that nests too deep"),
        (b"[1]", "JSON: expected an object, got list"),
    ],
    ids=lambda value: repr(value[:8]),
)
def test_a_file_that_is_no_plan_is_named(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"^{path}: {message}") as caught:
        load(path)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(hints: Path) -> None:
    with pytest.raises(IsADirectoryError, match=str(hints.parent)):
        load(hints.parent)
    with pytest.raises(IsADirectoryError, match=f"expected a file: '{hints.parent}'"):
        save(three_tiers(network()), hints.parent)
    with pytest.raises(FileNotFoundError, match=f"expected a folder: '{hints.parent / 'absent'}'"):
        save(three_tiers(network()), hints.parent / "absent" / "hints.json")


def changed(hints: Path, *path: str | int, to: Any) -> bytes:
    content = json.loads(hints.read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    if to is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("format",), "other", "format: expected 'infold-tiers', got 'other'"),
        (("version",), 2, "version: expected 1, got 2"),
        (("version",), True, "version: expected 1, got True"),
        (("version",), KeyError, "version: expected 1, got None"),
        (("units",), [], "units: expected an object, got list"),
        (("units", "0"), "HBM", "units.0: expected an object, got str"),
        (("units", "0", "tier"), "tape", "0: tier: expected one of HBM, CPU, SSD, got 'tape'"),
        (("units", "0", "tier"), None, "units.0.tier: expected a string"),
        (("units", "0", "nbytes"), 1.5, "units.0.nbytes: expected a number of bytes, got float"),
        (("units", "0", "nbytes"), True, "units.0.nbytes: expected a number of bytes, got bool"),
        (("units", "0", "nbytes"), -1, "units.0.nbytes"),
        (("units", "0", "nbytes"), 10**30, "units.0.nbytes"),
        (("units", "0", "score"), "high", "units.0.score: expected a number, got str"),
        (("units", "0", "score"), float("nan"), "NaN"),
        (("units", "0", "score"), 10**400, "units.0.score: expected a finite number"),
        (("units", "0", "codec"), KeyError, "units.0: expected the fields codec, nbytes, score, tier"),
        (("units", "0", "more"), 1, "units.0: expected the fields"),
        (("buffer_bytes",), "1", "buffer_bytes"),
        (("buffer_bytes",), 0, "buffer_bytes: expected room"),
        (("tiers",), {}, "tiers: expected a list, got dict"),
        (("tiers",), [], "tiers: expected one or more"),
        (("tiers", 1, "name"), "HBM", "tiers: expected one or more of different names"),
        (("tiers", 1, "name"), "", "name"),
        (("tiers", 0, "resident"), False, "tiers: expected the first to be resident"),
        (("tiers", 0, "resident"), 1, r"tiers\[0\].resident"),
        (("tiers", 1, "bandwidth_gb_s"), 0, "CPU: bandwidth_gb_s"),
        (("tiers", 1, "bandwidth_gb_s"), None, r"tiers\[1\].bandwidth_gb_s"),
        (("tiers", 1, "setup_us"), -1, "CPU: setup_us"),
        (("tiers", 1, "capacity_bytes"), -1, r"tiers\[1\].capacity_bytes"),
        (("tiers", 1, "budget_bytes"), 1, "CPU: expected at most its budget"),
        (("fingerprint",), 3, "fingerprint: expected a string"),
        (("objective",), [], "objective: expected a string"),
        (("more",), 1, "plan: expected the fields"),
    ],
)
def test_hostile_fields_are_named(hints: Path, path: tuple[str | int, ...], to: Any, message: str) -> None:
    text = changed(hints, *path, to=to)
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b"1" * 5000],
    ids=lambda text: repr(text[:8]),
)
def test_no_plan_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(text)


def test_duplicate_and_huge_files_are_refused(hints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = hints.read_text().replace('"units": {', '"units": {"0": 1, ', 1)
    with pytest.raises(ValueError, match="'0': expected one entry, got several"):
        parse(twice.encode())
    monkeypatch.setattr("infold.tiers.hints.MAX_BYTES", 100)
    with pytest.raises(ValueError, match="expected at most 100 bytes"):
        load(hints)


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_json_raises_value_error_or_nothing(hints: Path, data: st.DataObject) -> None:
    content = json.loads(hints.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        place = content
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = data.draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and data.draw(st.booleans()):
                place = place[key]
                continue
            if data.draw(st.booleans()):
                place[key] = data.draw(_ANYTHING)
            else:
                del place[key]
            break
    with contextlib.suppress(ValueError):
        parse(json.dumps(content).encode())


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0), new=st.binary(max_size=4), cut=st.integers(0, 4))
def test_mutated_bytes_raise_value_error_or_nothing(hints: Path, place: int, new: bytes, cut: int) -> None:
    text = hints.read_bytes()
    place %= len(text)
    with contextlib.suppress(ValueError):
        parse(text[:place] + new + text[place + cut :])


def test_device_map_passes_accelerates_check_and_runs(tmp_path: Path) -> None:
    model = network().eval()
    made = three_tiers(model)
    device_map = to_device_map(made, model, {"HBM": "cpu", "CPU": "cpu", "SSD": "disk"})
    tiers = {name: placement.tier for name, placement in made.placements.items()}
    assert {name: device for name, device in device_map.items() if device == "disk"} == {
        name: "disk" for name, tier in tiers.items() if tier == "SSD"
    }
    check_device_map(model, device_map)
    x = torch.randn(4, 64)
    expected = model(x)
    dispatched = accelerate.dispatch_model(copy.deepcopy(model), device_map, main_device="cpu", offload_dir=tmp_path)
    assert any(parameter.is_meta for parameter in dispatched.parameters())
    assert torch.equal(dispatched(x), expected)


def test_device_map_names_devices(hints: Path) -> None:
    model = network()
    made = three_tiers(model)
    by_tier = {"HBM": 0, "CPU": "cpu", "SSD": "disk"}
    assert to_device_map(made, model) == {name: by_tier[p.tier] for name, p in made.placements.items()}
    gpus = [TierSpec("cuda:0", 1, 800, 17_000, resident=True), TierSpec("cuda:1", 1, 800, 20_000, resident=True), SSD]
    devices = set(to_device_map(plan(model, gpus, None, "layer-order"), model).values())
    assert devices == {"cuda:0", "cuda:1"}
    with pytest.raises(ValueError, match="devices: expected one for each tier, CPU, SSD missing"):
        to_device_map(made, model, {"HBM": 0})


class Outer(nn.Module):
    """A module with a parameter of its own, one inside it, and one of buffers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2048))
        self.inner = nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_device_map_of_modules_inside_modules() -> None:
    model = nn.Sequential(Outer())
    together = plan(model, [HBM, CPU], None, "layer-order")
    assert to_device_map(together, model) == {"0": 0}
    check_device_map(model, to_device_map(together, model))
    ranks = {"0": 2.0, "0.inner": 1.0}
    apart = plan(model, [HBM, CPU], None, "fractions", scores=ranks, fractions=(0.3, 0.7))
    with pytest.raises(
        ValueError, match=r"0: expected one device for its own .* got 0 and, for 0.inner, 'cpu'"
    ) as caught:
        to_device_map(apart, model)
    # What it says to do helps.
    assert "give their tiers the same of the devices, or run the plan by infold.tiers.attach" in str(caught.value)
    assert to_device_map(apart, model, {"HBM": 0, "CPU": 0}) == {"0": 0}
    x = torch.ones(3)
    with attach(model, apart):
        assert torch.equal(model(x), x)


def llama(tie: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tie, attention_bias=True,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def test_device_map_of_a_language_model() -> None:
    model = llama(tie=True)
    made = plan(model, [HBM, CPU, SSD], {"HBM": 20_000, "CPU": 20_000}, "layer-order")
    device_map = to_device_map(made, model)
    check_device_map(model, device_map)
    assert device_map["model.embed_tokens"] == device_map["lm_head"]
    assert device_map["model.rotary_emb"] == 0


def test_names_are_those_of_the_gguf_specification() -> None:
    # As its section on standardized tensor names lists them.
    expected = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.1.self_attn.q_proj.bias": "blk.1.attn_q.bias",
        "model.layers.12.self_attn.k_proj.weight": "blk.12.attn_k.weight",
        "model.layers.2.self_attn.v_proj.weight": "blk.2.attn_v.weight",
        "model.layers.2.self_attn.o_proj.weight": "blk.2.attn_output.weight",
        "model.layers.2.post_attention_layernorm.weight": "blk.2.ffn_norm.weight",
        "model.layers.2.mlp.gate_proj.weight": "blk.2.ffn_gate.weight",
        "model.layers.2.mlp.up_proj.weight": "blk.2.ffn_up.weight",
        "model.layers.2.mlp.down_proj.weight": "blk.2.ffn_down.weight",
    }
    assert {name: gguf_name(name) for name in expected} == expected


def test_names_are_those_of_llama_cpps_converter() -> None:
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for name, _ in llama().named_parameters():
        expected = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name(name) == expected
    qwen = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
    for name in ("model.layers.2.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight"):
        assert gguf_name(name) == qwen.get_name(name, try_suffixes=(".weight", ".bias"))
    for wrong in ("transformer.h.0.attn.c_attn.weight", "model.layers.x.mlp.up_proj.weight", "lm_head.scale", ""):
        with pytest.raises(ValueError, match="parameter: expected one of a Llama-style model"):
            gguf_name(wrong)


def test_llama_cpp_patterns_match_the_offloaded_tensors_alone() -> None:
    model = llama()
    made = plan(model, [HBM, CPU], {"HBM": 40_000}, "random", seed=1)
    patterns = [pattern.rsplit("=", 1) for pattern in to_llama_cpp(made, model)]
    for name, _ in model.named_parameters():
        # llama.cpp searches for each regex in the tensor's name.
        placed = {buffer for regex, buffer in patterns if re.search(regex, gguf_name(name))}
        on_cpu = made.placements[name.rpartition(".")[0]].tier == "CPU"
        assert placed == ({"CPU"} if on_cpu else set())
    assert len(patterns) < sum(p.tier == "CPU" for p in made.placements.values()) * 2
    with pytest.raises(ValueError, match="parameter"):
        to_llama_cpp(plan(network(), [HBM, CPU], {"HBM": 25_000}), network(), {"HBM": "CUDA0"})
