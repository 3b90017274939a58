"""The converter on models that people have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import infold
import pytest
import torch
import transformers
from conftest import CONFIGS
from infold import FusedConfig
from infold.nn import FusedDecompressEmbedding, FusedDecompressLinear, PackedModule
from torch import nn


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=3, n_head=4)
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def dense_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Each layer's weight as (out_features, in_features)."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weights[name] = module.weight.detach().clone()
        elif type(module).__name__ == "Conv1D":
            weights[name] = module.weight.detach().T.clone()  # type: ignore[operator, union-attr]
    return weights


@pytest.mark.parametrize("build", [gpt2, llama])
def test_every_layer_gets_its_own_weight(build: Any) -> None:
    model = build()
    tokens = torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        expected = model(tokens).logits
    before = dense_weights(model)
    report = infold.convert(model, FusedConfig(), progress=False)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedModule)}
    assert packed.keys() == before.keys() == {layer.name for layer in report.layers}
    for name, module in packed.items():
        assert torch.equal(module.unpack(), before[name]), name
    distinct = {module.payload.data_ptr() for module in packed.values()}
    tied = sum(layer.tied_to is not None for layer in report.layers)
    assert len(distinct) == len(packed) - tied
    assert tied == (1 if build is gpt2 else 0)
    assert report.model_bytes_after < report.model_bytes_before
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    generated = model.generate(tokens[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 24)


def test_tied_weights_stay_tied() -> None:
    model = gpt2()
    report = infold.convert(model, CONFIGS["int8"], progress=False)
    embedding = model.get_submodule("transformer.wte")
    head = model.get_submodule("lm_head")
    assert isinstance(embedding, FusedDecompressEmbedding)
    assert isinstance(head, FusedDecompressLinear)
    assert head.payload is embedding.payload
    assert head.scales is embedding.scales
    entry = next(layer for layer in report.layers if layer.name == "lm_head")
    assert entry.tied_to == "transformer.wte"
    assert report.bytes_after == sum(layer.bytes_after for layer in report.layers) - entry.bytes_after


def test_a_tie_is_never_broken() -> None:
    model = gpt2()
    with pytest.warns(UserWarning, match=r"transformer\.wte: its weight is tied to lm_head\.weight"):
        report = infold.convert(model, CONFIGS["int8"], skip=["lm_head"], progress=False)
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]
    assert "transformer.wte" in report.refused

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.copy = self.layer.weight

    with pytest.warns(UserWarning, match="tied to copy"):
        infold.convert(custom := Custom(), FusedConfig(), progress=False)
    assert type(custom.layer) is nn.Linear


def test_a_shared_module_is_converted_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.blocks = nn.ModuleList([nn.ReLU(), self.first])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](self.first(x))  # type: ignore[no-any-return]

    model = Shared()
    x = torch.randn(2, 64)
    expected = model(x)
    report = infold.convert(model, FusedConfig(), progress=False)
    assert model.first is model.blocks[1]
    assert len(report.layers) == 1
    torch.testing.assert_close(model(x), expected)


def test_choosing_layers() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), nn.Embedding(64, 64)
        )

    def kinds(model: nn.Module) -> dict[str, str]:
        return {n: m.header.quantizer for n, m in model.named_modules() if isinstance(m, PackedModule)}

    model = build()
    infold.convert(model, CONFIGS["int8"], lambda module, name: name != "1.0", progress=False)
    assert kinds(model) == {"0": "int8", "1.1": "int8", "2": "int8"}

    model = build()
    infold.convert(model, {"1.1": None, "1.*": CONFIGS["int8"], "*": FusedConfig()}, skip=["2"], progress=False)
    assert kinds(model) == {"0": "lossless", "1.0": "int8"}

    with pytest.raises(ValueError, match=r"'nothing'.*matched none"):
        infold.convert(build(), FusedConfig(), skip=["nothing"])
    with pytest.raises(ValueError, match=r"'1'.*matched none \(try '1\.\*'\?\)"):
        infold.convert(build(), FusedConfig(), skip=["1"])
    with pytest.raises(ValueError, match=r"use FusedDecompressLinear\.from_linear"):
        infold.convert(nn.Linear(4, 4), FusedConfig())


def test_what_cannot_be_packed_is_refused_by_name() -> None:
    class Special(nn.Linear):
        pass

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Parameter(torch.randn(4, 8, 8))
            self.cls_token = nn.Parameter(torch.randn(1, 1, 8))

    model = nn.ModuleDict(
        {
            "good": nn.Linear(64, 64),
            "special": Special(8, 8),
            "wide": nn.Linear(8, 8).double(),
            "normed": nn.Embedding(8, 8, max_norm=1.0),
            "infinite": nn.Linear(64, 64),
            "hooked": nn.Linear(8, 8),
            "experts": Experts(),
            "conv": nn.ConvTranspose1d(3, 3, 3),
        }
    )
    with torch.no_grad():
        model["infinite"].weight[3, 5] = float("inf")  # type: ignore[index]
    model["hooked"].register_forward_hook(lambda *_: None)
    model["patched"] = nn.Linear(8, 8)
    model["patched"].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="left dense") as warned:
        report = infold.convert(model, CONFIGS["int8"], progress=False)
    assert len([w for w in warned if "left dense" in str(w.message)]) == 1
    assert [layer.name for layer in report.layers] == ["good"]
    assert report.refused.keys() == {"special", "wide", "normed", "infinite", "hooked", "patched", "experts.gate_up"}
    assert "weight[3, 5] is inf" in report.refused["infinite"]
    assert "3-D" in report.refused["experts.gate_up"]
    assert "left dense: special" in str(report)


def test_converting_in_inference_mode_leaves_a_model_that_trains() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    with torch.inference_mode():
        infold.convert(model, CONFIGS["int8"], progress=False)
    model(torch.randn(2, 64)).sum().backward()
    assert model[0].bias.grad is not None


def test_an_error_that_is_no_number_is_reported_in_valid_json() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    report = infold.convert(model, FusedConfig(round_to=torch.float16), progress=False)
    assert math.isnan(report.layers[0].relative_error)
    assert json.loads(report.to_json())["layers"][0]["relative_error"] is None


def test_the_report(tmp_path: Path) -> None:
    model = llama()
    report = infold.convert(model, FusedConfig("ecsq", max_error=0.1), progress=False)
    text = str(report)
    assert all(layer.name in text for layer in report.layers)
    assert "total" in text
    parsed = json.loads(report.to_json(tmp_path / "report.json"))
    assert parsed == json.loads((tmp_path / "report.json").read_text())
    assert parsed["total"]["bytes_after"] == sum(layer["bytes_after"] for layer in parsed["layers"])
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        assert isinstance(module, PackedModule)
        stored = [p for name, p in module.named_parameters() if name != "bias"]
        assert layer.resident_bytes == sum(p.numel() * p.element_size() for p in stored)
        assert layer.bytes_after == module.canonical().nbytes
        assert 0 < layer.relative_error <= 0.1
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def encoder(minilm_path: Path) -> Any:
    def build(dtype: torch.dtype = torch.float32) -> nn.Module:
        return transformers.AutoModel.from_pretrained(minilm_path).to(dtype).eval()

    return build


def encoder_linears(module: nn.Module, name: str) -> bool:
    return name.startswith("encoder.")


def test_sizes_on_a_trained_model(encoder: Any) -> None:
    """The project's size gates, all overheads counted, on the 36 encoder linears of all-MiniLM-L6-v2."""
    report = infold.convert(encoder(torch.bfloat16), FusedConfig(), encoder_linears, progress=False)
    assert len(report.layers) == 36
    assert report.bits_per_weight <= 10.75
    assert all(layer.relative_error == 0 for layer in report.layers)

    report = infold.convert(encoder(), FusedConfig("ecsq", bits=4), encoder_linears, progress=False)
    assert report.bits_per_weight <= 4.0
    assert mean_error(report) <= 0.077

    report = infold.convert(encoder(), FusedConfig("ecsq", max_error=0.127), encoder_linears, progress=False)
    assert report.bits_per_weight <= 3.30
    assert max(layer.relative_error for layer in report.layers) <= 0.127
    assert {layer.predictor for layer in report.layers} == {"none"}


