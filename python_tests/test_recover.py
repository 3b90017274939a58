"""Recovery of converted models: it helps, never hurts, and says what it did."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import infold
import numpy as np
import pytest
import torch
import transformers
from infold import FrequencyConfig, FusedConfig, RecoveryConfig
from infold.activations import call
from torch import Tensor, nn

SHORT = RecoveryConfig(layer_steps=60, steps=60, layer_rate=1e-2, rate=1e-2, layer_batch=128)


class Net(nn.Module):
    """Two linear layers with dropout and a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 32), nn.Linear(32, 8)
        self.norm, self.drop = nn.LayerNorm(32), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(torch.relu(self.norm(self.first(x)))))


def models(config: Any = None) -> tuple[nn.Module, nn.Module]:
    """A converted model and its teacher, both training."""
    torch.manual_seed(0)
    teacher = Net()
    model = copy.deepcopy(teacher)
    infold.convert(model, config or FrequencyConfig(block=4, compare=False), progress=False)
    return model, teacher


def batches(count: int = 10, seed: int = 0) -> list[Tensor]:
    """Rows that lie near to a few directions, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 24, generator=generator) * torch.logspace(0.5, -1.5, 24)
    return [torch.randn(64, 24, generator=generator) @ mixing.T for _ in range(count)]


def recover(model: nn.Module, teacher: nn.Module, *arguments: Any, **options: Any) -> infold.RecoveryReport:
    return infold.recover(model, teacher, *arguments, progress=False, **options)


@torch.no_grad()
def held_out_loss(model: nn.Module, teacher: nn.Module, held_out: list[Tensor]) -> float:
    """The metric, computed apart."""
    model, teacher = copy.deepcopy(model).eval(), copy.deepcopy(teacher).eval()
    losses = []
    for batch in held_out:
        ours, exact = (m(batch).double().numpy() for m in (model, teacher))
        losses.append(((ours - exact) ** 2).sum() / (exact**2).sum())
    return float(np.mean(losses))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_helps_and_keeps_the_best_state() -> None:
    model, teacher = models()
    data = batches()
    before, dense = held_out_loss(model, teacher, data[8:]), state(teacher)
    norm = state(model.norm)
    report = recover(model, teacher, data, SHORT)
    assert report.loss_before == pytest.approx(before, rel=1e-4)
    assert report.loss_after == pytest.approx(held_out_loss(model, teacher, data[8:]), rel=1e-4)
    assert report.loss_after == min(point.held_out_loss for point in report.history)
    assert report.loss_after < 0.5 * report.loss_before
    assert report.loss_after_layers < report.loss_before
    assert [layer.name for layer in report.layers] == ["first", "second"]
    assert all(layer.error_after < layer.error_before for layer in report.layers)
    assert equal(state(teacher), dense)
    assert equal(state(model.norm), norm)
    # Nothing else about the models has changed.
    assert all(module.training for m in (model, teacher) for module in m.modules())
    assert all(p.requires_grad and p.grad is None for m in (model, teacher) for p in m.parameters())


@pytest.mark.parametrize("config", [FrequencyConfig(block=4, compare=False), FrequencyConfig("sparse", density=0.25)])
def test_a_layer_by_itself_comes_near_to_the_least_squares_solution(config: FrequencyConfig) -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(24, 16))
    model = copy.deepcopy(teacher)
    infold.convert(model, config, progress=False)
    data = batches(20)
    budget = RecoveryConfig(layer_steps=1500, layer_rate=2e-2, steps=0, evaluations=20, patience=20)
    (layer,) = recover(model, teacher, data, budget).layers
    # The map from a layer's numbers to its outputs is linear: its columns, by units.
    x = torch.cat(data[:16]).double()
    fresh = copy.deepcopy(model).double()
    numbers = [p for p in fresh.parameters() if p.requires_grad]
    columns = []
    with torch.no_grad():
        for p in numbers:
            p.zero_()
        for p in numbers:
            for index in range(p.numel()):
                p.view(-1)[index] = 1
                columns.append(fresh(x).flatten().numpy())
                p.view(-1)[index] = 0
        design, target = np.stack(columns, 1), teacher(torch.cat(data[:16])).double().numpy().ravel()
        best = np.linalg.lstsq(design, target, rcond=None)[0]
        left = np.linalg.norm(design @ best - target) / np.linalg.norm(target)
    assert layer.error_after < layer.error_before
    assert layer.error_after == pytest.approx(left, rel=0.1)


@pytest.mark.parametrize("stages", [{"steps": 0}, {"layer_steps": 0}, {}])
def test_it_never_makes_a_model_worse(stages: dict[str, int]) -> None:
    model, teacher = models()
    before = state(model)
    budget = RecoveryConfig(**{"layer_steps": 20, "steps": 20, "layer_rate": 1e3, "rate": 1e3, **stages})
    report = recover(model, teacher, batches(), budget)
    assert report.loss_after == report.loss_before
    assert equal(state(model), before)


def test_patience_and_time_end_it() -> None:
    model, teacher = models()
    report = recover(model, teacher, batches(), RecoveryConfig(layer_steps=0, steps=100, rate=1e3, patience=2))
    assert (report.stopped, report.steps) == ("patience", 20)
    report = recover(model, teacher, batches(), RecoveryConfig(steps=10**6, layer_steps=10**6, seconds=1.0))
    assert report.stopped == "seconds"
    assert 0 < report.steps < 10**6
    assert all(layer.stopped == "seconds" for layer in report.layers)
    assert report.loss_after <= report.loss_before


def test_it_goes_on_where_it_was() -> None:
    model, teacher = models()
    data = batches()
    first = recover(model, teacher, data[:8], SHORT, held_out=data[8:])
    second = recover(model, teacher, data[:8], SHORT, held_out=data[8:])
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-6)
    assert second.loss_after <= second.loss_before


def test_a_seed_decides() -> None:
    states = []
    for seed in (0, 0, 1):
        model, teacher = models()
        torch.manual_seed(len(states))
        random = torch.get_rng_state()
        recover(model, teacher, batches(), RecoveryConfig(layer_steps=5, steps=5, seed=seed))
        assert torch.equal(torch.get_rng_state(), random)
        states.append(state(model))
    assert equal(states[0], states[1])
    assert not equal(states[0], states[2])


def test_an_exception_leaves_the_best_state() -> None:
    model, teacher = models()
    model.norm.weight.requires_grad_(False)
    calls = 0

    def loss(student: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 60:
            raise KeyboardInterrupt
        return (student - target).square().mean()

    data = batches()
    start = held_out_loss(model, teacher, data[8:])
    budget = RecoveryConfig(layer_steps=0, steps=200, rate=1e-2, evaluations=50)
    with pytest.raises(KeyboardInterrupt):
        recover(model, teacher, data, budget, loss=loss)
    assert held_out_loss(model, teacher, data[8:]) < start
    assert model.training
    assert not model.norm.weight.requires_grad
    assert model.first.spectrum.requires_grad


def test_a_loss_that_is_no_number_ends_it() -> None:
    model, teacher = models()
    calls = 0

    def loss(student: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (student - target).square().mean() * (math.nan if calls > 8 else 1)

    report = recover(model, teacher, batches(), RecoveryConfig(layer_steps=0, steps=50), loss=loss)
    assert report.stopped == "not finite"
    assert math.isfinite(report.loss_after)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(ValueError, match="loss: expected a finite one at the start"):
        recover(model, teacher, batches(), SHORT, loss=lambda a, b: (a - b).sum() * math.nan)


def test_the_teachers_inputs_and_all_parameters() -> None:
    model, teacher = models()
    norm = state(model.norm)
    changes = {"inputs": "teacher", "parameters": "all", "layer_steps": 40, "steps": 40, "rate": 1e-2}
    report = recover(model, teacher, batches(), RecoveryConfig(**changes))  # type: ignore[arg-type]
    assert report.loss_after < report.loss_before
    assert not equal(state(model.norm), norm)


@pytest.mark.parametrize(
    ("config", "trains"),
    [
        (FrequencyConfig(block=4, storage="log8"), {"first.bias", "second.bias"}),
        (FusedConfig("int4", group_size=64, trainable_scales=True), {"first.scales", "first.bias"}),
    ],
)
def test_what_is_frozen_by_its_form_stays(config: Any, trains: set[str]) -> None:
    model, teacher = models(config)
    before = state(model)
    report = recover(model, teacher, batches(), RecoveryConfig(layer_steps=30, steps=30, rate=1e-3, layer_rate=1e-3))
    after = state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert trains <= changed
    assert not any(name.endswith(("codes", "words", "payload")) for name in changed)
    assert report.loss_after < report.loss_before


def bert(layers: int = 1) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def test_a_transformers_model_without_its_padding() -> None:
    torch.manual_seed(0)
    teacher = bert()
    model = copy.deepcopy(teacher)
    config = FrequencyConfig(block=4, compare=False)
    infold.convert(model, config, lambda module, name: name.startswith("encoder"), progress=False)
    data = []
    for _ in range(6):
        mask = (torch.arange(12) < torch.randint(4, 13, (8, 1))).long()
        data.append({"input_ids": torch.randint(0, 50, (8, 12)), "attention_mask": mask})
    rows = call(teacher, data[0])
    assert rows.shape == (int(data[0]["attention_mask"].sum()), 32)
    mask = data[0]["attention_mask"].bool()
    torch.testing.assert_close(rows, teacher(**data[0]).last_hidden_state[mask])
    report = recover(model, teacher, data, RecoveryConfig(layer_steps=20, steps=20, layer_rate=1e-2))
    assert len(report.layers) == 6
    assert report.loss_after < report.loss_before


def test_half_precision() -> None:
    model, teacher = models()
    data = [1e3 * batch.bfloat16() for batch in batches()]
    report = recover(model.bfloat16(), teacher.bfloat16(), data, RecoveryConfig(layer_steps=30, steps=30))
    assert report.loss_after < report.loss_before
    assert model.first.spectrum.dtype == torch.bfloat16


def test_batches_of_every_form() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Any:
            return {"loss": None, "logits": a + b}

    a, b = torch.ones(2, 3), torch.ones(2, 3)
    for batch in ((a, b), [a, b], {"a": a, "b": b}):
        torch.testing.assert_close(call(Two(), batch), a + b)
    torch.testing.assert_close(call(nn.Identity(), a), a)
    with pytest.raises(ValueError, match="model: expected a float tensor as output, got Tensor"):
        call(nn.Identity(), torch.ones(2, 3).long())

    class Tuple(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return None, self.inner(x)

    model, teacher = models()
    outer, exact = Tuple(model), Tuple(teacher)
    with pytest.raises(ValueError, match="pass `forward`"):
        recover(outer, exact, batches(), SHORT)
    report = recover(outer, exact, batches(), SHORT, forward=lambda m, batch: m(batch)[1])
    assert report.loss_after < report.loss_before


def generated() -> Iterator[Tensor]:
    yield from batches(4)


def test_the_report(tmp_path: Path) -> None:
    model, teacher = models()
    report = recover(model, teacher, generated(), RecoveryConfig(layer_steps=10, steps=10))
    text = str(report)
    assert "second" in text
    assert "held-out loss" in text
    parsed = json.loads(report.to_json(tmp_path / "report.json"))
    assert parsed["loss_after"] == report.loss_after
    assert parsed["layers"][0]["steps"] == report.layers[0].steps
    assert parsed == json.loads((tmp_path / "report.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": "both"}, "inputs: expected one of student, teacher"),
        ({"parameters": "none"}, "parameters: expected one of converted, all"),
        ({"steps": -1}, "steps: expected 0 or more, got -1"),
        ({"rate": 0}, "rate: expected a positive number, got 0"),
        ({"seconds": math.inf}, "seconds: expected a positive number, got inf"),
        ({"patience": 0}, "patience: expected a positive number"),
    ],
)
def test_budgets_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecoveryConfig(**options)


def test_wrong_arguments_are_named() -> None:
    model, teacher = models()
    with pytest.raises(ValueError, match="model: expected layers that take the place of the teacher's"):
        recover(copy.deepcopy(teacher), teacher, batches())
    with pytest.raises(ValueError, match="batches: expected two or more"):
        recover(model, teacher, batches(1))
    with pytest.raises(ValueError, match="batches: expected some to learn from"):
        recover(model, teacher, batches(1), held_out=[])
    teacher = nn.Sequential(nn.Linear(8, 8, bias=False))
    frozen = copy.deepcopy(teacher)
    infold.convert(frozen, FrequencyConfig(block=4, storage="log8"), progress=False)
    with pytest.raises(ValueError, match="got frozen ones only"):
        recover(frozen, teacher, [torch.randn(2, 8)] * 2)

    teacher = Net()
    model = copy.copy(teacher)
    model._modules = dict(teacher._modules)
    infold.convert(model, FrequencyConfig(block=4), progress=False)
    with pytest.raises(ValueError, match="teacher: expected parameters of its own"):
        recover(model, teacher, batches(), SHORT)

    class Unused(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.zeros(len(x), 32) + x.sum())

    teacher = Unused()
    model = copy.deepcopy(teacher)
    infold.convert(model, FrequencyConfig(block=4), progress=False)
    with pytest.raises(ValueError, match="first: expected the model to call it"):
        recover(model, teacher, batches(), SHORT)
