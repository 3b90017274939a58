"""The layouts in memory: exact, shared, invisible in state dicts and files."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import infold
import pytest
import torch
from infold import FusedConfig
from infold.nn import FusedDecompressEmbedding, FusedDecompressLinear, PackedModule
from torch import Tensor, nn

CONFIGS = {
    "lossless": {},
    "ecsq": {"format": "ecsq", "bits": 4},
    "int8": {"format": "int8"},
    "int4": {"format": "int4", "group_size": 64},
}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, 96)
        self.middle = nn.Linear(96, 96)
        self.head = nn.Linear(96, 200, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(indices)))  # type: ignore[no-any-return]


def converted(layout: str, name: str = "lossless", **options: object) -> Tied:
    torch.manual_seed(0)
    model = Tied().bfloat16()
    infold.convert(model, FusedConfig(**CONFIGS[name], layout=layout, **options), progress=False)  # type: ignore[arg-type]
    return model


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


INDICES = torch.arange(0, 200, 7)


@pytest.mark.parametrize("name", CONFIGS)
def test_layouts_compute_the_same_bits(name: str) -> None:
    compact, fast = converted("compact", name), converted("fast", name)
    for module in packed_modules(fast).values():
        assert module.layout == "fast"
    assert torch.equal(compact(INDICES), fast(INDICES))
    assert torch.equal(compact(INDICES[:1]), fast(INDICES[:1]))
    for key, module in packed_modules(compact).items():
        assert torch.equal(module.unpack(), fast.get_submodule(key).unpack())


def test_gradients_do_not_depend_on_the_layout() -> None:
    gradients = []
    for layout in ("compact", "fast"):
        model = converted(layout, "ecsq", trainable_scales=True)
        model(INDICES).float().square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 3  # two scales, one bias
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dicts_hold_the_canonical_form(name: str) -> None:
    compact, fast = converted("compact", name), converted("fast", name)
    assert same_state(compact, fast)
    # And load into either.
    other = converted("fast", "int8" if name == "lossless" else "lossless")
    other.load_state_dict(compact.state_dict())
    assert {module.layout for module in packed_modules(other).values()} == {"fast"}
    assert torch.equal(other(INDICES), fast(INDICES))
    assert same_state(other, compact)


def test_a_held_state_dict_does_not_outlive_what_it_was_of() -> None:
    states = [converted("compact", name).state_dict() for name in ("lossless", "int8")]
    model = converted("fast")
    held = []
    for step in range(12):
        for state in (states[step % 2], states[(step + 1) % 2]):
            model.load_state_dict(state)
        held.append(model.state_dict())
        assert all(torch.equal(held[-1][name], tensor) for name, tensor in state.items())


def test_preparing_goes_both_ways_and_keeps_ties() -> None:
    model = converted("compact")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(INDICES)
    resident = sum(p.numel() * p.element_size() for p in model.parameters())
    assert set(infold.prepare(model, "fast").values()) == {"fast"}
    assert sum(p.numel() * p.element_size() for p in model.parameters()) > resident
    assert isinstance(model.embed, FusedDecompressEmbedding)
    assert isinstance(model.head, FusedDecompressLinear)
    assert model.embed.payload is model.head.payload
    assert torch.equal(model(INDICES), expected)
    state = model.state_dict()
    assert state["embed.payload"].data_ptr() == state["head.payload"].data_ptr()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert set(infold.prepare(model, "compact").values()) == {"compact"}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_auto_keeps_its_budget_and_says_what_it_took() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024, dtype=torch.bfloat16) for _ in range(3)))
    report = infold.convert(model, FusedConfig(layout="compact"), progress=False)
    least = report.resident_bytes
    assert least == report.bytes_after
    # Room for one of three, whatever the measurement says.
    one = least // 3 * 13 // 100
    layouts = infold.prepare(model, "auto", budget=least + one + least // 100)
    assert list(layouts.values()).count("fast") <= 1
    taken = sum(module.packed.nbytes for module in packed_modules(model).values())
    assert taken <= least + one + least // 100
    with pytest.raises(ValueError, match=f"budget: expected at least {least} bytes, got 7"):
        infold.prepare(model, budget=7)
    with pytest.raises(
        ValueError, match="layout: expected auto, compact or fast, or window, codes, pairs or raw on CUDA, got 'quick'"
    ):
        infold.prepare(model, "quick")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layout: expected auto, compact or fast on the CPU, got 'pairs'"):
        infold.prepare(model, "pairs")


def test_the_report_counts_what_is_stored_and_what_is_resident() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, dtype=torch.bfloat16))
    report = infold.convert(model, FusedConfig(layout="fast"), progress=False)
    (layer,) = report.layers
    assert layer.layout == "fast"
    assert layer.bytes_after < layer.resident_bytes < layer.bytes_before
    assert layer.resident_bytes == model[0].packed.nbytes
    assert "fast" in str(report)
    assert f"{8 * layer.bytes_after / layer.parameters:.2f}" in str(report)


def test_files_remember_the_layout(tmp_path: Path) -> None:
    compact, fast = converted("compact"), converted("fast")
    infold.save(fast, tmp_path / "fast.safetensors")
    infold.save(compact, tmp_path / "compact.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("fast", "compact")]
    assert abs(sizes[0] - sizes[1]) < 200
    for target in (Tied().bfloat16(), converted("compact", "int8")):
        infold.load_into(target, tmp_path / "fast.safetensors")
        assert {module.layout for module in packed_modules(target).values()} == {"fast"}
        assert torch.equal(target(INDICES), fast(INDICES))
        assert target.embed.payload is target.head.payload


def test_copies_and_pickles_keep_the_layout() -> None:
    fast = converted("fast", "ecsq")
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert {module.layout for module in packed_modules(copied).values()} == {"fast"}
        assert torch.equal(copied(INDICES), fast(INDICES))
        assert same_state(copied, fast)


def test_a_budget_is_bytes_for_auto() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    infold.convert(model, FusedConfig(), progress=False)
    with pytest.raises(TypeError, match="budget: expected bytes"):
        infold.prepare(model, budget="1GB")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget: expected only with layout 'auto'"):
        infold.prepare(model, "fast", budget=10)
