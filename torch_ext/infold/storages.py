"""Memory that tensors share, and which of it is that of a model whose weights are in tiers."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

#: The parameters of all models that are attached, by their ids: a parameter's storage may become another.
_parameters: WeakValueDictionary[int, nn.Parameter] = WeakValueDictionary()


def storage_key(tensor: Tensor) -> int:
    """What tensors that share memory have in common, also while that memory is elsewhere."""
    return int(tensor.untyped_storage()._cdata)


def enter(parameters: Iterable[nn.Parameter]) -> None:
    """Notes that these are a model's that is attached, whatever tier they are in."""
    _parameters.update((id(parameter), parameter) for parameter in parameters)


def leave(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        _parameters.pop(id(parameter), None)


def is_attached(parameter: Tensor) -> bool:
    return id(parameter) in _parameters


def refuse_attached(model: nn.Module, advice: str) -> None:
    """Raises ValueError, naming the first, where a model has a parameter, or its storage, of one that is attached."""
    storages = set(map(storage_key, _parameters.values()))
    for name, parameter in model.named_parameters():
        has_storage = parameter.layout == torch.strided and not is_lazy(parameter)
        if storages and has_storage and storage_key(parameter) in storages:
            raise ValueError(f"model: expected weights that are in no tiers, got {name!r} of an attached one; {advice}")
