"""Frequency layers in the places of linear ones: the nearest, their sizes, and what a file says of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any, cast

from torch import nn

from infold.config import FrequencyConfig
from infold.layers import dense_weight, in_place_of, weight_of
from infold.nn import FrequencyLinear, SparseFrequencyLinear

FrequencyLayer = FrequencyLinear | SparseFrequencyLinear


def frequency_like(module: nn.Module, config: FrequencyConfig, tied: FrequencyLayer | None = None) -> FrequencyLayer:
    """What takes the place of ``module``, a linear layer; bias and attributes are kept.

    Its spectrum is the nearest to the weight, or ``tied``'s own parameter where the two share a weight.
    """
    new: FrequencyLayer
    if tied is not None:
        # All but the tensors.
        new = copy.deepcopy(tied, {id(tensor): tensor for tensor in chain(tied.parameters(), tied.buffers())})
    else:
        rows, cols = dense_weight(module).shape
        linear = nn.Linear(cols, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(dense_weight(module), requires_grad=False)
        if config.density is not None:
            new = SparseFrequencyLinear.from_linear(linear, config.density)
        else:
            new = FrequencyLinear.from_linear(linear, config.block, config.storage)
        for parameter in new.parameters():
            parameter.requires_grad_(parameter.is_floating_point() and weight_of(module).requires_grad)
    new.bias = cast("nn.Parameter | None", module.bias)
    return in_place_of(module, new)


def format_of(config: FrequencyConfig) -> str:
    """What a report calls a layer of this configuration."""
    return f"sparse {config.density:.3%}" if config.density is not None else f"circulant {config.block}"


def spectrum_of(module: FrequencyLayer) -> dict[str, nn.Parameter]:
    """The parameters that stand for the weight, by name: the spectrum, and what says where its numbers belong."""
    return {name: parameter for name, parameter in module.named_parameters(recurse=False) if name != "bias"}


def stored_bytes(module: FrequencyLayer) -> int:
    """Everything that stands for the weight."""
    return sum(parameter.nbytes for parameter in spectrum_of(module).values())


def options_of(module: FrequencyLayer) -> dict[str, Any]:
    """What a file has to say of a layer beside its tensors."""
    if isinstance(module, SparseFrequencyLinear):
        return {"frequency": "sparse", "scale": module.scale, "real": module.real}
    return {"frequency": "circulant", "block": module.block, "storage": module.storage}


def rebuilt(module: nn.Module, options: Mapping[str, Any], tensors: Mapping[str, nn.Parameter]) -> FrequencyLayer:
    """The layer of `options_of` and `spectrum_of` in the place of ``module``, a linear layer; bias and attributes kept.

    Raises ValueError for options or tensors that contradict each other.
    """
    rows, cols = dense_weight(module).shape
    new: FrequencyLayer
    if options["frequency"] == "sparse":
        scale, real = float(options["scale"]), bool(options["real"])
        indices = tensors["indices"].detach()
        new = SparseFrequencyLinear(cols, rows, None, indices, False, scale, real, device="meta")
    else:
        config = FrequencyConfig(block=options["block"], storage=options["storage"])
        new = FrequencyLinear(cols, rows, config.block, False, "meta", storage=config.storage)
    for name, expected in spectrum_of(new).items():
        parameter = tensors[name]
        if parameter.shape != expected.shape or parameter.is_floating_point() != expected.is_floating_point():
            raise ValueError(
                f"{name}: expected {expected.dtype} {tuple(expected.shape)}, got {parameter.dtype} "
                f"{tuple(parameter.shape)}"
            )
        if parameter.is_floating_point():
            # As when a state dict is loaded: the model's dtype stays. Who shares the parameter has the same.
            parameter.data = parameter.data.to(weight_of(module).dtype)
        setattr(new, name, parameter)
    new.bias = cast("nn.Parameter | None", module.bias)
    return in_place_of(module, new)
