"""The learned policy: always within budgets, better than random, and refined by what is measured."""

from __future__ import annotations

import itertools
import random
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from infold.tiers import LearnedPolicy, Overhead, Plan, TierSpec, plan, simulate, units
from infold.tiers.packing import Packing
from infold.tiers.policy import _ranks
from scipy.stats import rankdata
from torch import nn

HBM, CPU, SSD = TierSpec("HBM", 1, 800), TierSpec("CPU", 5, 26), TierSpec("SSD", 30, 7)
TIERS = [HBM, CPU, SSD]
SEEDS = range(5)


class Bag(nn.Module):
    """Units of any sizes."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in numbers)
        for layer, count in zip(self.layers, numbers, strict=True):
            layer.register_parameter("weight", nn.Parameter(torch.zeros(count)))


def instance(seed: int) -> tuple[nn.Module, dict[str, int | None], list[tuple[str, float]]]:
    """Layers of mixed sizes that compute about as long as a link takes, some of them twice."""
    generator = random.Random(seed)
    model = Bag([generator.choice([4_000, 60_000, 250_000]) for _ in range(24)])
    total = sum(unit.nbytes for unit in units(model))
    uses = [(unit.name, generator.uniform(0, 6e-5)) for unit in units(model)]
    uses += uses[5:9]
    return model, {"HBM": int(total * 0.45), "CPU": int(total * 0.4)}, uses


def seconds(made: Plan, uses: list[tuple[str, float]]) -> float:
    return simulate(made.accesses(uses) * 2, made.specs, buffer_bytes=made.buffer_bytes).seconds


def test_is_feasible_and_better_than_random_on_average() -> None:
    learned, drawn, by_size, static = [], [], [], []
    for seed in SEEDS:
        model, budgets, uses = instance(seed)
        policy = LearnedPolicy(model, TIERS, budgets, compute_seconds=uses, seed=seed)
        history = policy.train(12, population=32, elite=6)
        made = policy.plan()
        # A Plan that exceeds a budget cannot be made; every unit is placed.
        assert list(made.placements) == [unit.name for unit in units(model)]
        assert made.budgets == {**budgets, "SSD": None}
        assert history == sorted(history)
        computing = sum(seconds for _, seconds in uses)
        assert -history[-1] * 2 * computing == pytest.approx(seconds(made, uses), rel=1e-9)
        learned.append(seconds(made, uses))
        drawn += [seconds(plan(model, TIERS, budgets, "random", seed=s), uses) for s in range(5)]
        by_size.append(seconds(plan(model, TIERS, budgets, "size"), uses))
        static.append(seconds(plan(model, TIERS, budgets, "traffic", compute_seconds=uses), uses))
    assert statistics.fmean(learned) < statistics.fmean(drawn)
    assert statistics.fmean(learned) < statistics.fmean(by_size)
    # It stays behind a search of all assignments, or gets there.
    assert statistics.fmean(learned) >= statistics.fmean(static) * (1 - 1e-9)


def test_same_seed_same_plan() -> None:
    model, budgets, uses = instance(0)

    def made(seed: int) -> tuple[list[float], Plan]:
        policy = LearnedPolicy(model, TIERS, budgets, compute_seconds=uses, seed=seed)
        return policy.train(3, population=8, elite=2), policy.plan()

    assert made(1) == made(1)
    assert made(1)[0] != made(2)[0]


def test_overhead_counts_to_the_reward() -> None:
    model, budgets, uses = instance(0)
    overhead = Overhead(5e-6, 2e-5)
    policy = LearnedPolicy(model, TIERS, budgets, compute_seconds=uses, overhead=overhead)
    reward = policy.train(iterations=2)[-1]
    made = policy.plan()
    timeline = simulate(made.accesses(uses) * 2, made.specs, buffer_bytes=made.buffer_bytes, overhead=overhead)
    assert reward == pytest.approx(-timeline.seconds / (2 * sum(each for _, each in uses)), rel=1e-9)
    assert timeline.seconds > seconds(made, uses)


def test_learns_what_a_signal_tells() -> None:
    # What the second pass of the reward cannot know, a measurement tells: units with a high signal are slow to fetch.
    model = Bag([4096] * 12)
    names = [unit.name for unit in units(model)]
    slow = {name: float(index % 3 == 0) for index, name in enumerate(names)}
    policy = LearnedPolicy(model, [HBM, CPU], {"HBM": 6 * 16384}, signals={"slow": slow}, seed=0)

    def measured(made: Plan) -> float:
        return sum(1 + 10 * slow[name] for name, placement in made.placements.items() if placement.tier == "CPU")

    refined = policy.refine(measured, rounds=20, population=16, elite=4)
    assert measured(refined) == 8
    # The policy carries over to a signal that says the same of other units.
    other = {name: float(index % 3 == 1) for index, name in enumerate(names)}
    moved = policy.plan({"slow": other})
    kept = {name for name, placement in moved.placements.items() if placement.tier == "HBM"}
    assert kept == {name for name in names if other[name]}


def test_refinement_measures_each_plan_once_and_never_loses() -> None:
    model, budgets, uses = instance(1)
    policy = LearnedPolicy(model, TIERS, budgets, compute_seconds=uses, seed=1)
    policy.train(2, population=8, elite=2)
    seen: list[tuple[str, ...]] = []

    def measured(made: Plan) -> float:
        seen.append(tuple(placement.tier for placement in made.placements.values()))
        return 1.0 if len(seen) == 1 else 2.0

    before = policy.plan()
    assert policy.refine(measured, rounds=2, population=4) == before
    assert len(set(seen)) == len(seen) <= 9


def test_ranks_are_scipys() -> None:
    values = [3.0, 1.0, 3.0, -2.0, 7.0]
    assert _ranks(values) == pytest.approx(2 * (rankdata(values) - 1) / 4 - 1)
    assert _ranks([5.0, 5.0]).tolist() == [0.0, 0.0]
    assert np.isfinite(_ranks([5.0])).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": {"HBM": 1}}, "are missing"),
        ({"signals": {"grad": {"x": 1.0}}}, "signals: grad: expected names of the model's units, got 'x'"),
        ({"signals": {"grad": {}}}, "signals: grad: expected all of the model's units"),
        ({"signals": {"grad": {"layers.0": float("nan"), "layers.1": 0.0}}}, "signals: grad: expected finite"),
        ({"buffers": 0}, "buffers"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedPolicy(Bag([4096, 4096]), [HBM, CPU], **arguments)


def test_refuses_populations_and_signals() -> None:
    policy = LearnedPolicy(Bag([4096, 4096]), [HBM, CPU], {"HBM": 16384})
    with pytest.raises(ValueError, match="population >= elite >= 2"):
        policy.train(1, population=4, elite=5)
    with pytest.raises(ValueError, match="population >= elite >= 2"):
        policy.refine(lambda made: 0.0, elite=1)
    with pytest.raises(ValueError, match="signals: expected none, got grad"):
        policy.plan({"grad": {}})


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 20_000), min_size=1, max_size=5),
    st.lists(st.none() | st.integers(0, 40_000), min_size=2, max_size=3),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_every_action_fits_where_any_does(
    sizes: list[int], limits: list[int | None], buffers: int, generator: random.Random
) -> None:
    rooms = [-(-size // 4096) * 4096 for size in sizes]
    resident = (True, *[False] * (len(limits) - 1))
    packing = Packing(tuple(sizes), tuple(rooms), tuple(limits), resident, buffers)
    wishes = [[generator.random() for _ in limits] for _ in sizes]

    def fits(assignment: tuple[int, ...]) -> bool:
        held = [
            sum(size for size, tier in zip(sizes, assignment, strict=True) if tier == t) for t in range(len(limits))
        ]
        held[0] += max((room for room, tier in zip(rooms, assignment, strict=True) if tier), default=0)
        return all(limit is None or count <= limit for count, limit in zip(held, limits, strict=True))

    found = packing.nearest(wishes)
    if not any(fits(each) for each in itertools.product(range(len(limits)), repeat=len(sizes))):
        assert found is None
        return
    assert found is not None
    assert fits(tuple(found))
    free = Packing(tuple(sizes), tuple(rooms), tuple(None for _ in limits), resident, buffers).nearest(wishes)
    assert free == [row.index(max(row)) for row in wishes]
