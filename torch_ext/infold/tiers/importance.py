"""How much each unit of a model matters: the mean over its elements of a squared gradient, estimated in several ways.

A score is a sum over a unit's elements divided by their number, tied parameters counted once (math.md §7). It says how
much the loss changes if the unit's weights do, so it chooses precision and update rate. It does not say how often a
weight is read: a dense model reads each of them on every forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from infold.tiers.units import units

AdamState = Literal["exp_avg_sq", "exp_avg"]
Evidence = TypeVar("Evidence", contravariant=True)


class ImportanceSource(Protocol[Evidence]):
    """What gives scores by unit name. A PCA's explained variance and a trajectory's variance are such sources, too;
    their scores go to `combine`, as plain mappings.
    """

    def __call__(self, model: nn.Module, evidence: Evidence, /) -> Mapping[str, float]:
        """Scores by unit name (`infold.tiers.units`), higher for more important, from what the source looks at: an
        optimizer, batches, recorded activations.
        """
        ...


class AdamStateAnalyzer:
    """The mean of Adam's second moment over each unit's elements, bias-corrected by 1 − β2^t.

    state: ``"exp_avg_sq"``, or ``"exp_avg"``: the mean *square* of the first moment, corrected by 1 − β1^t. Its signs
        would cancel in a mean, and squared it has the unit of the former.

    It reads any optimizer that keeps these states, ``step`` and ``betas``. Adam squares the mean gradient of a batch,
    clipped as it comes: scores of two runs compare by rank only.
    """

    def __init__(self, state: AdamState = "exp_avg_sq") -> None:
        """Raises ValueError for another state."""
        if state not in get_args(AdamState):
            raise ValueError(f"state: expected one of {', '.join(get_args(AdamState))}, got {state!r}")
        self.state: AdamState = state
        #: Units that the last call left out.
        self.missing: tuple[str, ...] = ()

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Scores by unit name. Units without state are left out, and a warning names those of them that train.

        A unit of which some parameters have no state (frozen ones) is scored by the others. Raises ValueError where no
        unit has any.
        """
        squares: dict[nn.Parameter, Tensor] = {}
        for parameter, value in adam_state(optimizer, self.state).items():
            squares[parameter] = value if self.state == "exp_avg_sq" else value.square()
        scores, self.missing = by_unit(model, {p: (_total(v), v.numel()) for p, v in squares.items()})
        if not scores:
            raise ValueError(f"optimizer: expected {self.state} of the model's parameters, got none; has it stepped?")
        trains = {unit.name for unit in units(model) if any(p.requires_grad for p in unit.parameters.values())}
        left_out = [name for name in self.missing if name in trains]
        if left_out:
            warnings.warn(f"units without {self.state} have no score: {', '.join(left_out)}", stacklevel=2)
        return scores


def adam_state(optimizer: torch.optim.Optimizer, state: AdamState) -> dict[nn.Parameter, Tensor]:
    """A state of every parameter that has one, bias-corrected: real, in the state's dtype, a complex parameter's as two
    numbers each. Raises ValueError for a group without betas.
    """
    found: dict[nn.Parameter, Tensor] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            entry = optimizer.state.get(parameter, {})
            # A step of zero is a state that nothing has been added to.
            if state not in entry or not float(entry.get("step", 0)):
                continue
            if "betas" not in group:
                raise ValueError(f"parameter group {index}: expected betas to correct {state} by, got none")
            beta = float(group["betas"][1 if state == "exp_avg_sq" else 0])
            found[parameter] = _real(entry[state]) / (1 - beta ** float(entry["step"]))
    return found


class GradientEma:
    """A moving average of squared gradients that hooks keep up during training; `scores` reads it.

    It keeps one number a parameter, not one an element, since the average of the sums is the sum of the averages. Each
    parameter is corrected for the start of its own average, as in Adam. Gradients are seen before they are clipped.

    decay: what an average keeps at each step, from 0 up to 1, 1 excluded.
    accumulation: backward passes to an optimizer step. ``.grad`` is a running sum over them: it is read at every
        ``accumulation``-th pass that reaches a parameter, when it is whole.

    A context manager; leaving it removes the hooks, and the scores stay. Raises ValueError for a decay or accumulation
    out of range, and for a model in which nothing trains.
    """

    def __init__(self, model: nn.Module, decay: float = 0.99, *, accumulation: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected from 0 up to 1, 1 excluded, got {decay}")
        if accumulation < 1:
            raise ValueError(f"accumulation: expected a positive number of passes, got {accumulation}")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("model: expected a parameter that trains, got none")
        self._model, self.decay, self.accumulation = model, decay, accumulation
        self._passes = dict.fromkeys(trained, 0)
        self._averages: dict[nn.Parameter, Tensor] = {}
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._see)  # type: ignore[no-untyped-call]
            for p in trained
        ]
        #: Units that the last `scores` left out.
        self.missing: tuple[str, ...] = ()

    def _see(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self._passes[parameter] += 1
        if parameter.grad is None or self._passes[parameter] % self.accumulation:
            return
        # On the device: reading it here would wait for the GPU at every parameter.
        square = _square_total(parameter.grad.detach())
        before = self._averages.get(parameter)
        average = torch.zeros_like(square) if before is None else before
        self._averages[parameter] = torch.lerp(square, average, self.decay)

    def scores(self) -> dict[str, float]:
        """The mean square of the gradient by unit name; units that no gradient has reached are left out.

        Raises ValueError before the first gradient.
        """
        seen = {}
        for parameter, average in self._averages.items():
            steps = self._passes[parameter] // self.accumulation
            count = parameter.numel() * (2 if parameter.is_complex() else 1)
            seen[parameter] = (float(average) / (1 - self.decay**steps), count)
        scores, self.missing = by_unit(self._model, seen)
        if not scores:
            raise ValueError("scores: expected a backward pass before, got none")
        return scores

    def remove(self) -> None:
        """Takes the hooks off; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> GradientEma:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def by_unit(
    model: nn.Module, totals: Mapping[nn.Parameter, tuple[float, int]]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Means over the elements of each unit, from parameters' sums and counts, and the units that have none."""
    scores: dict[str, float] = {}
    missing: list[str] = []
    for unit in units(model):
        own = [totals[parameter] for parameter in unit.parameters.values() if parameter in totals]
        if own:
            scores[unit.name] = sum(total for total, _ in own) / sum(count for _, count in own)
        else:
            missing.append(unit.name)
    return scores, tuple(missing)


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value


def _total(value: Tensor) -> float:
    return float(value.sum(dtype=torch.float64))


def _square_total(gradient: Tensor) -> Tensor:
    """Σ g² in float64; of a sparse gradient, of what it stands for."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return _real(values).double().square().sum()
