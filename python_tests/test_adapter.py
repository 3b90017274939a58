"""Adapters beside frozen layers, dense and packed, against the dense operators they stand for."""

from __future__ import annotations

import copy
from pathlib import Path

import infold
import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS
from infold.nn import FrequencyAdapter, FusedDecompressLinear, adapter_state_dict, add_adapters
from torch import Tensor, nn


def base_of(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(40, 24, dtype=dtype)
    return linear if kind == "dense" else FusedDecompressLinear.from_linear(linear, CONFIGS[kind])


def dense_weight(base: nn.Module) -> Tensor:
    return base.weight.detach()


def circulant(adapter: FrequencyAdapter) -> Tensor:
    """V, column by column: what unit vectors are mapped to."""
    return adapter.adapter(torch.eye(adapter.in_features)).detach().T


def train(model: nn.Module, steps: int = 5, learning_rate: float = 0.05) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(torch.randn(8, 40, generator=generator))
        (y - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["dense", *CONFIGS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_its_base(kind: str, dtype: torch.dtype) -> None:
    base = base_of(kind, dtype)
    x = torch.randn(2, 3, 40, dtype=dtype)
    expected = base(x).detach()
    adapter = FrequencyAdapter(base, block=8)
    assert (adapter.in_features, adapter.out_features, adapter(x).dtype) == (40, 24, dtype)
    assert adapter.adapter.spectrum.dtype == torch.float32
    assert torch.equal(adapter(x).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("kind", ["dense", *CONFIGS])
def test_the_adapter_alone_trains(kind: str) -> None:
    adapter = FrequencyAdapter(base_of(kind), block=8)
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ["adapter.spectrum"]
    before = copy.deepcopy(adapter.base.state_dict())
    train(adapter)
    after = adapter.base.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert adapter.adapter.spectrum.detach().norm() > 0.1
    x = torch.randn(5, 40)
    expected = F.linear(x, dense_weight(adapter.base) + circulant(adapter), adapter.base.bias)
    torch.testing.assert_close(adapter(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", *CONFIGS])
def test_gradients_reach_it_through_a_frozen_layer(kind: str) -> None:
    """An adapter below a frozen layer, and one beside it, against autograd on dense weights."""
    torch.manual_seed(0)
    below = FrequencyAdapter(nn.Linear(40, 40), block=8)
    beside = FrequencyAdapter(base_of(kind), block=8)
    for adapter in (below, beside):
        nn.init.normal_(adapter.adapter.spectrum, std=0.1)
    x, g = torch.randn(6, 40), torch.randn(6, 24)
    (beside(below(x).tanh()) * g).sum().backward()

    spectra = [a.adapter.spectrum.detach().double().requires_grad_() for a in (below, beside)]
    weights = [
        dense_weight(a.base).double()
        + infold.spectral.dense(infold.spectral.unpack_spectrum(s), a.out_features, a.in_features)
        for a, s in zip((below, beside), spectra, strict=True)
    ]
    hidden = F.linear(x.double(), weights[0], below.base.bias.detach().double()).tanh()
    (F.linear(hidden, weights[1]) * g.double()).sum().backward()
    for adapter, spectrum in zip((below, beside), spectra, strict=True):
        torch.testing.assert_close(adapter.adapter.spectrum.grad.double(), spectrum.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("block", "bias"), [(8, True), (8, False), (7, True)])
def test_merge_is_the_sum(block: int, bias: bool) -> None:
    torch.manual_seed(0)
    adapter = FrequencyAdapter(nn.Linear(40, 24, bias), block).eval()
    nn.init.normal_(adapter.adapter.spectrum, std=0.1)
    merged = adapter.merge()
    assert type(merged) is nn.Linear
    assert not merged.training
    assert merged.bias is adapter.base.bias
    torch.testing.assert_close(merged.weight, adapter.base.weight + circulant(adapter), rtol=1e-5, atol=1e-6)
    x = torch.randn(3, 40)
    torch.testing.assert_close(merged(x), adapter(x), rtol=1e-4, atol=1e-5)


def test_a_packed_base_is_merged_through_its_dense_layer() -> None:
    adapter = FrequencyAdapter(base_of("ecsq"), block=8)
    nn.init.normal_(adapter.adapter.spectrum, std=0.1)
    with pytest.raises(ValueError, match=r"base: expected an nn\.Linear to merge into, got a FusedDecompressLinear"):
        adapter.merge()
    dense = FrequencyAdapter(adapter.base.to_linear(), block=8)
    dense.adapter.load_state_dict(adapter.adapter.state_dict())
    x = torch.randn(3, 40)
    torch.testing.assert_close(dense.merge()(x), adapter(x), rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    """A layer in two places, one of each kind, and an embedding that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(40, 40)
        self.again = self.first
        self.table = nn.Embedding(5, 40)
        self.inner = nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.LayerNorm(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.again(self.first(x)))


@pytest.mark.parametrize("packed", [False, True])
def test_a_models_adapters(packed: bool) -> None:
    torch.manual_seed(0)
    model = Tied()
    if packed:
        infold.convert(model, infold.FusedConfig("lossless"), progress=False)
    x = torch.randn(4, 40)
    expected = model(x).detach()
    twin = copy.deepcopy(model)
    adapters = add_adapters(model, block=8)
    assert list(adapters) == ["first", "inner.0"]
    assert model.again is model.first is adapters["first"]
    assert torch.equal(model(x), expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"first.adapter.spectrum", "inner.0.adapter.spectrum"}
    train(model)
    assert not torch.allclose(model(x), expected, atol=1e-2)

    state = adapter_state_dict(model)
    assert set(state) == trained
    assert sum(tensor.numel() for tensor in state.values()) == 5 * 5 * 8 + 3 * 5 * 8
    assert set(state) <= set(model.state_dict())
    add_adapters(twin, block=8)
    loaded = twin.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    assert torch.equal(twin(x), model(x))
    with pytest.raises(ValueError, match="found none"):
        add_adapters(twin)


def test_adapters_beside_some_layers() -> None:
    model = Tied()
    assert list(add_adapters(model, 8, lambda module, name: name.startswith("inner"))) == ["inner.0"]
    # The others of the model are frozen all the same.
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["inner.0.adapter.spectrum"]
    assert list(add_adapters(model, 8)) == ["first"]


def test_a_model_that_trains_on_is_saved_with_its_adapters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    infold.convert(model, infold.FusedConfig("ecsq", bits=4), progress=False)
    add_adapters(model, block=8)
    train(model)
    infold.save(model, tmp_path / "model.safetensors")
    other = Tied()
    add_adapters(other, block=8)
    infold.load_into(other, tmp_path / "model.safetensors")
    x = torch.randn(4, 40)
    assert torch.equal(other(x), model(x))


def test_compiles_and_exports() -> None:
    model = nn.Sequential(FrequencyAdapter(base_of("lossless"), block=8), nn.Tanh())
    nn.init.normal_(model[0].adapter.spectrum, std=0.1)
    x = torch.randn(3, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_what_is_no_base_is_refused() -> None:
    with pytest.raises(ValueError, match="base: expected a module with in_features and out_features, got a Conv1d"):
        FrequencyAdapter(nn.Conv1d(2, 2, 3))
    with pytest.raises(ValueError, match="block: expected a positive integer, got 0"):
        FrequencyAdapter(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="model: expected a module that contains layers, got a Linear"):
        add_adapters(nn.Linear(2, 2))
    model = nn.Sequential(nn.Tanh(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected a linear layer without an adapter that filter_fn takes, found none"):
        add_adapters(model, 2, lambda module, name: False)
    assert all(p.requires_grad for p in model.parameters())
