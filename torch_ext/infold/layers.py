"""A model's layers as Infold sees them: what can be converted, by which weight, and what takes its place."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from infold.config import Mode
from infold.nn import FusedDecompressConv, FusedDecompressEmbedding, FusedDecompressLinear, PackedModule
from infold.nn.conv import Window
from infold.packed import Packed

_Module = TypeVar("_Module", bound=nn.Module)

_DENSE: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
    nn.Conv3d: "conv",
}
_PACKED: dict[type[PackedModule], str] = {
    FusedDecompressLinear: "linear",
    FusedDecompressEmbedding: "embedding",
    FusedDecompressConv: "conv",
}

# What calls the layer expects the module that was there.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: a linear layer whose weight is (in_features, out_features)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def dense_kind(module: nn.Module) -> str | None:
    """``"linear"``, ``"embedding"`` or ``"conv"`` for a dense layer, one of a subclass included; None for others."""
    if is_transposed_linear(module):
        return "linear"
    return next((kind for cls, kind in _DENSE.items() if isinstance(module, cls)), None)


def is_subclass(module: nn.Module) -> bool:
    """Whether a dense layer is of a class derived from one that is known."""
    return type(module) not in _DENSE and not is_transposed_linear(module)


def packed_kind(module: PackedModule) -> str:
    """As `dense_kind`, for a packed layer."""
    return next(kind for cls, kind in _PACKED.items() if isinstance(module, cls))


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight of a layer that can be packed."""
    return cast(nn.Parameter, module.weight)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a layer that can be packed, as (out_features, in_features)."""
    weight = weight_of(module).detach()
    return weight.T if is_transposed_linear(module) else weight.flatten(1)


def would_lose(module: nn.Module) -> str | None:
    """What hangs on this very module that a replacement would lose; None for nothing."""
    if any(getattr(module, hooks) for hooks in _HOOKS) or hasattr(module, "_hf_hook") or "forward" in vars(module):
        return "hooks or a forward of its own"
    if isinstance(module, PackedModule):
        return None
    state = [*module._parameters, *module._buffers, *module._modules]
    own = [name for name in state if name not in ("weight", "bias")]
    return f"state of its own ({', '.join(own)})" if own else None


def packed_like(
    module: nn.Module,
    packed: Packed,
    *,
    mode: Mode,
    dtype: torch.dtype,
    trainable_scales: bool = False,
    name: str,
) -> PackedModule:
    """What takes the place of ``module``, dense or packed, with this weight; bias and attributes are kept."""
    new: PackedModule
    bias = cast("nn.Parameter | None", getattr(module, "bias", None))
    if isinstance(module, nn.Embedding | FusedDecompressEmbedding):
        new = FusedDecompressEmbedding(
            packed, module.padding_idx, dtype=dtype, trainable_scales=trainable_scales, name=name
        )
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | FusedDecompressConv):
        new = FusedDecompressConv(
            packed, Window.of(module), bias, mode=mode, dtype=dtype, trainable_scales=trainable_scales, name=name
        )
    else:
        new = FusedDecompressLinear(packed, bias, mode=mode, dtype=dtype, trainable_scales=trainable_scales, name=name)
    return in_place_of(module, new)


def in_place_of(module: nn.Module, new: _Module) -> _Module:
    """Gives a replacement what somebody has noted on the layer that was there."""
    for attribute, value in vars(module).items():
        # What a layer keeps for itself begins with an underscore or is known here.
        if not attribute.startswith("_") and not hasattr(new, attribute):
            setattr(new, attribute, value)
    return new.train(module.training)


def relative_error(exact: Tensor, approximation: Tensor) -> float:
    """‖W − Ŵ‖ / ‖W‖ in float64, 0 only where every bit is equal (NaNs included)."""
    difference = norm = 0.0
    # A few rows at a time: a float64 copy of a whole vocabulary is large.
    for start in range(0, len(exact), 1024):
        a, b = exact[start : start + 1024], approximation[start : start + 1024]
        if not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
            difference += float((b.double() - a.double()).square().sum())
        norm += float(a.double().square().sum())
    return (difference / norm) ** 0.5 if difference else 0.0
