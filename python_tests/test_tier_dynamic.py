"""Units that move between tiers during training: within budgets, bounded, without flapping, and without a trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from infold.tiers import (
    Access,
    AdamStateAnalyzer,
    DynamicTiering,
    GradientEma,
    Handle,
    Placement,
    Plan,
    TierSpec,
    attach,
    fingerprint,
    plan,
    simulate,
    units,
)
from torch import nn

FAST = TierSpec("FAST", 0, 1000, resident=True)
RAM = TierSpec("RAM", 1, 20)
DISK = TierSpec("DISK", 50, 1, on_disk=True)
#: Bytes of a layer of the models below, and what it takes in a buffer.
LAYER, ROOM = 4 * 32 * 32, 4096


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(layers: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(layers)))


def placed(model: nn.Module, tiers: str, *, fast: int | None, ram: int = 0, disk: int | None = None) -> Plan:
    """A plan by the first letters of tiers; the budgets are in layers, the ring of two beside."""
    names = {"F": "FAST", "R": "RAM", "D": "DISK"}
    placements = {u.name: Placement(names[t], u.nbytes) for u, t in zip(units(model), tiers, strict=True)}
    limits = {
        "FAST": None if fast is None else fast * LAYER + 2 * ROOM,
        "RAM": ram * LAYER,
        "DISK": None if disk is None else disk * LAYER,
    }
    return Plan((FAST, RAM, DISK), placements, 2 * ROOM, fingerprint(model), "by hand", limits)


def letters(handle: Handle) -> str:
    return "".join(tier[0] for tier in handle.tiers().values())


def watch_budgets(handle: Handle, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Asserts after each move that every tier's weights are within its budget."""
    seen: list[tuple[str, str]] = []
    move = handle.move

    def checked(name: str, tier: str) -> int:
        moved = move(name, tier)
        seen.append((name, tier))
        held = dict.fromkeys(handle.plan.specs, 0)
        for unit, where in handle.tiers().items():
            held[where] += handle.plan.placements[unit].nbytes
        held["FAST"] += handle.plan.buffer_bytes
        for where, limit in handle.plan.budgets.items():
            assert limit is None or held[where] <= limit, (seen, held)
        return moved

    monkeypatch.setattr(handle, "move", checked)
    return seen


def given(*scores: float) -> Callable[[], Mapping[str, float]]:
    return lambda: {str(index): score for index, score in enumerate(scores)}


def options(**changed: Any) -> Any:
    return {"every": 1, "max_bytes": 1 << 30, "hysteresis": 0.1, **changed}


@pytest.mark.parametrize("budgets", [{"fast": 2}, {"fast": 2, "ram": 2}, {"fast": 1, "ram": 3, "disk": 4}])
def test_30_steps_have_the_same_bits_and_budgets_hold(budgets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = make(), make()
    optimizer, other = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, reference))
    generator = random.Random(0)

    def scores() -> dict[str, float]:
        return {str(index): generator.random() for index in range(6)}

    start = {2: "FFDDDD", 1: "FRRDDD"}[budgets["fast"]]
    with attach(model, placed(model, start, **budgets)) as handle:
        moves = watch_budgets(handle, monkeypatch)
        tiering = DynamicTiering(handle, scores, **options(every=3))
        data = torch.Generator().manual_seed(1)
        for step in range(1, 31):
            x = torch.randn(8, 32, generator=data)
            losses = []
            for m, o, advance in ((model, optimizer, lambda: handle.step(optimizer)), (reference, other, other.step)):
                o.zero_grad()
                losses.append(m(x).square().mean())
                losses[-1].backward()
                advance()
            assert torch.equal(losses[0], losses[1])
            record = tiering.step()
            assert (record is not None) == (step % 3 == 0)
        assert [record.step for record in tiering.records] == list(range(3, 31, 3))
        assert [(move.unit, move.target) for record in tiering.records for move in record.moves] == moves
        assert tiering.moved_bytes == LAYER * len(moves) > 10 * LAYER
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(p, q)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_highest_scores_get_the_fastest_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    with attach(model, placed(model, "FFRRDD", fast=2, ram=2)) as handle:
        watch_budgets(handle, monkeypatch)
        DynamicTiering(handle, given(1, 2, 3, 4, 5, 6), **options()).step()
        assert letters(handle) == "DDRRFF"
        # Nothing is wanted any more, and nothing moves.
        record = DynamicTiering(handle, given(1, 2, 3, 4, 5, 6), **options()).step()
        assert record is not None
        assert record.moves == record.deferred == ()
        # Two full tiers exchange by way of a third.
        DynamicTiering(handle, given(1, 2, 6, 5, 4, 3), **options()).step()
        assert letters(handle) == "DDFFRR"


