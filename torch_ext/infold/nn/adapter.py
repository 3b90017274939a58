"""Block-circulant adapters beside frozen layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from infold.nn.frequency import FrequencyLinear
from infold.nn.fused import FusedDecompressLinear

#: Layers that `add_adapters` puts an adapter beside. Not subclasses: what calls them may want more than their output.
_BASES = (nn.Linear, FusedDecompressLinear)


class FrequencyAdapter(nn.Module):
    """y = base(x) + x·Vᵀ: a `FrequencyLinear` without bias beside a frozen layer, dense or packed.

    V is block-circulant and starts at 0, so that the output is the base's until a step is taken. It has
    ⌈out_features / block⌉·⌈in_features / block⌉·block parameters, ``adapter.spectrum``, and may be of any rank, which
    sets it apart from LoRA. Shapes are the base's. ``layer.adapter.state_dict()`` is what there is to store.
    """

    base: nn.Module
    adapter: FrequencyLinear

    def __init__(self, base: nn.Module, block: int = 64, dtype: torch.dtype | None = None) -> None:
        """Freezes ``base``, a module with ``in_features`` and ``out_features``, and puts the adapter on its device.

        dtype: that of the spectrum, float32 by default; it need not be the base's. Raises ValueError for another module
        and for a block that is not positive.
        """
        super().__init__()
        sizes = getattr(base, "in_features", None), getattr(base, "out_features", None)
        if not isinstance(base, nn.Module) or not isinstance(sizes[0], int) or not isinstance(sizes[1], int):
            raise ValueError(f"base: expected a module with in_features and out_features, got a {type(base).__name__}")
        device = next((parameter.device for parameter in base.parameters()), None)
        self.base = base.requires_grad_(False)
        # The default dtype may be a half precision, whose steps are too coarse to train in.
        self.adapter = FrequencyLinear(sizes[0], sizes[1], block, False, device, dtype or torch.float32)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets V to 0."""
        assert self.adapter.spectrum is not None
        self.adapter.spectrum.zero_()

    @property
    def in_features(self) -> int:
        return self.adapter.in_features

    @property
    def out_features(self) -> int:
        return self.adapter.out_features

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.adapter(x)
        return y

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A dense layer of the same map, in the base's dtype; the two share the bias. Raises ValueError where the base
        is no `torch.nn.Linear`: of a packed one, merge with what its ``to_linear()`` returns.
        """
        base = self.base
        if type(base) is not nn.Linear:
            raise ValueError(f"base: expected an nn.Linear to merge into, got a {type(base).__name__}")
        merged = nn.Linear(self.in_features, self.out_features, False, "meta", base.weight.dtype)
        weight = base.weight + self.adapter.dense_weight()
        merged.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
        merged.bias = base.bias
        return merged.train(self.training)


def add_adapters(
    model: nn.Module, block: int = 64, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> dict[str, FrequencyAdapter]:
    """Freezes ``model`` and puts a `FrequencyAdapter` beside its `torch.nn.Linear` and packed linear layers, in place,
    but for those that have one.

    filter_fn: ``filter_fn(module, qualified_name)`` says beside which. Returns the adapters by qualified name; a layer
    in several places gets one. Raises ValueError if there is no such layer, or if ``model`` is one; nothing has changed
    then.
    """
    if type(model) in _BASES:
        raise ValueError(f"model: expected a module that contains layers, got a {type(model).__name__}")
    adapted = {module.base for module in model.modules() if isinstance(module, FrequencyAdapter)}
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in _BASES and module not in adapted:
            places.setdefault(module, []).append(name)
    chosen = {module: names for module, names in places.items() if not filter_fn or filter_fn(module, names[0])}
    if not chosen:
        raise ValueError("model: expected a linear layer without an adapter that filter_fn takes, found none")
    model.requires_grad_(False)
    adapters = {}
    for module, names in chosen.items():
        adapter = FrequencyAdapter(module, block).train(module.training)
        for name in names:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, adapter)
        adapters[names[0]] = adapter
    return adapters


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' part of a model's state dict, detached; ``model.load_state_dict(state, strict=False)`` loads it."""
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, FrequencyAdapter)}
    return {
        f"{name}.adapter.{key}".removeprefix("."): tensor
        for name, module in adapters.items()
        for key, tensor in module.adapter.state_dict().items()
    }
