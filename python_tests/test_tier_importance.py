"""Importance of units and pruning, against formulas in NumPy and plain loops over examples."""

from __future__ import annotations

import copy
import math

import infold
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from infold import FusedConfig
from infold.tiers import (
    AdamStateAnalyzer,
    FisherAnalyzer,
    GradientEma,
    ImportanceSource,
    bitter7_scores,
    prune_,
    units,
)
from torch import Tensor, nn


class Tied(nn.Module):
    """An embedding whose table is also the head's weight, and a layer between that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.layer, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.again = self.layer
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, indices: Tensor) -> Tensor:
        x = self.again(torch.tanh(self.layer(self.table(indices))))
        return self.head(self.norm(x))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied()


def batch_for(model: nn.Module, count: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, Tied):
        return tuple(torch.randint(11, (count,), generator=generator) for _ in range(2))  # type: ignore[return-value]
    return torch.randn(count, 5, generator=generator), torch.randint(3, (count,), generator=generator)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def mean_by_unit(model: nn.Module, squares: dict[str, np.ndarray]) -> dict[str, float]:
    """Sum over elements by their number, from arrays by parameter name."""
    result = {}
    for unit in units(model):
        own = [squares[name].ravel() for name in unit.parameters if name in squares]
        result[unit.name] = float(np.concatenate(own).mean())
    return result


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, np.ndarray]:
    model.zero_grad()
    loss_fn(model, batch).backward()
    return {name: p.grad.double().numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [net, tied])
@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
@pytest.mark.parametrize("state", ["exp_avg_sq", "exp_avg"])
def test_adam_scores_are_moments_of_the_gradients(make, optimizer_class, state) -> None:
    # A learning rate of zero: gradients are then those of the first weights, and the recursion is NumPy's.
    model = make()
    optimizer = optimizer_class(model.parameters(), lr=0.0, betas=(0.8, 0.95))
    moment: dict[str, np.ndarray] = {}
    beta = 0.95 if state == "exp_avg_sq" else 0.8
    for step in range(4):
        for name, g in gradients(model, batch_for(model, seed=step)).items():
            value = g**2 if state == "exp_avg_sq" else g
            moment[name] = beta * moment.get(name, 0.0) + (1 - beta) * value
        optimizer.step()
    corrected = {name: m / (1 - beta**4) for name, m in moment.items()}
    squares = corrected if state == "exp_avg_sq" else {name: m**2 for name, m in corrected.items()}
    scores = AdamStateAnalyzer(state)(model, optimizer)
    expected = mean_by_unit(model, squares)
    assert scores.keys() == expected.keys()
    assert all(score == pytest.approx(expected[name], rel=1e-5) for name, score in scores.items())


def test_each_group_is_corrected_by_its_own_beta_and_step() -> None:
    model = net()
    late = model[2]
    optimizer = torch.optim.Adam([{"params": model[0].parameters(), "betas": (0.9, 0.5)}], lr=0.0)
    first = gradients(model, batch_for(model))
    optimizer.step()
    optimizer.add_param_group({"params": late.parameters(), "betas": (0.9, 0.9)})
    gradients(model, batch_for(model))
    optimizer.step()
    # The same gradient at every step: a corrected average is its square, whatever β and t.
    expected = mean_by_unit(model, {name: g**2 for name, g in first.items()})
    scores = AdamStateAnalyzer()(model, optimizer)
    assert scores == pytest.approx(expected, rel=1e-5)


def test_a_step_that_is_an_int_is_read_as_well() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    gradients(model, batch_for(model))
    optimizer.step()
    before = AdamStateAnalyzer()(model, optimizer)
    for state in optimizer.state.values():
        state["step"] = int(state["step"])
    assert AdamStateAnalyzer()(model, optimizer) == before


def test_units_without_state_are_left_out_and_named() -> None:
    model = net()
    optimizer = torch.optim.Adam(model[0].parameters())
    with pytest.raises(ValueError, match="got none; has it stepped"):
        AdamStateAnalyzer()(model, optimizer)
    gradients(model, batch_for(model))
    optimizer.step()
    analyzer = AdamStateAnalyzer()
    with pytest.warns(UserWarning, match="without exp_avg_sq have no score: 2"):
        assert list(analyzer(model, optimizer)) == ["0"]
    assert analyzer.missing == ("2",)
    model[2].requires_grad_(False)
    # Frozen units are expected to have none.
    assert list(analyzer(model, optimizer)) == ["0"]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sgd.step()
    with pytest.raises(ValueError, match="exp_avg_sq"):
        analyzer(model, sgd)
    with pytest.raises(ValueError, match="state: expected one of"):
        AdamStateAnalyzer("max_exp_avg_sq")


@pytest.mark.parametrize("make", [net, tied])
@pytest.mark.parametrize("method", ["vmap", "loop", "auto"])
def test_fisher_is_the_mean_of_squared_gradients_of_single_examples(make, method) -> None:
    model = make().train()
    batch = batch_for(model, 9)
    squares: dict[str, np.ndarray] = {}
    for i in range(9):
        for name, g in gradients(model, (batch[0][i : i + 1], batch[1][i : i + 1])).items():
            squares[name] = squares.get(name, 0.0) + g**2 / 9
    model.zero_grad()
    parts = [tuple(leaf[:5] for leaf in batch), tuple(leaf[5:] for leaf in batch)]
    analyzer = FisherAnalyzer(loss_fn, method=method, chunk=2)
    scores = analyzer(model, parts)
    assert scores == pytest.approx(mean_by_unit(model, squares), rel=1e-4)
    diagonal = analyzer.diagonal(model, parts)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(diagonal[parameter].numpy(), squares[name], rtol=1e-4, atol=1e-9)
    assert model.training
    assert all(type(p) is nn.Parameter for m in model.modules() for p in m._parameters.values() if p is not None)
    assert all(p.grad is None for p in model.parameters())


def test_fisher_falls_back_where_torch_func_cannot_go() -> None:
    # Infold's own operators are C++ autograd functions, which torch.func refuses.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    infold.convert(model, {"0": FusedConfig("int8")}, progress=False)
    batch = torch.randn(4, 64), torch.randint(3, (4,))
    with pytest.raises(RuntimeError):
        FisherAnalyzer(loss_fn, method="vmap")(model, [batch])
    scores = FisherAnalyzer(loss_fn)(model, [batch])
    assert scores == FisherAnalyzer(loss_fn, method="loop")(model, [batch])
    assert scores["2"] > 0


def test_fisher_gives_unused_units_zero_and_frozen_ones_nothing() -> None:
    model = net()
    model.add_module("unused", nn.Linear(2, 2))
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    model[0].requires_grad_(False)
    for method in ("vmap", "loop"):
        analyzer = FisherAnalyzer(loss_fn, method=method)
        scores = analyzer(model, [batch_for(net())])
        assert scores["unused"] == 0
        assert scores["2"] > 0
        assert analyzer.missing == ("0",)


def test_fisher_refuses_bad_input() -> None:
    model = net()
    batch = batch_for(model)
    with pytest.raises(ValueError, match="method: expected one of"):
        FisherAnalyzer(loss_fn, method="exact")
    with pytest.raises(ValueError, match="chunk: expected a positive"):
        FisherAnalyzer(loss_fn, chunk=0)
    with pytest.raises(ValueError, match="batches: expected one example"):
        FisherAnalyzer(loss_fn)(model, [])
    with pytest.raises(ValueError, match=r"as many examples in every tensor, got \[3, 8\]"):
        FisherAnalyzer(loss_fn)(model, [(batch[0], batch[1][:3])])
    for method in ("vmap", "loop"):
        with pytest.raises(ValueError, match=r"expected a scalar, got shape \(1, 3\)"):
            FisherAnalyzer(lambda model, batch: model(batch[0]), method=method)(model, [batch])
    with pytest.raises(ValueError, match="expected a parameter that trains"):
        FisherAnalyzer(loss_fn)(model.requires_grad_(False), [batch])


@pytest.mark.parametrize("make", [net, tied])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradient_ema_is_the_corrected_average_of_whole_gradients(make, accumulation) -> None:
    model = make()
    average: dict[str, np.ndarray] = {}
    with GradientEma(model, 0.7, accumulation=accumulation) as ema:
        for step in range(4):
            model.zero_grad()
            for part in range(accumulation):
                loss_fn(model, batch_for(model, seed=10 * step + part)).backward()
            for name, p in model.named_parameters():
                average[name] = 0.7 * average.get(name, 0.0) + 0.3 * p.grad.double().numpy() ** 2
        scores = ema.scores()
    expected = mean_by_unit(model, {name: value / (1 - 0.7**4) for name, value in average.items()})
    assert scores == pytest.approx(expected, rel=1e-5)
    # The hooks are gone, the scores are not.
    loss_fn(model, batch_for(model)).backward()
    assert ema.scores() == scores
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_gradient_ema_takes_sparse_gradients_and_counts_each_parameter_by_itself() -> None:
    torch.manual_seed(0)
    dense, sparse = nn.Embedding(9, 4), nn.Embedding(9, 4, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    model = nn.ModuleDict({"dense": dense, "sparse": sparse, "never": nn.Linear(2, 2)})
    with GradientEma(model) as ema:
        with pytest.raises(ValueError, match="expected a backward pass"):
            ema.scores()
        for _ in range(2):
            model.zero_grad()
            # Index 3 twice: its two rows of a sparse gradient are one.
            indices = torch.tensor([1, 3, 3])
            (dense(indices).sin().sum() + sparse(indices).sin().sum()).backward()
        scores = ema.scores()
    assert scores["sparse"] == pytest.approx(scores["dense"], rel=1e-6)
    assert ema.missing == ("never",)


def test_gradient_ema_refuses_bad_input() -> None:
    for decay in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="decay: expected from 0"):
            GradientEma(net(), decay)
    with pytest.raises(ValueError, match="accumulation: expected a positive"):
        GradientEma(net(), accumulation=0)
    with pytest.raises(ValueError, match="expected a parameter that trains"):
        GradientEma(net().requires_grad_(False))


def test_every_analyzer_is_an_importance_source() -> None:
    source: ImportanceSource[torch.optim.Optimizer] = AdamStateAnalyzer()
    assert callable(source)
    other: ImportanceSource[list[tuple[Tensor, Tensor]]] = FisherAnalyzer(loss_fn)
    assert callable(other)


def trained(make=net) -> tuple[nn.Module, torch.optim.Adam]:
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for seed in range(5):
        gradients(model, batch_for(model, seed=seed))
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("amount", [0.4, 17, 0.0, 1.0])
def test_pruning_is_that_of_a_dense_oracle(amount) -> None:
    model, optimizer = trained()
    weights = [model[i].weight.detach().double().numpy().copy() for i in (0, 2)]
    moments = [optimizer.state[model[i].weight]["exp_avg_sq"].double().numpy() / (1 - 0.999**5) for i in (0, 2)]
    scores = np.concatenate([(np.abs(w) * (v + 1e-12) ** 0.25).ravel() for w, v in zip(weights, moments, strict=True)])
    count = round(amount * len(scores)) if isinstance(amount, float) else amount
    gone = np.zeros(len(scores), dtype=bool)
    gone[np.argsort(scores)[:count]] = True
    x = batch_for(model)[0]
    bias = [model[i].bias.detach().double().numpy() for i in (0, 2)]
    shares = prune_(model, optimizer, amount)
    masks = np.split(gone, [weights[0].size])
    pruned = [np.where(m.reshape(w.shape), 0, w) for m, w in zip(masks, weights, strict=True)]
    for i, expected in zip((0, 2), pruned, strict=True):
        np.testing.assert_array_equal(model[i].weight.detach().numpy(), expected.astype(np.float32))
    expected_y = np.tanh(x.double().numpy() @ pruned[0].T + bias[0]) @ pruned[1].T + bias[1]
    np.testing.assert_allclose(model(x).detach().numpy(), expected_y, atol=1e-5)
    assert list(shares) == ["0.weight", "2.weight"]
    assert shares == pytest.approx({"0.weight": masks[0].mean(), "2.weight": masks[1].mean()})


def test_moments_decide_where_sizes_do_not() -> None:
    weight = torch.tensor([1.0, 1.0, 16.0, 1.0])
    moment = torch.tensor([1e-8, 1.0, 1e-8, 0.0])
    scores = bitter7_scores(weight, moment, eps=1e-16)
    np.testing.assert_allclose(scores.numpy(), [1e-2, 1.0, 0.16, 1e-4], rtol=1e-5)
    with pytest.raises(ValueError, match=r"expected shape \(4,\), got \(3,\)"):
        bitter7_scores(weight, moment[:3])
    with pytest.raises(ValueError, match="eps: expected zero or more"):
        bitter7_scores(weight, moment, eps=-1)


def test_pruned_models_train_on_and_are_pruned_again() -> None:
    model, optimizer = trained()
    prune_(model, optimizer, 0.5)
    gone = model[0].weight == 0
    gradients(model, batch_for(model))
    optimizer.step()
    assert bool((model[0].weight[gone] == 0).all())
    shares = prune_(model, optimizer, 0.5)
    zeros = sum(int((model[i].weight == 0).sum()) for i in (0, 2))
    assert zeros == 28 + 14
    assert (shares["0.weight"] * 35 + shares["2.weight"] * 21) == pytest.approx(42)
    # The state is the same parameters'.
    assert len(AdamStateAnalyzer()(model, optimizer)) == 2


def test_pruning_refuses_bad_input_and_leaves_the_model_alone() -> None:
    model, optimizer = trained()
    before = copy.deepcopy(model.state_dict())
    for amount in (1.5, -0.1, 57, -1, True, math.nan):
        with pytest.raises(ValueError, match="amount: expected a share from 0 to 1 or a number up to 56"):
            prune_(model, optimizer, amount)
    with pytest.raises(ValueError, match="expected a parameter 'gain' of Linear"):
        prune_(model, optimizer, 0.5, [(model[0], "gain")])
    with pytest.raises(ValueError, match="expected modules of the model"):
        prune_(model, optimizer, 0.5, [(nn.Linear(2, 2), "weight")])
    with pytest.raises(ValueError, match=r"0\.weight: expected exp_avg_sq in the optimizer"):
        prune_(model, torch.optim.Adam(model.parameters()), 0.5)
    with pytest.raises(ValueError, match="expected one to prune"):
        prune_(nn.Tanh(), optimizer, 0.5)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shared, its_optimizer = trained(tied)
    with pytest.raises(ValueError, match=r"head\.weight: expected a parameter of one layer, got one that is tied"):
        prune_(shared, its_optimizer, 0.5, [(shared.head, "weight")])
    assert list(prune_(shared, its_optimizer, 0.5)) == ["layer.weight"]
