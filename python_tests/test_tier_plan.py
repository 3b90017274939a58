"""Plans: what they keep to, what each objective means, and the best one against trying them all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from infold.tiers import Access, Overhead, Placement, Plan, TierSpec, fingerprint, plan, simulate, units
from torch import Tensor, nn

PAGE = 4096
HBM, CPU, SSD = TierSpec("HBM", 1, 800), TierSpec("CPU", 5, 26), TierSpec("SSD", 30, 7)


class Bag(nn.Module):
    """Units of any sizes: float32 vectors."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in numbers)
        for layer, count in zip(self.layers, numbers, strict=True):
            layer.register_parameter("weight", nn.Parameter(torch.zeros(count)))


def pages(*counts: int) -> Bag:
    return Bag(*(count * PAGE // 4 for count in counts))


def tiers_of(made: Plan) -> list[str]:
    return [placement.tier for placement in made.placements.values()]


def scores(model: nn.Module, *values: float) -> dict[str, float]:
    return {unit.name: value for unit, value in zip(units(model), values, strict=True)}


def fits(sizes: list[int], assignment: tuple[int, ...], limits: list[int | None]) -> int | None:
    """The least ring under an assignment, written apart from the code: room for the largest weight to fetch."""
    for tier, limit in enumerate(limits):
        if limit is not None and sum(size for size, t in zip(sizes, assignment, strict=True) if t == tier) > limit:
            return None
    largest = max((-(-size // PAGE) * PAGE for size, t in zip(sizes, assignment, strict=True) if t), default=0)
    held = sum(size for size, t in zip(sizes, assignment, strict=True) if t == 0)
    return None if limits[0] is not None and held + largest > limits[0] else largest


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 6000), min_size=1, max_size=6),
    st.lists(st.none() | st.integers(0, 40_000), min_size=1, max_size=3),
    st.sampled_from(["traffic", "size", "layer-order", "random", "importance", "inverse"]),
    st.integers(1, 3),
)
def test_fits_exactly_or_says_that_nothing_does(
    counts: list[int], limits: list[int | None], objective: Any, buffers: int
) -> None:
    model = Bag(*counts)
    sizes = [4 * count for count in counts]
    specs = [HBM, CPU, SSD][: len(limits)]
    budgets = {spec.name: limit for spec, limit in zip(specs, limits, strict=True)}
    possible = any(
        fits(sizes, assignment, limits) is not None
        for assignment in itertools.product(range(len(limits)), repeat=len(sizes))
    )
    ranks = scores(model, *map(float, range(len(counts))))
    if not possible:
        with pytest.raises(ValueError, match=r"missing"):
            plan(model, specs, budgets, objective, scores=ranks, buffers=buffers)
        return
    made = plan(model, specs, budgets, objective, scores=ranks, buffers=buffers)
    assert list(made.placements) == [unit.name for unit in units(model)]
    assert [placement.nbytes for placement in made.placements.values()] == sizes
    for spec, limit in zip(specs, limits, strict=True):
        held = sum(p.nbytes for p in made.placements.values() if p.tier == spec.name)
        assert made.bytes_by_tier()[spec.name] == held
        assert limit is None or held + (made.buffer_bytes if spec is HBM else 0) <= limit
    fetched = sorted((-(-p.nbytes // PAGE) * PAGE for p in made.placements.values() if p.tier != "HBM"), reverse=True)
    assert made.buffer_bytes >= max(fetched, default=0)
    assert made.buffer_bytes <= sum(fetched[:buffers])
    if limits[0] is None:
        assert made.buffer_bytes == sum(fetched[:buffers])


def two_passes(
    model: nn.Module, specs: list[TierSpec], assignment: tuple[int, ...], ring: int, order: list[tuple[str, float]]
) -> float:
    tier = {unit.name: specs[t].name for unit, t in zip(units(model), assignment, strict=True)}
    nbytes = {unit.name: unit.nbytes for unit in units(model)}
    by_name = {
        spec.name: TierSpec(spec.name, spec.setup_us, spec.bandwidth_gb_s, resident=spec is HBM) for spec in specs
    }
    accesses = [Access(name, tier[name], nbytes[name], seconds) for name, seconds in order]
    return simulate(accesses * 2, by_name, buffer_bytes=ring).exposed_seconds


@pytest.mark.parametrize("seed", range(12))
def test_traffic_is_the_best_of_all_assignments(seed: int) -> None:
    generator = random.Random(seed)
    model = Bag(*(generator.randint(1, 40_000) for _ in range(6)))
    sizes = [unit.nbytes for unit in units(model)]
    limits: list[int | None] = [sum(sizes) // 2 + 2 * PAGE, sum(sizes) // 3, None]
    specs = [HBM, CPU, SSD]
    order = [(unit.name, generator.choice([0.0, 2e-6, 2e-5])) for unit in units(model)]
    order += generator.sample(order, 2)
    best = float("inf")
    for assignment in itertools.product(range(3), repeat=6):
        least = fits(sizes, assignment, limits)
        if least is None or limits[0] is None:
            continue
        held = sum(size for size, t in zip(sizes, assignment, strict=True) if t == 0)
        offloaded = sorted((-(-s // PAGE) * PAGE for s, t in zip(sizes, assignment, strict=True) if t), reverse=True)
        ring = min(sum(offloaded[:2]), (limits[0] - held) // PAGE * PAGE)
        best = min(best, two_passes(model, specs, assignment, ring, order))
    made = plan(model, specs, {"HBM": limits[0], "CPU": limits[1]}, "traffic", compute_seconds=order)
    chosen = tuple(["HBM", "CPU", "SSD"].index(tier) for tier in tiers_of(made))
    assert two_passes(model, specs, chosen, made.buffer_bytes, order) == pytest.approx(best, rel=1e-9, abs=1e-15)


def test_traffic_on_many_units_is_better_than_every_ranking() -> None:
    generator = random.Random(3)
    model = Bag(*(generator.randint(20_000, 300_000) for _ in range(60)))
    names = [unit.name for unit in units(model)]
    total = sum(unit.nbytes for unit in units(model))
    compute = {name: generator.uniform(0, 4e-5) for name in names}
    budgets = {"HBM": total // 3, "CPU": total // 2}
    order = list(compute.items())

    def exposed(made: Plan) -> float:
        return simulate(made.accesses(order) * 2, made.specs, buffer_bytes=made.buffer_bytes).exposed_seconds

    best = exposed(plan(model, [HBM, CPU, SSD], budgets, compute_seconds=compute))
    for objective in ("size", "layer-order", "random"):
        other = plan(model, [HBM, CPU, SSD], budgets, objective, compute_seconds=compute)  # type: ignore[arg-type]
        assert best < exposed(other)


def test_traffic_keeps_resident_what_nothing_hides() -> None:
    # Room for one weight and one buffer. The second one's absence would leave its neighbours nothing to hide behind.
    model = pages(8, 8, 8)
    names = [unit.name for unit in units(model)]
    compute = dict(zip(names, [0, 1e-3, 1e-3], strict=True))
    made = plan(model, [HBM, CPU], {"HBM": 16 * PAGE}, compute_seconds=compute)
    assert tiers_of(made) == ["CPU", "HBM", "CPU"]


def test_traffic_counts_overhead() -> None:
    # Beside the buffer there is room for a large weight, whose transfers are longer, or for all of the small ones.
    model = pages(5, 1, 1, 5, 1, 1)
    near = TierSpec("CPU", 0, 1)

    def kept(overhead: Overhead) -> list[int]:
        made = plan(model, [HBM, near], {"HBM": 10 * PAGE}, overhead=overhead)
        return sorted(each.nbytes // PAGE for each in made.placements.values() if each.tier == "HBM")

    assert kept(Overhead()) == [5]
    assert kept(Overhead(use=1e-4)) == kept(Overhead(fetch=1e-4)) == [1, 1, 1, 1]


def test_importance_and_its_inverse() -> None:
    model = pages(1, 1, 1, 1, 1)
    ranks = scores(model, 0.1, 3.0, -2.0, 1.0, -7.0)
    budgets = {"HBM": 4 * PAGE, "CPU": PAGE}
    made = plan(model, [HBM, CPU, SSD], budgets, "importance", scores=ranks)
    assert tiers_of(made) == ["CPU", "HBM", "SSD", "HBM", "SSD"]
    assert made.buffer_bytes == 2 * PAGE
    assert [p.score for p in made.placements.values()] == list(ranks.values())
    inverse = plan(model, [HBM, CPU, SSD], budgets, "inverse", scores=ranks)
    assert tiers_of(inverse) == ["CPU", "SSD", "HBM", "SSD", "HBM"]


def test_size_fetches_the_fewest_weights() -> None:
    model = pages(5, 1, 2, 3)
    made = plan(model, [HBM, CPU], {"HBM": (1 + 2 + 5) * PAGE}, "size", buffers=1)
    assert tiers_of(made) == ["CPU", "HBM", "HBM", "CPU"]


def test_the_largest_may_stay_for_its_buffers_sake() -> None:
    model = pages(1, 9, 1, 1, 1, 1)
    budgets = {"HBM": 11 * PAGE}
    ranked = plan(model, [HBM, CPU], budgets, "layer-order", buffers=1)
    assert tiers_of(ranked) == ["HBM", "CPU", "HBM", "CPU", "CPU", "CPU"]
    kept = plan(model, [HBM, CPU], budgets, "layer-order", buffers=1, keep_largest=1)
    assert tiers_of(kept) == ["HBM", "HBM", "CPU", "CPU", "CPU", "CPU"]
    assert (ranked.buffer_bytes, kept.buffer_bytes) == (9 * PAGE, PAGE)


def test_layer_order_and_random() -> None:
    model = pages(*[1] * 12)
    budgets = {"HBM": 6 * PAGE}
    assert tiers_of(plan(model, [HBM, CPU], budgets, "layer-order")) == ["HBM"] * 4 + ["CPU"] * 8
    drawn = [tiers_of(plan(model, [HBM, CPU], budgets, "random", seed=seed)) for seed in range(4)]
    assert drawn[0] == tiers_of(plan(model, [HBM, CPU], budgets, "random", seed=0))
    assert len({tuple(tiers) for tiers in drawn}) > 1


def test_fractions_are_of_bytes() -> None:
    model = pages(*[1] * 10)
    made = plan(model, [HBM, CPU, SSD], {}, "fractions", scores=scores(model, *range(10)))
    assert made.bytes_by_tier() == {"HBM": 3 * PAGE, "CPU": 5 * PAGE, "SSD": 2 * PAGE}
    assert tiers_of(made) == ["SSD"] * 2 + ["CPU"] * 5 + ["HBM"] * 3
    # One unit of 70% of all bytes: its middle lies in the second share.
    made = plan(pages(7, 1, 1, 1), [HBM, CPU, SSD], {}, "fractions", scores=scores(pages(7, 1, 1, 1), 4, 3, 2, 1))
    assert tiers_of(made) == ["CPU", "CPU", "SSD", "SSD"]
    with pytest.raises(ValueError, match=r"SSD: expected room for 8192 of 40960 bytes, got 4096: 4096 are missing"):
        plan(model, [HBM, CPU, SSD], {"SSD": PAGE}, "fractions", scores=scores(model, *range(10)))


def test_devices_fill_in_their_order() -> None:
    specs = [
        TierSpec("cuda:0", 1, 3000, 4 * PAGE, resident=True),
        TierSpec("cuda:1", 1, 3000, 3 * PAGE, resident=True),
        CPU,
    ]
    made = plan(pages(*[1] * 8), specs, None, "layer-order")
    assert tiers_of(made) == ["cuda:0"] * 2 + ["cuda:1"] * 3 + ["CPU"] * 3
    assert made.buffer_bytes == 2 * PAGE


def test_packed_weights_count_as_stored() -> None:
    model = pages(4, 4, 4)
    names = [unit.name for unit in units(model)]
    made = plan(
        model,
        [HBM, CPU],
        {"HBM": 4 * PAGE + 1000},
        "layer-order",
        nbytes={names[0]: 1000},
        codecs={names[0]: "ecsq"},
    )
    raw = Placement("CPU", 4 * PAGE)
    assert made.placements == {names[0]: Placement("HBM", 1000, "ecsq"), names[1]: raw, names[2]: raw}
    # Two do not fit.
    assert made.buffer_bytes == 4 * PAGE


def test_tied_weights_lie_in_one_place() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.between, self.head = nn.Embedding(64, 16), nn.Linear(16, 16), nn.Linear(16, 64, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("not to be run")

    made = plan(Tied(), [HBM, CPU], {"HBM": 2 * PAGE}, "layer-order")
    assert list(made.placements) == ["embed", "between"]
    assert sum(made.bytes_by_tier().values()) == 4 * (64 * 16 + 16 * 16 + 16)


def test_prints_a_table() -> None:
    text = str(plan(pages(1, 2), [HBM, CPU], {"HBM": 3 * PAGE}, "layer-order"))
    assert "HBM" in text
    assert "layer-order" in text
    assert "12.29 KB" in text


def test_fingerprint_tells_shapes_names_and_dtypes_apart() -> None:
    torch.manual_seed(0)
    one, same, wider = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5)
    assert fingerprint(one) == fingerprint(same)
    others = [wider, nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4, bias=False), nn.Sequential(nn.Linear(4, 4))]
    assert len({fingerprint(model) for model in (one, *others)}) == 5


MODEL = pages(1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "best"}, "objective: expected one of traffic"),
        ({"objective": "importance"}, "scores: expected a number for each unit for objective 'importance', got none"),
        ({"objective": "inverse", "scores": {"layers.0": 1.0}}, "scores: .*'layers.1' missing"),
        ({"objective": "importance", "scores": {"layers.0": 1.0, "layers.1": float("nan")}}, "scores: .*NaN"),
        ({"scores": {"layers.7": 1.0}}, "scores: expected names of the model's units, got 'layers.7'"),
        ({"nbytes": {"x": 1}}, "nbytes: .*'x'"),
        ({"nbytes": {"layers.0": -1}}, "nbytes: layers.0"),
        ({"codecs": {"x": "raw"}}, "codecs: .*'x'"),
        ({"compute_seconds": {"x": 1.0}}, "compute_seconds: .*'x'"),
        ({"compute_seconds": {"layers.0": -1.0}}, "compute_seconds: layers.0"),
        ({"budgets": {"tape": 1}}, "budgets: expected one of the tiers HBM, CPU, got 'tape'"),
        ({"budgets": {"HBM": -1}}, "budgets: HBM"),
        ({"buffers": 0}, "buffers"),
        ({"keep_largest": -1}, "keep_largest"),
        ({"specs": []}, "specs"),
        ({"specs": [HBM, HBM]}, "specs: .*different names"),
        ({"objective": "fractions", "fractions": (0.5, 0.6)}, "scores|fractions"),
        ({"objective": "fractions", "scores": {"layers.0": 1.0, "layers.1": 2.0}}, "fractions: expected 2 shares"),
        ({"budgets": {"HBM": PAGE}}, r"HBM: .*8192 bytes.*\(layers.1\), got 4096: 4096 are missing"),
        ({"budgets": {"HBM": 2 * PAGE, "CPU": PAGE}}, "CPU: .* are missing"),
    ],
)
def test_refuses(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(MODEL, **{"specs": [HBM, CPU], **options})


def made_by_hand(**fields: Any) -> Plan:
    tiers = (TierSpec("HBM", 1, 800, resident=True), CPU)
    return Plan(
        **{
            "tiers": tiers,
            "placements": {"a": Placement("CPU", 100)},
            "buffer_bytes": PAGE,
            "fingerprint": "",
            "objective": "hand",
            **fields,
        }
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tiers": ()}, "tiers"),
        ({"tiers": (HBM, CPU)}, "tiers: expected the first to be resident"),
        ({"buffer_bytes": -1}, "buffer_bytes"),
        ({"buffer_bytes": PAGE - 1}, "buffer_bytes: expected room for the 4096 bytes of a"),
        ({"placements": {"a": Placement("SSD", 1)}}, "a: tier: expected one of HBM, CPU, got 'SSD'"),
        ({"placements": {"a": Placement("CPU", -1)}}, "a: nbytes"),
        ({"budgets": {"CPU": 99}}, "CPU: expected at most its budget, 99 bytes, got 100"),
        ({"budgets": {"HBM": PAGE - 1}}, "HBM: expected at most its budget"),
        ({"budgets": {"SSD": 1}}, "budgets"),
    ],
)
def test_a_plan_is_consistent(fields: Mapping[str, Any], message: str) -> None:
    assert made_by_hand().tier_of("a") == CPU
    with pytest.raises(ValueError, match="unit: expected one of the plan's, got 'b'"):
        made_by_hand().tier_of("b")
    with pytest.raises(ValueError, match=message):
        made_by_hand(**fields)
