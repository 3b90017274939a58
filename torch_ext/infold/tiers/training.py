"""Optimizer steps over parameters that are elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from infold.storages import is_attached
from infold.tiers.engine import Engine
from infold.tiers.units import Unit


def state_name(unit: str) -> str:
    """What the engine calls the piece of what an optimizer keeps for a unit."""
    return f"{unit} (optimizer)"


def step_by_units(
    optimizer: Optimizer,
    away: Sequence[Unit],
    engine: Engine,
    keep: Callable[[Unit, str, list[Tensor]], None],
) -> None:
    """Steps the units' parameters a unit at a time, in reverse, for a backward has the first here last; then the rest.

    keep: moves the tensors that the optimizer has for a unit to where they are to live, in place of any of that name.
    """
    if isinstance(optimizer, LBFGS):
        raise ValueError("optimizer: expected one that steps each parameter by itself, got LBFGS")
    if not any(is_attached(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("optimizer: expected one of the attached model's parameters, got one of others alone")
    stepped: set[nn.Parameter] = set()
    mine = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for unit in away[::-1]:
        parameters = [p for p in unit.parameters.values() if p in mine and p not in stepped]
        stepped.update(parameters)
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        if not parameters:
            continue
        state = state_name(unit.name)
        with ExitStack() as uses:
            uses.enter_context(engine.use(unit.name))
            if state in engine.names:
                uses.enter_context(engine.use(state))
            with _only(optimizer, parameters):
                optimizer.step()
        # Made at the first step, and anew where a state dict was loaded or more parameters came to have gradients.
        tensors = _tensors(optimizer, [p for p in unit.parameters.values() if p in mine])
        if tensors and not engine.holds(state, tensors):
            keep(unit, state, tensors)
    rest = mine - stepped
    if any(parameter.grad is not None for parameter in rest):
        with _only(optimizer, rest):
            optimizer.step()


@cache
def note_steps() -> None:
    """Has optimizers' steps noted as writes to the attached parameters that they step, and to what is kept for these.

    Fused kernels, and optimizers that write by way of ``parameter.data``, leave no note themselves.
    """
    register_optimizer_step_post_hook(_note_step)


def _note_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stepped = [parameter for parameter in parameters if parameter.grad is not None and is_attached(parameter)]
    increment_version(stepped + _tensors(optimizer, stepped))


def _tensors(optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> list[Tensor]:
    """What an optimizer keeps for parameters, but for counts of steps and the like."""
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    values = [value for state in states for value in state.values()]
    return [value for value in values if isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() > 0]


@contextmanager
def _only(optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Shows an optimizer these of its parameters alone."""
    wanted = set(parameters)
    before = [group["params"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter in wanted]
        yield
    finally:
        for group, params in zip(optimizer.param_groups, before, strict=True):
            group["params"] = params
