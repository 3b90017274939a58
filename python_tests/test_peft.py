"""Adapters of FourierFT and C3A against PEFT's own modules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import infold
import pytest
import torch
from infold import nn as infold_nn
from infold import peft as converters
from infold.nn import FrequencyLinear, SparseFrequencyLinear
from peft import C3AConfig, FourierFTConfig, PeftModel, get_peft_model
from peft.tuners.c3a.layer import C3ALinear
from peft.tuners.fourierft.layer import FourierFTLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

#: (in_features, out_features, n_frequency): odd, even, prime, the whole plane, one.
SIZES = [(8, 12, 20), (9, 15, 30), (11, 7, 77), (6, 8, 48), (1, 5, 3), (64, 96, 500)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 32)
        self.blocks = nn.ModuleList([nn.Linear(32, 16), nn.Linear(16, 8)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        for block in self.blocks:
            x = block(x)
        return x


def fourierft(base: nn.Module, n_frequency: int, seed: int = 777, scaling: float = 30.0) -> FourierFTLinear:
    transposed = isinstance(base, Conv1D)
    config = FourierFTConfig(
        n_frequency=n_frequency, random_loc_seed=seed, scaling=scaling, fan_in_fan_out=transposed, init_weights=False
    )
    return FourierFTLinear(base, "default", config=config, n_frequency=n_frequency)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", [777, 3])
def test_fourierft_layers(sizes: tuple[int, int, int], seed: int) -> None:
    inputs, out, count = sizes
    theirs = fourierft(nn.Linear(inputs, out), count, seed)
    spectrum = theirs.fourierft_spectrum["default"]
    ours = converters.from_fourierft(spectrum, inputs, out, 30.0, seed)
    delta = theirs.get_delta_weight("default").detach()
    torch.testing.assert_close(ours.dense_weight().detach(), delta, rtol=1e-5, atol=1e-5 * float(delta.abs().max()))
    x, g = torch.randn(5, inputs), torch.randn(5, out)
    added = theirs(x) - theirs.get_base_layer()(x)
    torch.testing.assert_close(ours(x), added, rtol=1e-4, atol=1e-5)
    # It trains as it does there.
    (expected,) = torch.autograd.grad((added * g).sum(), spectrum)
    (got,) = torch.autograd.grad((ours(x) * g).sum(), ours.coefficients)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))
    torch.testing.assert_close(converters.to_fourierft(ours, 30.0, seed), spectrum.detach(), rtol=1e-6, atol=1e-7)
    other = converters.from_fourierft(converters.to_fourierft(ours, 7.0, seed), inputs, out, 7.0, seed)
    torch.testing.assert_close(other.dense_weight(), ours.dense_weight())


@pytest.mark.parametrize("sizes", [(8, 8, 1), (12, 20, 4), (21, 14, 7), (96, 64, 32), (5, 5, 5)])
def test_c3a_layers(sizes: tuple[int, int, int]) -> None:
    inputs, out, block = sizes
    config = C3AConfig(block_size=block, init_weights="gaussian")
    theirs = C3ALinear(nn.Linear(inputs, out), "default", config=config, block_size=block)
    kernel = theirs.c3a_kernel["default"]
    ours = converters.from_c3a(kernel)
    torch.testing.assert_close(ours.dense_weight(), theirs.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    x = torch.randn(5, inputs)
    torch.testing.assert_close(ours(x), theirs(x) - theirs.get_base_layer()(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(converters.to_c3a(ours), kernel.detach(), rtol=1e-5, atol=1e-6)


def peft_model(kind: str) -> PeftModel:
    torch.manual_seed(1)
    net = Net()
    targets = ["first", "blocks.0", "blocks.1"]
    if kind == "fourierft":
        config = FourierFTConfig(
            n_frequency=20, n_frequency_pattern={"blocks.1": 7}, scaling=40.0, random_loc_seed=5, target_modules=targets
        )
    else:
        config = C3AConfig(
            block_size=8, block_size_pattern={"blocks.0": 16}, target_modules=targets, init_weights="gaussian"
        )
    return get_peft_model(net, config)


@pytest.mark.parametrize("kind", ["fourierft", "c3a"])
def test_checkpoints_are_read_and_written(kind: str, tmp_path: Path) -> None:
    theirs = peft_model(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    base = theirs.get_base_model()
    net = Net()
    state = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in base.state_dict().items()
        if "fourierft" not in name and "c3a" not in name
    }
    net.load_state_dict(state)
    x = torch.randn(3, 24)
    without = net(x)
    adapter = converters.load_adapter(tmp_path / "theirs", net)
    assert torch.equal(net(x), without)
    assert set(adapter) == {"first", "blocks.0", "blocks.1"}
    expected = SparseFrequencyLinear if kind == "fourierft" else FrequencyLinear
    assert {type(layer) for layer in adapter.values()} == {expected}
    converters.save_adapter(tmp_path / "ours", adapter, seed=5)
    # Their file again, and their model reads ours.
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    for key, tensor in load_file(tmp_path / "theirs" / "adapter_model.safetensors").items():
        scale = 40 / json.loads((tmp_path / "ours" / "adapter_config.json").read_text()).get("scaling", 40)
        torch.testing.assert_close(written.pop(key), tensor * scale, rtol=1e-5, atol=1e-6)
    assert not written
    fresh = Net()
    fresh.load_state_dict(state)
    back = PeftModel.from_pretrained(fresh, tmp_path / "ours")
    torch.testing.assert_close(back(x), theirs(x), rtol=1e-4, atol=1e-5)
    converters.attach(net, adapter)
    torch.testing.assert_close(net(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert (net(x) - without).norm() > 0.01 * without.norm()


def test_a_layer_for_peft_is_trained_here_and_read_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    indices = converters.fourierft_indices(24, 32, 50)
    layer = SparseFrequencyLinear(24, 32, indices=indices, bias=False, real=True)
    converters.attach(net, {"first": layer})
    x, target = torch.randn(64, 24), torch.randn(64, 8)
    optimizer = torch.optim.Adam([layer.coefficients], lr=0.1)
    losses = []
    for _ in range(20):
        loss = (net(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    converters.save_adapter(tmp_path, {"first": layer})
    torch.manual_seed(0)
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path)(x), net(x), rtol=1e-4, atol=1e-5)


def test_transposed_and_packed_bases(tmp_path: Path) -> None:
    base = Conv1D(12, 8)
    theirs = fourierft(base, 20)
    spectrum = theirs.fourierft_spectrum["default"].detach()
    save_file({"base_model.model.0.fourierft_spectrum": spectrum}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "FOURIERFT", "scaling": 30.0, "random_loc_seed": 777}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    x = torch.randn(5, 8)
    net = nn.Sequential(base)
    converters.attach(net, converters.load_adapter(tmp_path, net))
    torch.testing.assert_close(net(x), theirs(x), rtol=1e-4, atol=1e-5)
    packed = nn.Sequential(nn.Linear(8, 12))
    expected = packed(x) + converters.from_fourierft(spectrum, 8, 12, 30.0)(x)
    infold.convert(packed, infold.FusedConfig("lossless"))
    assert isinstance(packed[0], infold_nn.FusedDecompressLinear)
    converters.attach(packed, converters.load_adapter(tmp_path, packed))
    torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: converters.fourierft_indices(4, 4, 17), "n_frequency: expected 1 to 16, got 17"),
        (lambda: converters.from_fourierft(torch.zeros(2, 2), 4, 4), r"spectrum: expected \(n_frequency,\)"),
        (lambda: converters.from_c3a(torch.zeros(4, 4)), r"kernel: expected \(output blocks"),
        (lambda: converters.to_c3a(FrequencyLinear(10, 8, 4, bias=False)), "in_features: expected a multiple"),
        (lambda: converters.to_c3a(FrequencyLinear(8, 8, 4)), "layer: expected none with a bias"),
        (lambda: converters.to_fourierft(SparseFrequencyLinear(8, 8, 0.5, bias=False)), "layer: expected real"),
        (lambda: converters.to_fourierft(SparseFrequencyLinear(8, 8, 0.5, real=True)), "layer: expected none with"),
        (
            lambda: converters.to_fourierft(SparseFrequencyLinear(8, 8, 0.5, bias=False, real=True)),
            "indices: expected those of",
        ),
        (lambda: converters.save_adapter("nowhere", {}), "adapter: expected SparseFrequencyLinear or"),
        (lambda: converters.save_adapter("nowhere", {"a": nn.Linear(2, 2)}), r"got \['Linear'\]"),
    ],
)
def test_wrong_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_wrong_checkpoints_are_named(tmp_path: Path) -> None:
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="peft_type: expected one of FOURIERFT, C3A, got LORA"):
        converters.load_adapter(tmp_path, Net())
    config.write_text('{"peft_type": "C3A"}')
    with pytest.raises(FileNotFoundError):
        converters.load_adapter(tmp_path, Net())
    save_file({"base_model.model.first.c3a_kernel": torch.zeros(2, 2, 8)}, weights)
    with pytest.raises(ValueError, match=r"first: expected a kernel for \(24, 32\) features, got shape \[2, 2, 8\]"):
        converters.load_adapter(tmp_path, Net())
    save_file({"base_model.model.blocks.c3a_kernel": torch.zeros(2, 2, 8)}, weights)
    with pytest.raises(ValueError, match="expected a linear layer where the adapter is, got a ModuleList"):
        converters.load_adapter(tmp_path, Net())
    save_file({"base_model.model.first.lora_A": torch.zeros(2)}, weights)
    with pytest.raises(ValueError, match=r"got base_model\.model\.first\.lora_A"):
        converters.load_adapter(tmp_path, Net())


def test_peft_is_not_imported() -> None:
    code = "import sys, infold, infold.peft; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
