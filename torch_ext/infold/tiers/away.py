"""Parameters whose memory is elsewhere and cannot be looked at there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

#: What a parameter knows without its memory.
_ATTRIBUTES = ("shape", "dtype", "device", "layout", "requires_grad", "grad", "is_leaf", "grad_fn", "ndim", "_version")
_KNOWN = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.stride),
    *(Tensor.storage_offset, Tensor.untyped_storage),
    *(Tensor.is_contiguous, Tensor.is_inference, Tensor.requires_grad_),
}

#: ``add_``, ``_foreach_add_``, ``__iadd__``.
_IN_PLACE = re.compile(r"\w*[a-z0-9]_|__i[a-z]+__")


class AwayTensor(torch.Tensor):
    """Stands where a tensor is, while its memory is not: operators get a copy, fetched anew each time.

    Raises RuntimeError where one would write: the copy would be lost (what `.data` or `.detach()` give is one, too). A
    copy of it and what is pickled are plain.
    """

    _infold_fetch: Callable[[], Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        value = self._infold_fetch()
        copied = nn.Parameter(value, self.requires_grad) if isinstance(self, nn.Parameter) else value
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: Any = self.__deepcopy__({})
        return plain.__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        writes = name in ("__set__", "__setitem__") or _IN_PLACE.fullmatch(name) is not None
        written = [*tree_leaves(args[:1] if writes else ()), *tree_leaves(kwargs.get("out"))]
        if any(isinstance(target, AwayTensor) for target in written):
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
