"""Parameters whose memory is elsewhere and cannot be looked at there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

#: What a parameter knows without its memory.
_ATTRIBUTES = ("shape", "dtype", "device", "layout", "requires_grad", "grad", "is_leaf", "grad_fn", "ndim", "_version")
_KNOWN = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.stride),
    *(Tensor.is_contiguous, Tensor.is_inference, Tensor.requires_grad_),
}


class AwayParameter(nn.Parameter):
    """Stands where a parameter is, while its memory is not: operators get a copy, fetched anew each time.

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
        if writes and any(isinstance(arg, AwayParameter) for arg in args):
            raise RuntimeError(
                f"{name}: the parameter's weight is away, packed or in another tier; remove() brings it back"
            )
        args, kwargs = tree_map(_fetched, (tuple(args), dict(kwargs)))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def send_away(parameter: nn.Parameter, fetch: Callable[[], Tensor]) -> None:
    """``fetch`` gives a copy of its value, with memory of its own."""
    parameter.__class__ = AwayParameter
    cast(AwayParameter, parameter)._infold_fetch = fetch


def call_back(parameter: nn.Parameter) -> None:
    if isinstance(parameter, AwayParameter):
        del parameter._infold_fetch
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]


def _fetched(value: Any) -> Any:
    return value._infold_fetch() if type(value) is AwayParameter else value
