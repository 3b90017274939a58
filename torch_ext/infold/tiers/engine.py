"""Decides what is fetched when, and into which buffer."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto

from torch import Tensor

from infold.storages import storage_key
from infold.tiers.order import AccessOrder
from infold.tiers.pieces import Piece, Wait
from infold.tiers.ring import Buffers
from infold.tiers.units import pages

#: How many uses ahead are looked at.
HORIZON = 256


@dataclass
class Counters:
    """What the engine has done.

    demanded: fetches that began only when they were needed. elsewhere: uses of a unit where it lives, for want of room.
    waited: seconds that computing stood still, by unit.
    """

    uses: int = 0
    fetches: int = 0
    demanded: int = 0
    elsewhere: int = 0
    saves: int = 0
    bytes_fetched: int = 0
    waited: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class Use(Enum):
    """How a piece is used: in the ring, where it lives for want of room, or not at all, for it was restored."""

    HERE = auto()
    HOME = auto()
    NONE = auto()


class _State:
    """A piece on its way: at home (no memory), coming (wait), here (memory), in use (pins; home_uses at home)."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.memory: Tensor | None = None
        self.wait: Wait | None = None
        self.saving: Wait | None = None
        self.version = piece.version()
        self.bound = False
        self.pins = 0
        self.home_uses = 0


