"""Frequency layers in the places of linear ones: errors and sizes against NumPy's, ties, files."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import infold
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import transformers
from infold import FrequencyConfig, FusedConfig
from infold.nn import FrequencyLinear, FusedDecompressLinear, SparseFrequencyLinear
from infold.packed import pack
from torch import Tensor, nn


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, 64, bias=False)).to(dtype)


def nearest_circulant(weight: np.ndarray, block: int) -> np.ndarray:
    """Means along circular diagonals, put together by SciPy; for sizes that are multiples of the block."""
    rows, cols = (size // block for size in weight.shape)
    tiles = weight.reshape(rows, block, cols, block).transpose(0, 2, 1, 3)
    means = np.zeros((rows, cols, block))
    for m in range(block):
        means[..., m] = sum(tiles[:, :, (j + m) % block, j] for j in range(block)) / block
    return np.block([[scipy.linalg.circulant(tile) for tile in row] for row in means])


def numpy_error(exact: np.ndarray, approximation: np.ndarray) -> float:
    return float(np.linalg.norm(exact - approximation) / np.linalg.norm(exact))


def weight_of(layer: nn.Module) -> np.ndarray:
    return layer.weight.detach().double().numpy()  # type: ignore[operator, union-attr, return-value]


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "dense"}, ValueError, "kind: expected one of circulant, sparse, got 'dense'"),
        ({"storage": "int8"}, ValueError, "storage: expected one of float, log8"),
        ({"block": 0}, ValueError, "block: expected a positive size, got 0"),
        ({"block": 8.0}, TypeError, "block: expected an int"),
        ({"density": 0.1}, ValueError, "density: expected with kind 'sparse'"),
        ({"kind": "sparse"}, ValueError, "density: expected with kind 'sparse' and only there, got None"),
        ({"kind": "sparse", "density": 0}, ValueError, "density: expected above 0"),
        ({"kind": "sparse", "density": 1.5}, ValueError, "density: expected above 0"),
        ({"kind": "sparse", "density": "1"}, TypeError, "density: expected a number"),
        ({"kind": "sparse", "density": 0.1, "block": 8}, ValueError, "block: expected only with kind 'circulant'"),
        ({"kind": "sparse", "density": 0.1, "storage": "log8"}, ValueError, "storage: expected 'float'"),
        ({"max_error": 0.0}, ValueError, "max_error: expected between 0 and 1"),
        ({"max_error": 1.0}, ValueError, "max_error: expected between 0 and 1"),
        ({"max_error": True}, TypeError, "max_error: expected a number"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FrequencyConfig(**options)


def test_a_configuration_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a FusedConfig, a FrequencyConfig or a mapping"):
        infold.convert(net(), "circulant", progress=False)  # type: ignore[arg-type]


# --- errors and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [4, 16, 64])
def test_the_report_is_right_about_circulant_layers(block: int) -> None:
    model = net()
    dense = {name: weight_of(model.get_submodule(name)) for name in ("0", "2")}
    report = infold.convert(model, FrequencyConfig(block=block), progress=False)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    for layer in report.layers:
        weight = dense[layer.name]
        nearest = nearest_circulant(weight, block)
        assert layer.relative_error == pytest.approx(numpy_error(weight, nearest), rel=1e-5)
        assert layer.bytes_after == layer.resident_bytes == 4 * weight.size // block
        assert layer.bytes_before == 4 * weight.size
        assert (layer.kind, layer.format, layer.layout) == ("linear", f"circulant {block}", "float")
        new = model.get_submodule(layer.name)
        assert isinstance(new, FrequencyLinear)
        np.testing.assert_allclose(new.dense_weight().detach().numpy(), nearest, atol=1e-6)
    x = torch.randn(5, 192)
    hidden = np.maximum(x.double().numpy() @ nearest_circulant(dense["0"], block).T + _bias(model[0]), 0)
    expected = hidden @ nearest_circulant(dense["2"], block).T
    np.testing.assert_allclose(model(x).detach().numpy(), expected, atol=1e-5)


def _bias(layer: nn.Module) -> np.ndarray:
    return layer.bias.detach().double().numpy()  # type: ignore[operator, union-attr, return-value]


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_the_report_is_right_about_sparse_layers(density: float) -> None:
    model = net()
    dense = {name: weight_of(model.get_submodule(name)) for name in ("0", "2")}
    report = infold.convert(model, FrequencyConfig("sparse", density=density), progress=False)
    for layer in report.layers:
        # Parseval: what is left is the energy of what is not kept. A pair more or less is between the two bounds.
        energies = np.sort(np.abs(np.fft.fft2(dense[layer.name])).ravel() ** 2)[::-1]
        kept = round(density * energies.size)
        lower, upper = (
            math.sqrt(max(1 - energies[: max(k, 0)].sum() / energies.sum(), 0)) for k in (kept + 2, kept - 2)
        )
        assert lower - 1e-5 <= layer.relative_error <= upper + 1e-5
        new = model.get_submodule(layer.name)
        assert isinstance(new, SparseFrequencyLinear)
        assert layer.bytes_after == 16 * new.indices.shape[1], "two float32 and two int32 for each coefficient"
        assert layer.format == f"sparse {density:.3%}"
        assert layer.relative_error == pytest.approx(
            numpy_error(dense[layer.name], new.dense_weight().detach().double().numpy()), abs=1e-6
        )


@pytest.mark.parametrize("config", [FrequencyConfig(block=8), FrequencyConfig(block=16, storage="log8")])
def test_other_methods_at_the_same_bytes(config: FrequencyConfig) -> None:
    model = net()
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in ("0", "2")}  # type: ignore[union-attr, operator]
    report = infold.convert(model, config, progress=False)
    for layer in report.layers:
        weight = dense[layer.name]
        exact = weight.double().numpy()
        svd, ecsq, int4 = layer.alternatives
        assert [a.method for a in layer.alternatives] == ["svd", "ecsq", "int4"]

        rank = layer.bytes_after // (2 * sum(exact.shape))
        singular = np.linalg.svd(exact, compute_uv=False)
        left = math.sqrt((singular[rank:] ** 2).sum() / (singular**2).sum())
        # float16 factors.
        assert svd.relative_error == pytest.approx(left, abs=5e-4)
        assert svd.bytes == 2 * rank * sum(exact.shape) <= layer.bytes_after

        assert ecsq.bytes <= layer.bytes_after
        finer = pack(weight, FusedConfig("ecsq", max_error=0.97 * ecsq.relative_error))
        assert finer.nbytes > layer.bytes_after, "no finer ECSQ fits"

        groups = F.pad(weight, (0, -weight.shape[1] % 128)).double().view(len(weight), -1, 128)
        steps = (groups.abs().amax(2, keepdim=True) / 7).bfloat16().double()
        rounded = ((groups / steps).round().clamp(-8, 7) * steps).view(len(weight), -1)[:, : weight.shape[1]]
        assert int4.relative_error == pytest.approx(numpy_error(exact, rounded.numpy()), rel=0.1)
        assert int4.bytes == pack(weight, FusedConfig("int4")).nbytes


def test_a_svd_of_full_rank_leaves_rounding_alone() -> None:
    weight = torch.randn(24, 40)
    (svd, *_) = infold.alternatives.alternatives(weight, 10**6)
    assert svd.bytes == 2 * 24 * (24 + 40)
    assert 0 < svd.relative_error < 1e-3
    (svd, *_) = infold.alternatives.alternatives(weight, 10)
    assert (svd.bytes, svd.relative_error) == (0, 1.0)


def test_log8_is_measured_as_it_is_stored() -> None:
    model = net()
    weight = weight_of(model[0])
    report = infold.convert(model, FrequencyConfig(block=16, storage="log8", compare=False), progress=False)
    layer = report.layers[0]
    assert layer.alternatives == ()
    assert layer.layout == "log8"
    numbers = weight.size // 16
    assert layer.bytes_after == numbers + 2 * math.ceil(numbers / 64)
    assert layer.relative_error == pytest.approx(
        numpy_error(weight, model[0].dense_weight().detach().double().numpy()), rel=1e-5
    )
    assert not [p for p in model[0].parameters() if p.requires_grad and p is not model[0].bias]


# --- max_error --------------------------------------------------------------------------------------------------------


def test_a_layer_over_max_error_stays_dense_and_is_reported() -> None:
    near = FrequencyLinear(64, 32, 8).to_linear()
    model = nn.Sequential(near, nn.Linear(32, 32))
    expected = model[1].weight.detach().clone()
    far = numpy_error(weight_of(model[1]), nearest_circulant(weight_of(model[1]), 8))
    with pytest.warns(UserWarning, match="left dense: 1: its relative error would be 0.9"):
        report = infold.convert(model, FrequencyConfig(block=8, max_error=0.5), progress=False)
    assert isinstance(model[0], FrequencyLinear)
    assert type(model[1]) is nn.Linear
    assert torch.equal(model[1].weight, expected)
    assert [layer.name for layer in report.layers] == ["0"]
    assert report.layers[0].relative_error < 1e-6
    (over,) = report.over_max_error
    assert over.name == "1"
    assert over.relative_error == pytest.approx(far, rel=1e-5)
    assert len(over.alternatives) == 3
    assert "over 0.5" in report.refused["1"]


def test_a_report_for_people_and_machines(tmp_path: Path) -> None:
    model = net()
    with pytest.warns(UserWarning, match="left dense: 2"):
        report = infold.convert(
            model, {"0": FrequencyConfig(block=64), "2": FrequencyConfig(block=64, max_error=0.1)}, progress=False
        )
    text = str(report)
    assert "circulant 64" in text
    assert "svd" in text
    assert f"at {infold.report.format_bytes(report.layers[0].alternatives[2].bytes)}" in text
    parsed = json.loads(report.to_json(tmp_path / "report.json"))
    assert parsed["layers"][0]["alternatives"][0]["method"] == "svd"
    assert parsed["over_max_error"][0]["name"] == "2"
    assert parsed["total"]["model_bytes_after"] == sum(p.nbytes for p in model.parameters())
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


# --- models -----------------------------------------------------------------------------------------------------------


def test_packed_and_frequency_layers_side_by_side() -> None:
    model = net()
    report = infold.convert(model, {"0": FrequencyConfig(block=8), "*": FusedConfig("int8")}, progress=False)
    assert isinstance(model[0], FrequencyLinear)
    assert isinstance(model[2], FusedDecompressLinear)
    assert [layer.format for layer in report.layers] == ["circulant 8", "int8"]
    assert model(torch.randn(3, 192)).shape == (3, 64)


class Tied(nn.Module):
    """Two layers of one weight, with a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.first(x)))