def mean_error(report: infold.ConversionReport) -> float:
    return sum(layer.relative_error for layer in report.layers) / len(report.layers)


def test_a_trained_model_computes_the_same(encoder: Any, minilm_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path)
    batch = tokenizer(
        ["A cat sat on the mat.", "Stock prices fell sharply on Tuesday."], padding=True, return_tensors="pt"
    )
    dense, packed = encoder(), encoder()
    weights = dense_weights(packed)
    infold.convert(packed, FusedConfig(mode="exact"), progress=False)
    for name, weight in weights.items():
        module = packed.get_submodule(name)
        assert torch.equal(module.unpack().view(torch.int32), weight.view(torch.int32)), name
    with torch.no_grad():
        assert torch.equal(packed(**batch).last_hidden_state, dense(**batch).last_hidden_state)
        fused = encoder()
        infold.convert(fused, FusedConfig(), progress=False)
        torch.testing.assert_close(
            fused(**batch).last_hidden_state, dense(**batch).last_hidden_state, rtol=1e-4, atol=1e-4
        )


def test_wrong_types_are_refused_before_anything_is_packed() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    wrong: list[tuple[Any, ...]] = [
        (model, "lossless"),
        (model, None),
        (model, {"0": FusedConfig(), "1": "int8"}),
        (torch.zeros(3), FusedConfig()),
    ]
    for arguments in wrong:
        with pytest.raises(TypeError, match="expected"):
            infold.convert(*arguments, progress=False)
    with pytest.raises(TypeError, match=r"skip: .*try \['0'\]"):
        infold.convert(model, FusedConfig(), skip="0", progress=False)
    assert all(type(layer) is nn.Linear for layer in model)
    with pytest.raises(TypeError, match="bits"):
        FusedConfig("ecsq", bits=cast(Any, "4"))
    with pytest.raises(TypeError, match="group_size"):
        FusedConfig("int4", group_size=cast(Any, 64.0))


