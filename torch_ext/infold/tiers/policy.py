"""A tier policy that is learned: features of a unit in, a tier out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

from infold.tiers.plan import Plan, settle
from infold.tiers.problem import Uses, check_names, problem_of
from infold.tiers.schedule import NO_OVERHEAD, Overhead
from infold.tiers.search import Exposure
from infold.tiers.spec import TierSpec

Array = npt.NDArray[np.float64]

#: Waves along the order of use, so that a linear policy can space its choices out.
_HARMONICS = (1, 2, 4, 8, 16)


class LearnedPolicy:
    """Places units by a linear softmax policy, trained by the cross-entropy method on the time model.

    *State*: of each unit, by itself: the rank of its bytes, of the seconds that its layers compute, of the computing
    between it and the use before it, and of how often it is used; its first use's place in the order of use, and five
    sines and cosines of it; the rank of each of ``signals`` (variance, importance, gradient statistics, what one has);
    a constant. Ranks run from -1 to 1.

    *Action*: a tier for each unit: logits are the features times a matrix of weights, a column for each tier, and the
    softmax says how sure a choice is. Units choose in the order of how sure they are and get the tier that they like
    best of those with room (`Packing.nearest`), so that every action keeps the budgets, the ring of buffers counted.

    *Reward*: minus the seconds that two passes take in the time model (`simulate`), as a multiple of the time that no
    schedule beats with every weight resident; in `refine`, minus measured seconds.

    *Training*: each iteration draws weights from a normal distribution of independent entries, keeps the ``elite`` with
    the highest rewards, and fits mean and deviation to them. The best action that was ever taken is kept beside the
    mean, and is what `plan` gives for the signals that it was trained with.

    signals: by name, a number for each unit. The other arguments are those of `infold.tiers.plan`.

    Raises ValueError for a wrong argument, and where no assignment fits.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Sequence[TierSpec],
        budgets: Mapping[str, int | None] | None = None,
        *,
        signals: Mapping[str, Mapping[str, float]] | None = None,
        nbytes: Mapping[str, int] | None = None,
        compute_seconds: Mapping[str, float] | Uses | None = None,
        overhead: Overhead = NO_OVERHEAD,
        buffers: int = 2,
        seed: int = 0,
    ) -> None:
        self._problem = problem_of(
            model, specs, budgets, nbytes=nbytes, compute_seconds=compute_seconds, buffers=buffers, overhead=overhead
        )
        self._exposure = Exposure(
            self._problem.packing, self._problem.tiers, self._problem.numbered_uses, self._problem.overhead
        )
        self._generator = np.random.default_rng(seed)
        self._features = self._state(signals or {})
        self._signals = sorted(signals or {})
        shape = (self._features.shape[1], len(self._problem.tiers))
        #: Mean and deviation of the weights.
        self.mean, self.deviation = np.zeros(shape), np.ones(shape)
        self._best: tuple[float, list[int]] = (-math.inf, self._act(self.mean, self._features))
        self._scale = 2 * sum(seconds for _, seconds in self._problem.uses) or 1.0

    def train(self, iterations: int = 30, population: int = 48, elite: int = 8) -> list[float]:
        """Learns from the time model, and returns the best reward after each iteration.

        Raises ValueError unless ``population`` ≥ ``elite`` ≥ 2.
        """
        if not population >= elite >= 2:
            raise ValueError(f"population, elite: expected population >= elite >= 2, got {population} and {elite}")
        history = []
        for _ in range(iterations):
            self._step(self._predicted, population, elite)
            history.append(self._best[0])
        return history

    def refine(self, measure: Callable[[Plan], float], rounds: int = 4, population: int = 6, elite: int = 2) -> Plan:
        """Goes on with measured times: ``measure`` runs a step under a plan and returns its seconds.

        The plan so far is measured first, and one of the ``rounds · population`` drawn around it replaces it only if it
        was faster; ``measure`` is called for each at most once. Raises ValueError as `train` does.
        """
        if not population >= elite >= 2:
            raise ValueError(f"population, elite: expected population >= elite >= 2, got {population} and {elite}")
        known: dict[tuple[int, ...], float] = {}

        def reward(action: list[int]) -> float:
            if tuple(action) not in known:
                known[tuple(action)] = -measure(settle(self._problem, action, "learned"))
            return known[tuple(action)]

        self._best = (reward(self._best[1]), self._best[1])
        for _ in range(rounds):
            self._step(reward, population, elite)
        return self.plan()

    def plan(self, signals: Mapping[str, Mapping[str, float]] | None = None) -> Plan:
        """The best plan so far; or, for new ``signals`` of the same names, what the mean policy makes of them."""
        if signals is None:
            return settle(self._problem, self._best[1], "learned")
        if sorted(signals) != self._signals:
            raise ValueError(
                f"signals: expected {', '.join(self._signals) or 'none'}, got {', '.join(sorted(signals))}"
            )
        return settle(self._problem, self._act(self.mean, self._state(signals)), "learned")

    def _step(self, reward: Callable[[list[int]], float], population: int, elite: int) -> None:
        """One iteration of the cross-entropy method."""
        drawn = self.mean + self.deviation * self._generator.standard_normal((population, *self.mean.shape))
        actions = [self._act(weights, self._features) for weights in drawn]
        rewards = np.array([reward(action) for action in actions])
        best = np.argsort(-rewards, kind="stable")[:elite]
        if rewards[best[0]] > self._best[0]:
            self._best = (float(rewards[best[0]]), actions[best[0]])
        self.mean = drawn[best].mean(axis=0)
        # A floor, so that a few alike do not end the search.
        self.deviation = np.maximum(drawn[best].std(axis=0), 0.05)

    def _predicted(self, action: list[int]) -> float:
        cost = self._exposure.cost(action)
        return -math.inf if cost is None else -cost[0] / self._scale

    def _act(self, weights: Array, features: Array) -> list[int]:
        logits = features @ weights
        logits -= logits.max(axis=1, keepdims=True)
        likely = np.exp(logits)
        likely /= likely.sum(axis=1, keepdims=True)
        found = self._problem.packing.nearest(likely.tolist())
        # Says what is missing if there is none.
        self._problem.ring(found)
        return found or []

    def _state(self, signals: Mapping[str, Mapping[str, float]]) -> Array:
        names = list(self._problem.sizes)
        computing, before, count, first = (dict.fromkeys(names, 0.0) for _ in range(4))
        previous = 0.0
        for index, (name, seconds) in enumerate(self._problem.uses):
            first[name] = first[name] if count[name] else index / len(self._problem.uses)
            computing[name] += seconds
            before[name] += previous
            count[name] += 1
            previous = seconds
        columns = [np.ones(len(names))]
        columns += [
            _ranks([float(values[name]) for name in names])
            for values in (self._problem.sizes, computing, before, count)
        ]
        place = np.array([first[name] for name in names])
        columns.append(2 * place - 1)
        columns += [wave(2 * np.pi * k * place) for k in _HARMONICS for wave in (np.sin, np.cos)]
        for label, values in sorted(signals.items()):
            check_names(f"signals: {label}", values, names, missing=True)
            if wrong := [name for name in names if not math.isfinite(values[name])]:
                raise ValueError(f"signals: {label}: expected finite numbers, got {values[wrong[0]]} for {wrong[0]!r}")
            columns.append(_ranks([values[name] for name in names]))
        return np.stack(columns, axis=1)


def _ranks(values: list[float]) -> Array:
    """Ranks from -1 to 1; those of equal values are their mean, and all 0 where all are equal."""
    array = np.array(values)
    below = (array[None, :] < array[:, None]).sum(axis=1)
    above = (array[None, :] > array[:, None]).sum(axis=1)
    return np.asarray((below - above) / max(len(values) - 1, 1), dtype=np.float64)