def test_two_full_tiers_without_a_third_defer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(4)
    with attach(model, placed(model, "FFRR", fast=2, ram=2, disk=0)) as handle:
        record = DynamicTiering(handle, given(1, 2, 3, 4), **options()).replan()
        assert record.deferred == ("3", "2")
        assert record.moves == ()
        assert letters(handle) == "FFRR"


def test_hysteresis_keeps_alternating_scores_from_flapping() -> None:
    def train(hysteresis: float, margin: float) -> tuple[int, str]:
        model = make(2)
        turns = iter(range(10))

        def scores() -> Mapping[str, float]:
            first = next(turns) % 2 == 0
            return {"0": 1.0 if first else margin, "1": margin if first else 1.0}

        with attach(model, placed(model, "FD", fast=1)) as handle:
            tiering = DynamicTiering(handle, scores, **options(hysteresis=hysteresis))
            for _ in range(10):
                tiering.step()
            return sum(len(record.moves) for record in tiering.records), letters(handle)

    assert train(0.1, 1.05) == (0, "FD")
    assert train(0.0, 1.05) == (20, "FD")
    assert train(0.1, 1.2) == (20, "FD")


def test_negative_scores_have_a_margin_too() -> None:
    model = make(2)
    with attach(model, placed(model, "FD", fast=1)) as handle:
        assert DynamicTiering(handle, given(-1.0, -0.95), **options()).replan().moves == ()
        assert len(DynamicTiering(handle, given(-1.0, -0.8), **options()).replan().moves) == 2


def test_bytes_are_bounded_and_the_largest_gain_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    with attach(model, placed(model, "FFFDDD", fast=3)) as handle:
        watch_budgets(handle, monkeypatch)
        tiering = DynamicTiering(handle, given(3, 1, 2, 7, 9, 8), **options(max_bytes=2 * LAYER + 100))
        record = tiering.step()
        assert record is not None
        assert [(move.unit, move.target) for move in record.moves] == [("1", "DISK"), ("4", "FAST")]
        assert record.deferred == ("5", "3")
        assert record.nbytes == 2 * LAYER
        tiering.step()
        assert letters(handle) == "FDDDFF"
        tiering.step()
        assert letters(handle) == "DDDFFF"
        none = DynamicTiering(handle, given(9, 9, 9, 1, 1, 1), **options(max_bytes=LAYER)).replan()
        assert none.moves == ()
        assert len(none.deferred) == 3


def test_random_scores_and_budgets_never_exceed_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(3)
    torch.manual_seed(0)
    widths = [16, 48, 24, 64, 8, 40, 56, 32]
    model = nn.ModuleList(nn.Linear(width, 32) for width in widths)
    for _ in range(20):
        sizes = {u.name: u.nbytes for u in units(model)}
        total = sum(sizes.values())
        budgets = {
            "FAST": 16384 + int(total * generator.uniform(0.2, 0.5)),
            "RAM": int(total * generator.uniform(0.1, 0.4)),
        }
        scores = {name: generator.random() for name in sizes}
        first = plan(model, [FAST, RAM, DISK], budgets, "random", seed=generator.randrange(99))
        with attach(model, first) as handle, monkeypatch.context() as patch:
            watch_budgets(handle, patch)
            limit = generator.choice([0, 5000, 20_000, 1 << 30])
            tiering = DynamicTiering(handle, lambda scores=scores: scores, **options(max_bytes=limit, hysteresis=0.0))
            for _ in range(4):
                assert tiering.replan().nbytes <= limit
            if limit == 1 << 30:
                assert tiering.records[-1].moves == ()
                assert tiering.records[0].moves


def test_traffic_moves_to_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(6)
    # Two others between its uses, so that the ring of two does not keep it.
    uses: list[tuple[str, float]] = [(name, 1e-5) for name in "312345"]
    with attach(model, placed(model, "FDDDDD", fast=1)) as handle:
        watch_budgets(handle, monkeypatch)

        def exposed() -> float:
            sizes = {name: placement.nbytes for name, placement in handle.plan.placements.items()}
            accesses = [Access(name, handle.tiers()[name], sizes[name], seconds) for name, seconds in uses] * 2
            return simulate(accesses, handle.plan.specs, buffer_bytes=2 * ROOM).exposed_seconds

        before = exposed()
        tiering = DynamicTiering(handle, objective="traffic", uses=lambda: uses, **options())
        record = tiering.step()
        assert record is not None
        assert handle.tiers()["3"] == "FAST"
        assert exposed() < 0.75 * before
        assert tiering.replan().moves == ()
        # What saves less than the margin is left alone.
        uses[:] = [("0", 1e-5), ("3", 1e-5), ("1", 1.0), ("2", 1.0), ("0", 1e-5)]
        assert tiering.replan().moves == ()