@pytest.mark.parametrize(
    "config",
    [FrequencyConfig(block=8), FrequencyConfig(block=8, storage="log8"), FrequencyConfig("sparse", density=0.2)],
    ids=["circulant", "log8", "sparse"],
)
def test_ties_and_files(config: FrequencyConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    biases = model.first.bias, model.second.bias
    report = infold.convert(model, config, progress=False)
    assert model.first is model.again
    assert (model.first.bias, model.second.bias) == biases
    names = [name for name, _ in model.first.named_parameters() if name != "bias"]
    assert names
    for name in names:
        assert getattr(model.first, name) is getattr(model.second, name)
    assert [layer.tied_to for layer in report.layers] == [None, "first"]
    assert report.bytes_after == report.layers[0].bytes_after
    x = torch.randn(3, 32)
    expected = model(x)

    infold.save(model, tmp_path / "model.safetensors")
    torch.manual_seed(1)
    for other in (Tied(), copy.deepcopy(model)):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        infold.load_into(other, tmp_path / "model.safetensors")
        assert type(other.second) is type(model.second)
        assert other.first is other.again
        for name in names:
            assert getattr(other.first, name) is getattr(other.second, name)
        assert torch.equal(other(x), expected)
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)


def test_files_of_another_shape_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    infold.convert(model, FrequencyConfig(block=8), progress=False)
    infold.save(model, tmp_path / "model.safetensors")
    other = nn.Sequential(nn.Linear(40, 32))
    before = other[0].weight
    with pytest.raises(ValueError, match=r"0: spectrum: expected torch.float32 \(4, 5, 8\)"):
        infold.load_into(other, tmp_path / "model.safetensors")
    assert other[0].weight is before
    half = nn.Sequential(nn.Linear(32, 32)).half()
    infold.load_into(half, tmp_path / "model.safetensors")
    assert half[0].spectrum.dtype == torch.float16


