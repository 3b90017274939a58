"""The tier time model against closed forms and a clock that ticks."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from infold.tiers import Access, Overhead, TierSpec, simulate
from infold.tiers.emulate import EmulatedPiece, Link, no_memory
from infold.tiers.engine import Engine
from infold.tiers.ring import Ring

FAST = TierSpec("fast", 0, 1, resident=True)
PAGE = 4096
#: A page takes 4 ticks of a microsecond from "near" and 16 from "far", and a setup of 1 and 3.
NEAR = TierSpec("near", 1, PAGE / 4e3)
FAR = TierSpec("far", 3, PAGE / 16e3)
SPECS = {spec.name: spec for spec in (FAST, NEAR, FAR)}
TICKS = {"near": (1, 4), "far": (3, 16)}


def ticking(accesses: list[tuple[str, int, int]], room: int, distance: int | None) -> list[tuple[int, int, int]]:
    """(transfer start, compute start, compute end) of each access, by a machine that does one thing at a time a tick.

    accesses: (tier, pages, ticks of computing). room: pages of the ring.
    """
    count = len(accesses)
    started: list[int | None] = [None] * count
    arrived = [False] * count
    begun: list[int | None] = [None] * count
    done: list[int | None] = [None] * count
    wire: dict[str, tuple[int, int] | None] = {"near": None, "far": None}  # (access, ticks left)
    waiting: dict[str, list[int]] = {"near": [], "far": []}
    to_issue = [index for index, access in enumerate(accesses) if access[0] != "fast"]
    in_ring: set[int] = set()
    running: tuple[int, int] | None = None
    current = 0
    clock = 0
    while current < count:
        changed = True
        while changed:
            changed = False
            if running is not None and running[1] == 0:
                done[running[0]] = clock
                in_ring.discard(running[0])
                current, running, changed = running[0] + 1, None, True
            for tier, load in wire.items():
                if load is not None and load[1] == 0:
                    arrived[load[0]], wire[tier], changed = True, None, True
            if to_issue:
                index = to_issue[0]
                near_enough = distance is None or index - distance <= current
                if near_enough and sum(accesses[held][1] for held in in_ring) + accesses[index][1] <= room:
                    in_ring.add(index)
                    waiting[accesses[index][0]].append(index)
                    to_issue.pop(0)
                    changed = True
            for tier, queue in waiting.items():
                if wire[tier] is None and queue:
                    index = queue.pop(0)
                    setup, each = TICKS[tier]
                    wire[tier], started[index], changed = (index, setup + each * accesses[index][1]), clock, True
            if running is None and current < count and (accesses[current][0] == "fast" or arrived[current]):
                running, begun[current], changed = (current, accesses[current][2]), clock, True
        clock += 1
        running = None if running is None else (running[0], running[1] - 1)
        wire = {tier: None if load is None else (load[0], load[1] - 1) for tier, load in wire.items()}
    return [
        (b if s is None else s, b, d)
        for s, b, d in zip(started, begun, done, strict=True)
        if b is not None and d is not None
    ]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["fast", "near", "far"]), st.integers(1, 3), st.integers(0, 40)), max_size=12),
    st.integers(3, 12),
    st.none() | st.integers(0, 4),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_agrees_with_a_machine_that_ticks(
    accesses: list[tuple[str, int, int]], room: int, distance: int | None, overhead: tuple[int, int]
) -> None:
    # Each unit is used once, and so fetched where it is away.
    busy = [(tier, size, ticks + (tier != "fast") * sum(overhead)) for tier, size, ticks in accesses]
    expected = ticking(busy, room, distance)
    timeline = simulate(
        [Access(str(i), tier, pages * PAGE, ticks * 1e-6) for i, (tier, pages, ticks) in enumerate(accesses)],
        SPECS,
        buffer_bytes=room * PAGE,
        distance=distance,
        overhead=Overhead(*(ticks * 1e-6 for ticks in overhead)),
    )
    assert len(timeline.events) == len(expected)
    for event, (tier, pages, _), (start, begin, end) in zip(timeline.events, accesses, expected, strict=True):
        assert event.compute_start * 1e6 == pytest.approx(begin, abs=1e-6)
        assert event.compute_end * 1e6 == pytest.approx(end, abs=1e-6)
        if tier != "fast":
            setup, each = TICKS[tier]
            assert event.transfer_start * 1e6 == pytest.approx(start, abs=1e-6)
            assert (event.transfer_end - event.transfer_start) * 1e6 == pytest.approx(setup + each * pages, abs=1e-6)
    total = expected[-1][2] if expected else 0
    assert timeline.seconds * 1e6 == pytest.approx(total, abs=1e-6)
    assert timeline.exposed_seconds * 1e6 == pytest.approx(total - sum(a[2] for a in busy), abs=1e-5)
    assert timeline.seconds >= timeline.bound_seconds * (1 - 1e-12)


def layers(count: int, nbytes: int, seconds: float, tier: str = "near") -> list[Access]:
    return [Access(f"layer{index}", tier, nbytes, seconds) for index in range(count)]


def test_bound_by_transfers_takes_setups_and_bytes() -> None:
    spec = TierSpec("near", 30, 2)
    accesses = layers(10, 3 * PAGE + 5, 1e-9)
    timeline = simulate(accesses, {"near": spec}, buffer_bytes=100 * PAGE)
    transfers = 10 * (30e-6 + (3 * PAGE + 5) / 2e9)
    assert timeline.seconds == pytest.approx(transfers + 1e-9, rel=1e-12)
    assert timeline.exposed_seconds == pytest.approx(transfers + 1e-9 - 10e-9, rel=1e-12)
    assert timeline.bytes_by_tier == {"near": 10 * (3 * PAGE + 5)}
    assert timeline.transfer_seconds_by_tier["near"] == pytest.approx(transfers, rel=1e-12)


def test_bound_by_computing_waits_for_the_first_weight_alone() -> None:
    timeline = simulate(layers(10, PAGE, 1e-3), SPECS, buffer_bytes=2 * PAGE)
    first = 5e-6
    assert timeline.seconds == pytest.approx(10e-3 + first, rel=1e-12)
    assert [event.wait for event in timeline.events][1:] == [0.0] * 9
    assert timeline.bound_seconds == pytest.approx(10e-3, rel=1e-12)


def test_one_buffer_leaves_nothing_to_overlap() -> None:
    timeline = simulate(layers(7, PAGE, 2e-6), SPECS, buffer_bytes=PAGE)
    assert timeline.seconds == pytest.approx(7 * (5e-6 + 2e-6), rel=1e-12)


def test_distance_0_overlaps_nothing_and_1_a_layer() -> None:
    accesses = layers(6, PAGE, 3e-6)
    serial = simulate(accesses, SPECS, buffer_bytes=100 * PAGE, distance=0)
    assert serial.seconds == pytest.approx(6 * (5e-6 + 3e-6), rel=1e-12)
    # The link never rests: each fetch is issued while the one before is still under way.
    one = simulate(accesses, SPECS, buffer_bytes=100 * PAGE, distance=1)
    assert one.seconds == pytest.approx(6 * 5e-6 + 3e-6, rel=1e-12)
    # Where a layer takes longer than its transfer, each waits for nothing.
    slow = simulate(layers(6, PAGE, 9e-6), SPECS, buffer_bytes=100 * PAGE, distance=1)
    assert slow.exposed_seconds == pytest.approx(5e-6, rel=1e-12)


def test_links_work_side_by_side() -> None:
    accesses = [access for pair in zip(layers(8, PAGE, 0), layers(8, PAGE, 0, "far"), strict=True) for access in pair]
    timeline = simulate(accesses, SPECS, buffer_bytes=100 * PAGE)
    assert timeline.seconds == pytest.approx(8 * 19e-6, rel=1e-12)


def test_resident_weights_and_empty_ones_take_no_time() -> None:
    timeline = simulate([Access("a", "fast", 10**12, 1.0), Access("b", "near", 0, 2.0)], SPECS, buffer_bytes=0)
    assert (timeline.seconds, timeline.exposed_seconds) == (3.0, 0.0)
    assert timeline.bytes_by_tier == {"fast": 0, "near": 0, "far": 0}


def test_a_second_pass_finds_its_first_weight_fetched() -> None:
    once = layers(4, PAGE, 1e-4)
    timeline = simulate(once * 2, SPECS, buffer_bytes=2 * PAGE)
    assert timeline.exposed_seconds == pytest.approx(5e-6, rel=1e-12)


def test_nothing_takes_no_time() -> None:
    assert simulate([], SPECS, buffer_bytes=0).seconds == 0.0


class Clock:
    """A clock that moves when something waits or computes."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def engine_seconds(accesses: list[Access], room: int, passes: int, overhead: float) -> list[float]:
    """When each pass ends, by the engine over emulated links; the first passes teach it the order."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infold.tiers.engine.time", clock)
        patch.setattr("infold.tiers.emulate.time", clock)
        patch.setattr("infold.tiers.emulate._SPIN_SECONDS", 0.0)
        links = {spec.name: Link(spec) for spec in (NEAR, FAR)}
        pieces = {a.unit: EmulatedPiece((), a.nbytes, links[a.tier]) for a in accesses if a.tier != "fast"}
        engine = Engine(pieces, Ring(room, no_memory))
        ends = []
        for _ in range(passes):
            for access in accesses:
                with engine.use(access.unit):
                    clock.now += access.compute_seconds + (overhead if access.tier != "fast" else 0.0)
            ends.append(clock.now)
    return ends


@st.composite
def passes_with_repeats(draw: st.DrawFn) -> list[Access]:
    """A pass in which units come back; any three uses in a row are there once, so that the order can be learnt."""
    kinds = st.tuples(st.sampled_from(["fast", "near", "far"]), st.integers(1, 3))
    kind = draw(st.lists(kinds, min_size=3, max_size=8))
    order = draw(st.permutations([*range(len(kind)), *draw(st.lists(st.sampled_from(range(len(kind))), max_size=4))]))
    fetched = [unit for unit in order if kind[unit][0] != "fast"]
    windows = [tuple((fetched * 2)[index : index + 3]) for index in range(len(fetched))]
    assume(len(set(windows)) == len(windows))
    ticks = draw(st.lists(st.integers(1, 40), min_size=len(order), max_size=len(order)))
    return [
        Access(str(unit), kind[unit][0], kind[unit][1] * PAGE, each * 1e-6)
        for unit, each in zip(order, ticks, strict=True)
    ]


@settings(max_examples=150, deadline=None)
@given(passes_with_repeats(), st.integers(3, 12), st.sampled_from([0.0, 3e-6, 20e-6]))
def test_agrees_with_the_engine(accesses: list[Access], room: int, overhead: float) -> None:
    # It takes the engine some passes to learn the order, and then to come into step.
    passes, last = 60, 8
    ends = engine_seconds(accesses, room * PAGE, passes, overhead)
    timeline = simulate(accesses * passes, SPECS, buffer_bytes=room * PAGE, overhead=Overhead(overhead))
    before = timeline.events[(passes - last) * len(accesses) - 1].compute_end
    assert timeline.seconds - before == pytest.approx(ends[-1] - ends[-1 - last], rel=1e-9)


def test_what_is_used_twice_in_a_row_is_fetched_once() -> None:
    # As a tied embedding: the last use of a pass and the first of the next.
    accesses = [*layers(4, PAGE, 1e-6), Access("layer0", "near", PAGE, 1e-6)]
    timeline = simulate(accesses * 3, SPECS, buffer_bytes=2 * PAGE)
    assert timeline.bytes_by_tier["near"] == (1 + 3 * 4) * PAGE


def test_what_the_ring_holds_is_fetched_once() -> None:
    timeline = simulate(layers(4, PAGE, 1e-6) * 3, SPECS, buffer_bytes=4 * PAGE, overhead=Overhead(2e-6, 7e-6))
    assert timeline.bytes_by_tier["near"] == 4 * PAGE
    assert timeline.compute_seconds == pytest.approx(12 * (1e-6 + 2e-6) + 4 * 7e-6, rel=1e-12)
    assert [event.fetched for event in timeline.events] == [True] * 4 + [False] * 8


@pytest.mark.parametrize(
    ("access", "options", "message"),
    [
        (Access("a", "tape", 1, 0.0), {}, "a: expected one of the tiers fast, near, far, got 'tape'"),
        (Access("a", "near", -1, 0.0), {}, "a: nbytes"),
        (Access("a", "near", 1, -1.0), {}, "a: compute_seconds"),
        (Access("a", "near", 1, math.nan), {}, "a: compute_seconds"),
        (Access("a", "near", PAGE + 1, 0.0), {"buffer_bytes": 2 * PAGE - 1}, "a: expected at most buffer_bytes"),
        (Access("a", "near", 1, 0.0), {"buffer_bytes": -1}, "buffer_bytes"),
        (Access("a", "near", 1, 0.0), {"distance": -1}, "distance"),
    ],
)
def test_refuses(access: Access, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate([access], SPECS, **{"buffer_bytes": 10 * PAGE, **options})