class Engine:
    """Brings pieces into the ring's memory before they are used, and lets them go when others need it.

    Among those that are not in use the one goes first whose next use is farthest (Belady's rule, by the order learnt).
    Where all that fills the ring is in use, a piece is used where it lives; one that cannot be takes more memory than
    the ring may have, for a wrong result would be worse.

    Safe to call from several threads, one of which does something at a time, waiting included.
    """

    def __init__(self, pieces: Mapping[str, Piece], ring: Buffers) -> None:
        self._states = {name: _State(piece) for name, piece in pieces.items()}
        self._here: dict[str, _State] = {}  # those that have memory: few, and looked through at every use
        self._ring = ring
        self._order = AccessOrder(max(10_000, 64 * len(pieces)))
        self._lock = threading.RLock()
        self._process = os.getpid()
        self.counters = Counters()

    def acquire(self, name: str) -> Use:
        """Has a piece here, and keeps it until `release`, which is to be told what this returns.

        Raises what fetching it ended with; it is at home then. RuntimeError in a process that was forked since.
        """
        if os.getpid() != self._process:
            raise RuntimeError("tiers: expected the process that attached the model, for its threads are not in a fork")
        with self._lock:
            state = self._states.get(name)
            if state is None:
                return Use.NONE  # restored meanwhile: a graph of before may still ask
            self.counters.uses += 1
            self._order.visit(name)
            demanded = False
            if state.pins == 0:
                if state.memory is not None and not state.bound and state.version != state.piece.version():
                    self._let_go(name, state)  # somebody wrote to it at home since
                if state.home_uses:
                    return self._use_at_home(state)  # by another thread, which has its address
                if state.memory is None:
                    self._make_room(state.piece.nbytes)
                    if not self._ring.has_room(state.piece.nbytes) and state.piece.readable:
                        return self._use_at_home(state)  # all that fills the ring is in use
                    self._fetch(name, state)
                    self.counters.demanded += 1
                    demanded = True
            state.pins += 1
            try:
                if demanded:
                    # What comes next is read behind it: the disk is not to stand still while it is waited for.
                    self._prefetch()
                if state.wait is not None:
                    self._await(name, state)
                if not state.bound:
                    state.piece.arrive(_present(state))
                    state.bound = True
                    state.version = state.piece.version()
                self._prefetch()
            except BaseException:
                state.pins -= 1  # nobody will release it
                raise
            return Use.HERE

    def release(self, name: str, use: Use) -> None:
        """Ends a use that `acquire` began."""
        with self._lock:
            state = self._states.get(name)
            if state is None or use is Use.NONE:
                return
            if use is Use.HOME:
                state.home_uses -= 1
                return
            state.pins -= 1
            if state.pins == 0:
                if state.version != state.piece.version():
                    self._save(state)
                elif state.saving is None:
                    state.piece.leave()
                    state.bound = False
                self._prefetch()

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        use = self.acquire(name)
        try:
            yield
        finally:
            self.release(name, use)

    def add(self, name: str, piece: Piece) -> None:
        with self._lock:
            self._states[name] = _State(piece)

    def send_home(self, name: str) -> Piece:
        """Ends whatever a piece is doing, and returns it."""
        with self._lock:
            self._let_go(name, self._states[name])
            return self._states[name].piece

    def forget(self, name: str) -> None:
        """Drops a piece that was sent home."""
        with self._lock:
            del self._states[name]

    def holds(self, name: str, tensors: Sequence[Tensor]) -> bool:
        """Whether there is such a piece, and of just these tensors."""
        return name in self._states and self._states[name].piece.keys() == set(map(storage_key, tensors))

    def fleeting(self, name: str) -> set[int]:
        """The storages (`storage_key`) of a piece that have no memory once it is released."""
        state = self._states.get(name)
        return set() if state is None or state.piece.readable else state.piece.keys()

    def refresh(self) -> None:
        """Forgets everything that was fetched and is not in use: the next uses fetch it again. What is bound here may
        have been written to unseen, and goes home.
        """
        with self._lock:
            for name, state in self._states.items():
                if state.bound:
                    self._finish_saving(state)
                    if state.piece.touch():
                        state.version = -1
                if state.pins == 0:
                    self._let_go(name, state)

    @property
    def names(self) -> list[str]:
        return list(self._states)

    def _use_at_home(self, state: _State) -> Use:
        state.home_uses += 1
        self.counters.elsewhere += 1
        return Use.HOME

    def _fetch(self, name: str, state: _State) -> None:
        state.version = state.piece.version()
        state.memory, state.wait = state.piece.load(self._ring)
        self._here[name] = state
        self.counters.fetches += 1
        self.counters.bytes_fetched += state.piece.nbytes

    def _await(self, name: str, state: _State) -> None:
        wait, state.wait = state.wait, None
        begun = time.perf_counter()
        try:
            if wait is not None:
                wait()
        except BaseException:
            self._give_back(name, state)
            raise
        self.counters.waited[name] += time.perf_counter() - begun

    def _save(self, state: _State) -> None:
        """Begins to write a piece home. It stays bound until that is done, so that whoever looks sees what is new."""
        self._finish_saving(state)
        state.version = state.piece.version()
        state.saving = state.piece.save(_present(state))
        self.counters.saves += 1

    def _finish_saving(self, state: _State) -> None:
        wait, state.saving = state.saving, None
        if wait is not None:
            try:
                wait()
            except BaseException:
                state.version = -1  # it is here alone still
                raise

    def _let_go(self, name: str, state: _State) -> None:
        """Sends a piece home, whatever it is doing. Where writing it fails it stays here."""
        if state.wait is not None:
            with suppress(RuntimeError):  # nobody asked for it yet; who does will be told
                state.wait()
            state.wait = None  # only now: after an interrupt, who asks still has to wait
        if state.bound:
            self._finish_saving(state)
            while state.version != state.piece.version():
                self._save(state)
                self._finish_saving(state)
            state.piece.leave()
            state.bound = False
        if state.memory is not None:
            self._give_back(name, state)

    def _give_back(self, name: str, state: _State) -> None:
        memory, state.memory = state.memory, None
        self._here.pop(name, None)
        if memory is not None:
            self._ring.give(memory)

    def _make_room(self, nbytes: int, upto: int = HORIZON + 1, upcoming: list[str] | None = None) -> None:
        """Lets pieces go whose next use comes at ``upto`` or later, the farthest first, until ``nbytes`` fit."""
        if self._ring.has_room(nbytes) or pages(nbytes) > self._ring.capacity:
            return
        if upcoming is None:
            upcoming = self._order.upcoming(HORIZON)
        soon = set(upcoming[: upto + 1]) if upto <= HORIZON else ()
        idle = [name for name, state in self._here.items() if state.pins == 0 and name not in soon]
        if len(idle) > 1:
            next_use = dict(zip(reversed(upcoming), range(len(upcoming) - 1, -1, -1), strict=True))
            idle.sort(key=lambda name: -next_use.get(name, HORIZON))
        for name in idle:
            self._let_go(name, self._here[name])
            if self._ring.has_room(nbytes):
                return

    def _prefetch(self) -> None:
        """Begins to fetch what is expected next, as far as the ring reaches. What fails does so again for who asks."""
        if len(self._here) == len(self._states):
            return
        upcoming = self._order.upcoming(HORIZON)
        with suppress(RuntimeError):
            for index, name in enumerate(upcoming):
                state = self._states.get(name)
                if state is None or state.memory is not None or state.home_uses:
                    continue
                self._make_room(state.piece.nbytes, index, upcoming)
                if not self._ring.has_room(state.piece.nbytes):
                    return
                self._fetch(name, state)


def _present(state: _State) -> Tensor:
    assert state.memory is not None
    return state.memory
