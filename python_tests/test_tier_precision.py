"""Precision by water-filling against brute force, plans that convert as they say, and llama.cpp's names."""

from __future__ import annotations

import itertools
import re

import infold
import numpy as np
import pytest
import torch
from infold import FusedConfig
from infold.tiers import (
    FisherAnalyzer,
    LayerCurve,
    Option,
    PrecisionPlan,
    allocate_precision,
    measure_precision,
    plan_precision,
    tensor_types,
    units,
    water_fill,
)
from scipy.spatial import ConvexHull
from torch import nn

CONFIGS = (FusedConfig("lossless"), FusedConfig("ecsq", bits=2), FusedConfig("ecsq", bits=4), FusedConfig("int8"))


def total(options: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> Option:
    own = [layer[index] for layer, index in zip(options, chosen, strict=True)]
    return Option(sum(o.nbytes for o in own), sum(o.loss for o in own))


def every_choice(options: list[list[Option]]) -> list[Option]:
    return [total(options, chosen) for chosen in itertools.product(*(range(len(layer)) for layer in options))]


def instance(seed: int, layers: int = 4) -> list[list[Option]]:
    """Bytes and losses with and without convexity, options that nobody would take, ties."""
    random = np.random.default_rng(seed)
    options = []
    for _ in range(layers):
        count = int(random.integers(1, 6))
        if seed % 2:
            rates = np.sort(random.choice(np.arange(2, 12), count, replace=False))
            size, scale = int(random.integers(1, 50)), random.exponential()
            options.append([Option(int(size * r), float(scale * size * 4.0**-r)) for r in rates])
        else:
            options.append([Option(int(random.integers(1, 30)), float(random.integers(0, 20))) for _ in range(count)])
    return options


def test_water_filling_keeps_budgets_and_matches_brute_force_on_the_hull() -> None:
    optimal = 0
    for seed in range(60):
        options = instance(seed)
        choices = every_choice(options)
        corners = lower_hull(choices)
        smallest, largest = min(c.nbytes for c in choices), max(c.nbytes for c in choices)
        budgets = {*np.linspace(smallest, largest, 12).astype(int).tolist(), *(c.nbytes for c in corners)}
        for budget in budgets:
            found = total(options, water_fill(options, budget))
            best = min(c.loss for c in choices if c.nbytes <= budget)
            hull = min(c.loss for c in corners if c.nbytes <= budget)
            assert found.nbytes <= budget
            assert found.loss >= best - 1e-9
            # What the multiplier alone reaches is the best corner of all choices that fits.
            assert found.loss <= hull + 1e-9
            if any(c.nbytes == budget for c in corners):
                assert found.loss == pytest.approx(best, abs=1e-9)
                optimal += 1
    assert optimal > 300


def lower_hull(choices: list[Option]) -> list[Option]:
    """Corners of the lower left hull of all choices, by Qhull."""
    points = np.unique(np.array(choices, dtype=float), axis=0)
    least, best = points[:, 0].min(), points[:, 1].min()
    start = min(points[points[:, 0] == least].tolist(), key=lambda p: p[1])
    end = min(points[points[:, 1] == best].tolist(), key=lambda p: p[0])
    corners = {(start[0], start[1]), (end[0], end[1])}
    try:
        hull = ConvexHull(points)
    except Exception:
        # Fewer than three points that are not on a line: its ends are the corners.
        return [Option(int(x), y) for x, y in sorted(corners)]
    for x, y in points[hull.vertices]:
        # Below the line between the ends lies the lower left part.
        across = (end[0] - start[0]) * (y - start[1]) - (end[1] - start[1]) * (x - start[0])
        if start[0] <= x <= end[0] and across <= 0:
            corners.add((x, y))
    return [Option(int(x), y) for x, y in sorted(corners)]


def test_leftover_bytes_are_spent() -> None:
    # On the hull only (1, 8) and (10, 0): of 9 bytes the multiplier takes 1, and the filling (5, 7), above the hull.
    options = [[Option(1, 8.0), Option(5, 7.0), Option(10, 0.0)]]
    assert water_fill(options, 9) == [1]
    assert water_fill(options, 10) == [2]
    assert water_fill(options, 4) == [0]


def test_options_that_gain_nothing_are_not_taken() -> None:
    options = [[Option(4, 0.0), Option(9, 0.0), Option(3, 0.0)], [Option(5, 1.0), Option(5, 2.0)]]
    assert water_fill(options, 100) == [2, 0]


def test_water_fill_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="budget: expected at least 7 bytes, the smallest that the layers have, got 6"):
        water_fill([[Option(3, 1.0), Option(9, 0.0)], [Option(4, 2.0)]], 6)
    with pytest.raises(ValueError, match="expected one at least for each layer"):
        water_fill([[]], 6)
    with pytest.raises(ValueError, match="expected finite losses"):
        water_fill([[Option(1, float("nan"))]], 6)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(128, 192), nn.Tanh(), nn.Linear(192, 128), nn.Tanh(), nn.Linear(128, 64)
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model[2].weight.mul_(10)
    return model