def test_units_without_a_score_have_the_lowest() -> None:
    model = make(4)
    with attach(model, placed(model, "FFDD", fast=2)) as handle:
        DynamicTiering(handle, lambda: {"1": 2.0, "2": 5.0, "3": 1.0}, **options()).replan()
        assert letters(handle) == "DFFD"


def test_a_policy_chooses_and_is_held_to_the_budgets() -> None:
    model = make(3)

    def swap(scores: Mapping[str, float], tiers: Mapping[str, str]) -> Mapping[str, str]:
        return {name: "FAST" if name == "2" else "DISK" for name in tiers}

    with attach(model, placed(model, "FDD", fast=1)) as handle:
        DynamicTiering(handle, given(1, 1, 1), **options(objective=swap)).replan()
        assert letters(handle) == "DDF"

        def refused(policy: object, what: str) -> None:
            with pytest.raises(ValueError, match=what):
                DynamicTiering(handle, given(1, 1, 1), **options(objective=policy)).replan()
            assert letters(handle) == "DDF"

        refused(lambda scores, tiers: dict.fromkeys(tiers, "FAST"), "expected tiers within their budgets")
        refused(lambda scores, tiers: {"0": "FAST"}, "objective: expected all of the model's units")
        refused(lambda scores, tiers: dict.fromkeys(tiers, "TAPE"), "expected tiers of FAST, RAM, DISK, got 'TAPE'")


def test_what_the_ring_cannot_hold_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8, bias=False), nn.Linear(8, 8, bias=False))
    placements = {u.name: Placement(t, u.nbytes) for u, t in zip(units(model), ("FAST", "DISK", "DISK"), strict=True)}
    first = Plan(
        (FAST, DISK), placements, 8192, fingerprint(model), "by hand", {"FAST": 16384 + 8192 + 300, "DISK": None}
    )
    with attach(model, first) as handle:
        record = DynamicTiering(handle, given(0, 5, 3), **options()).replan()
        assert [move.unit for move in record.moves] == ["2"]
        assert handle.tiers() == {"0": "FAST", "1": "DISK", "2": "FAST"}


def test_wrong_arguments_and_scores_are_refused() -> None:
    model = make(2)
    with attach(model, placed(model, "FD", fast=1)) as handle:
        for changed, what in (
            ({"every": 0}, "every: expected one step or more, got 0"),
            ({"max_bytes": -1}, "max_bytes: expected zero or more, got -1"),
            ({"hysteresis": float("nan")}, "hysteresis: expected zero or more, got nan"),
            ({"objective": "size"}, "objective: expected importance, traffic or a function, got 'size'"),
            ({"objective": "traffic"}, "uses: expected a function"),
        ):
            with pytest.raises(ValueError, match=what):
                DynamicTiering(handle, given(1, 2), **options(**changed))
        with pytest.raises(ValueError, match="scores: expected a function"):
            DynamicTiering(handle, **options())
        for scores, what in (
            (given(1, 2, 3), "scores: expected names of the model's units, got '2'"),
            (given(1, float("nan")), "scores: 1: expected a finite number, got nan"),
        ):
            with pytest.raises(ValueError, match=what):
                DynamicTiering(handle, scores, **options()).replan()
        assert letters(handle) == "FD"
    with (
        attach(model.requires_grad_(False), placed(model, "FD", fast=1), materialize=True) as handle,
        pytest.raises(ValueError, match="handle: expected one of attach without materialize"),
    ):
        DynamicTiering(handle, given(1, 2), **options())


@pytest.mark.parametrize("source", ["GradientEma", "AdamStateAnalyzer"])
def test_live_importance_drives_it_and_the_bits_stay(source: str) -> None:
    model, reference = make(), make()
    optimizer, other = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, reference))
    x = torch.randn(4, 32)
    # The first layers' gradients are the largest here, and they begin on disk.
    with attach(model, placed(model, "DDDDFF", fast=2)) as handle, GradientEma(model) as average:
        scores = average.scores if source == "GradientEma" else lambda: AdamStateAnalyzer()(model, optimizer)
        tiering = DynamicTiering(handle, scores, every=4, max_bytes=10 * LAYER, hysteresis=0.0)
        for m, o, step in ((model, optimizer, lambda: handle.step(optimizer)), (reference, other, other.step)):
            for _ in range(8):
                o.zero_grad()
                m(x).square().sum().backward()
                step()
                if m is model:
                    tiering.step()
        best = sorted(scores(), key=lambda name: -scores()[name])[:2]
        assert {name for name, tier in handle.tiers().items() if tier == "FAST"} == set(best)
        assert sum(len(record.moves) for record in tiering.records) > 0
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)
