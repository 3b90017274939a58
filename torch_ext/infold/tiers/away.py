"""Parameters whose memory is elsewhere and cannot be looked at there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

#: What a parameter knows without its memory.
_ATTRIBUTES = ("shape", "dtype", "device", "layout", "requires_grad", "grad", "is_leaf", "grad_fn", "ndim", "_version")
_KNOWN = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.stride),
    *(Tensor.storage_offset, Tensor.untyped_storage),
    *(Tensor.is_contiguous, Tensor.is_inference, Tensor.requires_grad_),
}


class AwayTensor(torch.Tensor):
    """Stands where a tensor is, while its memory is not: operators get a copy, fetched anew each time.

    Raises RuntimeError where one would write: the copy would be lost.
    """

    _infold_fetch: Callable[[], Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        writes = "out" in kwargs or name == "__set__" or (name.endswith("_") and not name.endswith("__"))
        if writes and any(isinstance(arg, AwayTensor) for arg in args):
            raise RuntimeError(
                f"{name}: the parameter's weight is away, packed or in another tier; remove() brings it back"
            )
        args, kwargs = tree_map(_fetched, (tuple(args), dict(kwargs)))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class AwayParameter(AwayTensor, nn.Parameter):
    """The same for a parameter, so that modules still know it for one."""


def send_away(tensor: Tensor, fetch: Callable[[], Tensor]) -> None:
    """``fetch`` gives a copy of its value, with memory of its own."""
    away: Any = tensor
    away.__class__ = AwayParameter if isinstance(tensor, nn.Parameter) else AwayTensor
    away._infold_fetch = fetch


def call_back(tensor: Tensor) -> None:
    if isinstance(tensor, AwayTensor):
        here: Any = tensor
        del here._infold_fetch
        here.__class__ = nn.Parameter if type(tensor) is AwayParameter else Tensor


def _fetched(value: Any) -> Any:
    return value._infold_fetch() if isinstance(value, AwayTensor) else value