def test_a_weight_tied_to_an_embedding_stays_dense() -> None:
    config = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    transposed = model.transformer.h[0].mlp.c_fc
    weight = transposed.weight.detach().double().numpy().T
    with pytest.warns(UserWarning, match="lm_head: its weight is tied to transformer.wte"):
        report = infold.convert(model, FrequencyConfig(block=8), progress=False)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "linear layers only" in report.refused["transformer.wpe"]
    new = model.transformer.h[0].mlp.c_fc
    assert isinstance(new, FrequencyLinear)
    np.testing.assert_allclose(new.dense_weight().detach().numpy(), nearest_circulant(weight, 8), atol=1e-6)
    assert torch.equal(new.bias, transposed.bias)
    assert model(torch.randint(0, 60, (2, 5))).logits.shape == (2, 5, 60)


def test_a_weight_that_is_not_finite_stays_dense() -> None:
    for storage in ("float", "log8"):
        model = net()
        with torch.no_grad():
            model[0].weight[3, 5] = math.inf
        with pytest.warns(UserWarning, match="left dense: 0"):
            report = infold.convert(model, FrequencyConfig(block=8, storage=storage), progress=False)  # type: ignore[arg-type]
        assert type(model[0]) is nn.Linear
        assert [layer.name for layer in report.layers] == ["2"]