def test_state_of_a_layers_own_is_not_lost() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].register_buffer("act_scale", torch.ones(3))
    model[1].register_parameter("lora_a", nn.Parameter(torch.zeros(2, 64)))
    model[2].is_causal = True
    with pytest.warns(UserWarning, match="left dense") as warned:
        report = infold.convert(model, FusedConfig(), progress=False)
    assert warned[0].filename == __file__
    assert "act_scale" in report.refused["0"]
    assert "lora_a" in report.refused["1"]
    assert isinstance(model[2], PackedModule)
    assert model[2].is_causal is True


def test_a_layer_without_a_shape_is_left() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(8))
    with pytest.warns(UserWarning, match="1: "):
        infold.convert(model, FusedConfig(), progress=False)
    assert isinstance(model[0], PackedModule)
    assert isinstance(model[1], nn.LazyLinear)


def test_rounding_to_infinity_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[3, 4] = 1e6
        model[1].weight[3, 4] = float("inf")
    with pytest.warns(UserWarning, match="0: round_to: expected no value beyond 65504"):
        infold.convert(model, FusedConfig(round_to=torch.float16), progress=False)
    assert isinstance(model[0], nn.Linear)
    assert isinstance(model[1], PackedModule)


def test_one_layer_is_packed_only_from_its_own_class() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    config = FusedConfig()
    for wrong in (Doubled(8, 8), nn.Embedding(8, 8), nn.Bilinear(8, 8, 8)):
        with pytest.raises(ValueError, match=f"linear: expected an nn.Linear, got a .*{type(wrong).__name__}"):
            infold.nn.FusedDecompressLinear.from_linear(cast(Any, wrong), config)
    for wrong in (nn.EmbeddingBag(8, 8), nn.Linear(8, 8)):
        with pytest.raises(ValueError, match="embedding: expected"):
            infold.nn.FusedDecompressEmbedding.from_embedding(cast(Any, wrong), config)
    for wrong in (nn.ConvTranspose2d(4, 4, 3), nn.Linear(8, 8)):
        with pytest.raises(ValueError, match="conv: expected"):
            infold.nn.FusedDecompressConv.from_conv(cast(Any, wrong), config)