def test_curves_are_what_convert_measures() -> None:
    model = net()
    curves = measure_precision(model, CONFIGS, progress=False)
    assert [curve.names for curve in curves] == [("0",), ("2",), ("4",)]
    for index, config in enumerate(CONFIGS):
        copy = net()
        dense = {name: copy[int(name)].weight.detach().double().numpy() for name in ("0", "2", "4")}
        report = infold.convert(copy, config, progress=False)
        for curve, layer in zip(curves, report.layers, strict=True):
            unpacked = copy[int(layer.name)].weight.double().numpy()
            assert curve.nbytes[index] == layer.bytes_after
            expected = np.square(unpacked - dense[layer.name]).sum()
            assert curve.squared_error[index] == pytest.approx(expected, rel=1e-9)


def test_a_plan_converts_to_the_bytes_that_it_says() -> None:
    model = net()
    weights = {name: model[int(name)].weight.detach().double().numpy() for name in ("0", "2", "4")}
    importance = {"0": 1e-3, "2": 1.0, "4": 30.0}
    budget = 40_000
    plan = allocate_precision(model, budget, importance, progress=False)
    assert plan.nbytes <= budget
    report = infold.convert(model, plan, progress=False)
    assert report.bytes_after == plan.nbytes
    lost = {n: np.square(model[int(n)].weight.double().numpy() - w).sum() for n, w in weights.items()}
    assert plan.loss == pytest.approx(sum(importance[n] * lost[n] for n in weights), rel=1e-6)
    assert dict(plan) == {layer.names[0]: layer.config for layer in plan.layers}
    assert "of 40.00 KB" in str(plan)
    with pytest.raises(KeyError):
        plan["1"]


def test_importance_moves_bytes() -> None:
    curves = measure_precision(net(), progress=False)
    budget = sum(curve.nbytes[curve.candidates.index(FusedConfig("ecsq", bits=4))] for curve in curves)
    sizes = {}
    for favoured in ("0", "2", "4"):
        plan = plan_precision(curves, budget, {n: 1e4 if n == favoured else 1.0 for n in ("0", "2", "4")})
        sizes[favoured] = {layer.names[0]: layer.bits_per_weight for layer in plan.layers}
    for name in ("0", "2", "4"):
        others = [sizes[other][name] for other in sizes if other != name]
        assert sizes[name][name] > max(others)


def test_the_plan_is_the_best_of_all_where_brute_force_can_tell() -> None:
    model = net()
    curves = measure_precision(model, CONFIGS, progress=False)
    importance = {"0": 2.0, "2": 0.3, "4": 1.0}
    options = [
        [Option(n, importance[c.unit] * e) for n, e in zip(c.nbytes, c.squared_error, strict=True)] for c in curves
    ]
    choices = every_choice(options)
    for corner in lower_hull(choices):
        plan = plan_precision(curves, corner.nbytes, importance)
        best = min(c.loss for c in choices if c.nbytes <= corner.nbytes)
        assert plan.loss == pytest.approx(best, rel=1e-9, abs=1e-12)