def test_what_a_layer_carries_stays() -> None:
    model = net(torch.bfloat16).eval()
    model[0].weight.requires_grad_(False)
    model[0].note = "kept"
    weight = weight_of(model[0])
    report = infold.convert(model, FrequencyConfig(block=8), progress=False)
    assert model[0].spectrum.dtype == torch.bfloat16
    assert not model[0].spectrum.requires_grad
    assert model[2].spectrum.requires_grad
    assert model[0].note == "kept"
    assert not model[0].training
    exact = numpy_error(weight, nearest_circulant(weight, 8))
    assert report.layers[0].relative_error == pytest.approx(exact, rel=2e-3)


def test_frequency_layers_are_no_stacked_experts() -> None:
    model = nn.Sequential(FrequencyLinear(64, 64, 8), nn.Linear(64, 64))
    report = infold.convert(model, FusedConfig("int8"), progress=False)
    assert report.refused == {}
    assert [layer.name for layer in report.layers] == ["1"]


@pytest.mark.parametrize("config", [FrequencyConfig(block=6), FrequencyConfig("sparse", density=0.3)])
def test_gradients_of_a_converted_model(config: FrequencyConfig) -> None:
    model = nn.Sequential(nn.Linear(20, 14), nn.Tanh(), nn.Linear(14, 5))
    infold.convert(model, config, progress=False)
    model.double()
    x = torch.randn(4, 20, dtype=torch.float64, requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(model(x).square().sum(), [x, *trained])
    first, second = model[0], model[2]
    hidden = torch.tanh(F.linear(x, first.dense_weight(), first.bias))
    y = F.linear(hidden, second.dense_weight(), second.bias)
    torch.testing.assert_close(got, torch.autograd.grad(y.square().sum(), [x, *trained]), rtol=1e-9, atol=1e-10)
