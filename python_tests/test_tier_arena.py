"""The memory that weights are fetched into, against a list of which pages are whose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from infold.tiers.arena import Arena
from infold.tiers.ranges import Ranges
from infold.tiers.ring import host_memory
from torch import Tensor

PAGE = 4096


def longest_run(free: list[bool]) -> int:
    best = run = 0
    for page in free:
        run = run + 1 if page else 0
        best = max(best, run)
    return best


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 24), st.lists(st.tuples(st.booleans(), st.integers(1, 12), st.integers(0, 30)), max_size=60))
def test_ranges_are_disjoint_and_join_again(capacity: int, steps: list[tuple[bool, int, int]]) -> None:
    arena = Arena(capacity * PAGE, host_memory)
    held: list[Tensor] = []
    owner: list[bool] = [True] * capacity
    for takes, size, which in steps:
        if takes:
            # One that has no place is refused, but for want of a place alone.
            assert arena.has_room(size * PAGE - 5) == (longest_run(owner) >= size)
            if not arena.has_room(size * PAGE):
                continue
            memory = arena.take(size * PAGE - 5)
            assert memory.nbytes == size * PAGE
            start = (memory.data_ptr() - arena._memory.data_ptr()) // PAGE  # type: ignore[union-attr]
            assert all(owner[start : start + size])
            owner[start : start + size] = [False] * size
            held.append(memory)
        elif held:
            memory = held.pop(which % len(held))
            start = (memory.data_ptr() - arena._memory.data_ptr()) // PAGE  # type: ignore[union-attr]
            owner[start : start + memory.nbytes // PAGE] = [True] * (memory.nbytes // PAGE)
            arena.give(memory)
        assert arena.taken == sum(memory.nbytes for memory in held)
    for memory in held:
        arena.give(memory)
    assert arena.has_room(capacity * PAGE)


def test_small_ranges_leave_room_for_a_large_one() -> None:
    # Two of one page and one of three, in six: when the small ones go, another large one fits.
    arena = Arena(6 * PAGE, host_memory)
    small = [arena.take(PAGE), arena.take(PAGE)]
    large = arena.take(3 * PAGE)
    for memory in small:
        arena.give(memory)
    assert arena.has_room(3 * PAGE)
    assert arena.take(3 * PAGE).data_ptr() != large.data_ptr()


def test_what_has_no_room_lies_beside_it() -> None:
    arena = Arena(2 * PAGE, host_memory)
    first, beside = arena.take(2 * PAGE), arena.take(PAGE)
    assert beside.data_ptr() not in (first.data_ptr(), first.data_ptr() + PAGE)
    arena.give(beside)
    assert arena.taken == 2 * PAGE
    arena.give(first)
    arena.clear()
    assert torch.equal(arena.take(PAGE), torch.zeros(PAGE, dtype=torch.uint8))
    assert not arena.has_room(3 * PAGE)


@pytest.mark.parametrize("nbytes", [1, 4096, (2 << 20) - 1, 2 << 20, (5 << 20) + 1])
def test_host_memory_is_whole_pages_that_begin_with_a_huge_one(nbytes: int) -> None:
    memory = host_memory(nbytes)
    assert memory.nbytes == -(-nbytes // 4096) * 4096
    assert memory.data_ptr() % (2 << 20 if memory.nbytes >= 2 << 20 else 4096) == 0
    # Its storage is just that, and nobody else's: activations are bound to it.
    storage = memory.untyped_storage()
    assert (storage.data_ptr(), storage.nbytes()) == (memory.data_ptr(), memory.nbytes)
    assert not memory._is_view()
    memory.fill_(7)
    assert memory[-1] == 7


def test_a_range_is_given_back_once() -> None:
    ranges = Ranges(0, 8)
    ranges.remove(2, 4)
    for start, end in ((0, 2), (1, 3), (3, 5), (0, 8), (4, 8)):
        with pytest.raises(ValueError, match="range: expected one that somebody has"):
            ranges.add(start, end)
    ranges.add(2, 4)
    assert ranges.fitting(8) == [(0, 8)]