class Tied(nn.Module):
    """A head of an embedding's table, a norm, and a layer that two names share."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(96, 64), nn.Linear(64, 64)
        self.again, self.norm = self.layer, nn.LayerNorm(64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.table.weight

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.again(torch.tanh(self.layer(self.table(indices))))))


def test_layers_of_one_weight_get_one_precision() -> None:
    torch.manual_seed(0)
    model = Tied()
    curves = measure_precision(model, progress=False)
    assert [curve.names for curve in curves] == [("table", "head"), ("layer", "again")]
    scores = FisherAnalyzer(
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
    )(model, [torch.randint(96, (2, 6, 8)).unbind()])
    plan = plan_precision(curves, 8_000, scores)
    assert set(plan) == {"table", "head", "layer", "again"}
    assert len(plan) == 4
    report = infold.convert(model, plan, progress=False)
    assert not report.refused
    assert report.bytes_after == plan.nbytes <= 8_000
    assert model.head.payload is model.table.payload


def test_what_cannot_be_converted_is_left_out() -> None:
    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    model = nn.ModuleDict({"own": Own(64, 64), "wide": nn.Linear(64, 64).double(), "plain": nn.Linear(64, 64)})
    model["tied"] = nn.Linear(64, 64)
    model["borrower"] = nn.Bilinear(1, 1, 1)
    model["borrower"].weight = model["tied"].weight
    model["skipped"] = nn.Linear(64, 64)
    curves = measure_precision(model, CONFIGS, skip=["skip*"], progress=False)
    assert [curve.names for curve in curves] == [("plain",)]
    report = infold.convert(model, plan_precision(curves, 10_000), progress=False)
    assert [layer.name for layer in report.layers] == ["plain"]
    assert not report.refused


def test_precision_refuses_bad_input() -> None:
    model = net()
    curves = measure_precision(model, CONFIGS, progress=False)
    with pytest.raises(ValueError, match="expected that of every unit with a layer, missing 2, 4"):
        plan_precision(curves, 10**6, {"0": 1.0})
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="importance of 2: expected a finite number from zero up"):
            plan_precision(curves, 10**6, {"0": 1.0, "2": bad, "4": 1.0})
    with pytest.raises(ValueError, match="budget: expected at least"):
        plan_precision(curves, 100)
    with pytest.raises(ValueError, match="candidates: expected one"):
        measure_precision(model, (), progress=False)
    with pytest.raises(ValueError, match="expected a layer that can be packed"):
        measure_precision(nn.Tanh(), progress=False)
    with torch.no_grad():
        model[2].weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"^2: "):
        measure_precision(model, (FusedConfig("int8"),), progress=False)


def llama_plan(configs: dict[str, FusedConfig], bits: float = 3.7) -> PrecisionPlan:
    curves = [LayerCurve((name,), name, 800, (config,), (int(100 * bits),), (1.0,)) for name, config in configs.items()]
    return plan_precision(curves, 10**6)


def test_tensor_types_are_llama_cpps() -> None:
    layer = "model.layers.12."
    plan = llama_plan(
        {
            "model.embed_tokens": FusedConfig("int8"),
            layer + "self_attn.q_proj": FusedConfig("ecsq", bits=2),
            layer + "self_attn.k_proj": FusedConfig("ecsq", bits=2.5),
            layer + "self_attn.v_proj": FusedConfig("ecsq", bits=4),
            layer + "self_attn.o_proj": FusedConfig("int4"),
            layer + "mlp.gate_proj": FusedConfig("ecsq", bits=5),
            layer + "mlp.up_proj": FusedConfig("ecsq", bits=6),
            layer + "mlp.down_proj": FusedConfig("ecsq", max_error=0.1),
            "lm_head": FusedConfig("lossless"),
        }
    )
    assert tensor_types(plan) == [
        r"^token_embd\.weight$=q8_0",
        r"^blk\.12\.attn_q\.weight$=q2_k",
        r"^blk\.12\.attn_k\.weight$=q3_k",
        r"^blk\.12\.attn_v\.weight$=q4_k",
        r"^blk\.12\.attn_output\.weight$=q4_k",
        r"^blk\.12\.ffn_gate\.weight$=q5_k",
        r"^blk\.12\.ffn_up\.weight$=q6_k",
        r"^blk\.12\.ffn_down\.weight$=q4_k",
        r"^output\.weight$=bf16",
    ]
    assert tensor_types(llama_plan({"lm_head": FusedConfig("lossless")}), torch.float16) == [r"^output\.weight$=f16"]


def test_patterns_match_one_tensor_each() -> None:
    # llama.cpp searches for the pattern in every tensor's name.
    names = ["token_embd", "output", *(f"blk.{n}.{t}" for n in (1, 11, 21) for t in ("attn_output", "attn_q"))]
    places = ["model.embed_tokens", "lm_head"]
    places += [f"model.layers.{n}.self_attn.{t}" for n in (1, 11, 21) for t in ("o_proj", "q_proj")]
    plan = llama_plan(dict.fromkeys(places, FusedConfig("int4")))
    for name, entry in zip(names, tensor_types(plan), strict=True):
        pattern, kind = entry.split("=")
        assert pattern == pattern.lower()
        assert kind == "q4_k"
        assert [other for other in names if re.search(pattern, other + ".weight")] == [name]


def test_unknown_tensors_are_refused_by_name() -> None:
    plan = llama_plan(
        {
            "model.layers.0.mlp.down_proj": FusedConfig("int8"),
            "encoder.layer.0.output.dense": FusedConfig("int8"),
            "model.layers.0.mlp.experts.3.down_proj": FusedConfig("int8"),
        }
    )
    expected = r"got encoder\.layer\.0\.output\.dense, model\.layers\.0\.mlp\.experts\.3\.down_proj$"
    with pytest.raises(ValueError, match=expected):
        tensor_types(plan)
    with pytest.raises(ValueError, match=r"dtype: expected float32, float16 or bfloat16, got torch\.int8"):
        tensor_types(llama_plan({"lm_head": FusedConfig("int8")}), torch.int8)


def test_a_llama_from_transformers_goes_all_the_way() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(128, (3, 12))

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(input_ids=batch, labels=batch).loss

    scores = FisherAnalyzer(loss, method="loop")(model, [tokens])
    assert set(scores) == {unit.name for unit in units(model)}
    plan = allocate_precision(model, 60_000, scores, progress=False)
    types = tensor_types(plan)
    assert len(types) == 1 + 2 * 7
    assert types[0].startswith(r"^token_embd\.weight$=")
    report = infold.convert(model, plan, progress=False)
    assert not report.refused
    assert report.bytes_after == plan.nbytes <= 60_000
    assert torch.isfinite(model(input_ids=tokens).logits).all()
