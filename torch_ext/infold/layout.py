"""How packed weights lie in memory: in the smallest form, or one that computes faster. Weights are the same bits."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from infold._library import ops
from infold.config import DeviceLayout, Layout, MemoryLayout
from infold.nn import FusedDecompressLinear, PackedModule
from infold.packed import CPU_LAYOUTS, Packed, lay_out
from infold.storages import refuse_attached

#: ``auto`` takes a faster layout only if it is at most this many times the size...
_SIZE_LIMIT = 1.3
#: ...and at least this many times as fast.
_SPEED_LIMIT = 1.05
_MEASUREMENTS = 7
_ON_CUDA = "window, codes, pairs or raw"
#: On CUDA, times that differ by less are equal.
_TIE = 1.02


@dataclass(frozen=True)
class _Choice:
    """What ``auto`` weighs for one weight: bytes and milliseconds of a product with one row of activations."""

    bytes: dict[MemoryLayout, int]
    milliseconds: dict[MemoryLayout, float]

    @property
    def gain(self) -> float:
        """Milliseconds that the fast layout saves for each byte that it adds."""
        saved = self.milliseconds["compact"] - self.milliseconds["fast"]
        return saved / max(self.bytes["fast"] - self.bytes["compact"], 1)

    @property
    def pays(self) -> bool:
        faster = self.milliseconds["compact"] >= _SPEED_LIMIT * self.milliseconds["fast"]
        return faster and self.bytes["fast"] <= _SIZE_LIMIT * self.bytes["compact"]


@torch.inference_mode(False)
def prepare(
    model: nn.Module, layout: Layout | DeviceLayout = "auto", *, budget: int | None = None
) -> dict[str, MemoryLayout]:
    """Lays every packed weight of ``model`` out in memory, in place and exactly; returns the layout of each layer.

    layout: ``"compact"`` is the smallest form, that of files and state dicts; ``"fast"`` is plain codes, 1.1 to 1.3
        times as large for trained weights; ``"auto"`` measures both on this machine with one row of activations and
        takes the fast one where it is faster and at most 1.3 times the size.
        On CUDA there are others: ``"window"``, 12 bits a weight of lossless bfloat16; ``"codes"`` of 4, 5 or 8 bits for
        the quantised formats; ``"pairs"``, entropy-coded, for both, if levels have at most about four bits; ``"raw"``,
        lossless weights as they are, which lossless float16 and float32 always get. ``"auto"`` measures the first that
        a weight has and pairs, and takes pairs where they are faster. A layer that was moved to another device is laid
        out for it at its next forward, in a window or in codes if it can; call this before a CUDA graph is recorded or
        a model is compiled.
    budget: with ``"auto"``, bytes that all packed weights may take on the CPU: fast where it saves the most time a
        byte.

    Layers that share a weight keep sharing it. Results do not depend on the layout; on CUDA, where sums are taken in
    the order of the layout, their last bits may. As with any change to a module's parameters, nobody may run the model
    meanwhile. Raises ValueError for another layout, for a budget with a layout other than ``"auto"``, where even the
    compact form of all weights is over the budget, on CUDA for a weight that has no such layout, and for a model whose
    weights are in tiers (`infold.tiers.attach`): the tiers would move the old form.
    """
    if layout not in (*get_args(Layout), *get_args(DeviceLayout)):
        raise ValueError(f"layout: expected auto, compact or fast, or {_ON_CUDA} on CUDA, got {layout!r}")
    if budget is not None and not isinstance(budget, int):
        raise TypeError(f"budget: expected bytes as an int, got {budget!r}")
    if budget is not None and layout != "auto":
        raise ValueError(f"budget: expected only with layout 'auto', got it with {layout!r}")
    refuse_attached(model, "lay out before infold.tiers.attach, or after remove() of its handle")
    modules = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    prepare_modules(modules.values(), layout, budget)
    return {name: module.layout for name, module in modules.items()}


def prepare_modules(modules: Iterable[PackedModule], layout: Layout | DeviceLayout, budget: int | None = None) -> None:
    """As `prepare`, for these modules."""
    by_weight: dict[int, list[PackedModule]] = {}
    on_device: dict[int, list[PackedModule]] = {}
    for module in modules:
        where = on_device if module.payload.is_cuda else by_weight
        where.setdefault(id(module.payload), []).append(module)
    if by_weight and layout in get_args(DeviceLayout):
        raise ValueError(f"layout: expected auto, compact or fast on the CPU, got {layout!r}")
    lay_out_for_device(list(on_device.values()), layout)
    chosen: dict[int, str] = dict.fromkeys(by_weight, "compact" if layout == "auto" else layout)
    if layout == "auto":
        measured: dict[tuple[object, ...], dict[MemoryLayout, float]] = {}
        choices = {key: _weigh(group, measured) for key, group in by_weight.items()}
        least = sum(choice.bytes["compact"] for choice in choices.values())
        if budget is not None and budget < least:
            raise ValueError(f"budget: expected at least {least} bytes, got {budget}")
        left = float("inf") if budget is None else budget - least
        for key, choice in sorted(choices.items(), key=lambda item: -item[1].gain):
            extra = choice.bytes["fast"] - choice.bytes["compact"]
            if choice.pays and extra <= left:
                chosen[key] = "fast"
                left -= max(extra, 0)
    for key, group in by_weight.items():
        relay(group, chosen[key])


def relay(sharing: list[PackedModule], layout: str) -> None:
    """Lays out the weight that all these modules share."""
    sharing[0].lay_out(layout)
    for module in sharing[1:]:
        module.refresh_header()


def _weigh(sharing: list[PackedModule], measured: dict[tuple[object, ...], dict[MemoryLayout, float]]) -> _Choice:
    module = next((module for module in sharing if isinstance(module, FusedDecompressLinear)), sharing[0])
    packed, own = module.packed, module.layout
    forms = {name: packed if name == own else lay_out(packed, name) for name in CPU_LAYOUTS}
    sizes = {name: packed.nbytes for name, packed in forms.items()}
    header = module.header
    # Weights of one kind and shape are as fast as each other.
    kind = (header.out_features, header.in_features, header.quantizer, header.dtype, header.scale_shape)
    if kind not in measured:
        measured[kind] = _measure(module, forms)
    return _Choice(sizes, measured[kind])


def _measure(module: PackedModule, forms: dict[MemoryLayout, Packed]) -> dict[MemoryLayout, float]:
    """Median milliseconds of a product with one row of activations, the forms in turn."""
    header = module.header
    x = torch.randn(1, header.in_features)
    scales = module.float_scales()
    times: dict[MemoryLayout, list[float]] = {name: [] for name in forms}
    layouts = {name: ops.inspect_packed(*packed[:3])[1:3] for name, packed in forms.items()}
    with torch.inference_mode():
        for _ in range(_MEASUREMENTS):
            for name, packed in forms.items():
                arguments = (*layouts[name], header.out_features, header.in_features, header.dtype)
                start = time.perf_counter()
                ops.fused_linear(x, *packed[:3], scales, None, *arguments)
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def lay_out_for_device(groups: list[list[PackedModule]], layout: str) -> None:
    """Lays weights on CUDA out, each a group of modules that share it: as asked, or as is fastest there."""
    if groups and layout in CPU_LAYOUTS:
        raise ValueError(f"layout: expected auto, {_ON_CUDA} on CUDA, got {layout!r}")
    for module, *_ in groups:
        quantizer, fixed = module.header.quantizer, _fixed_form(module)
        forms = (fixed, "pairs", "raw") if quantizer == "lossless" else (fixed, "pairs")
        if layout not in ("auto", *forms):
            expected = " or ".join(forms)
            raise ValueError(f"layout: expected {expected} for a weight of format {quantizer}, got {layout!r}")
    measured: dict[tuple[object, ...], dict[str, float]] = {}
    for group in groups:
        relay(group, _fastest(group[0], measured) if layout == "auto" else layout)


def _fixed_form(module: PackedModule) -> str:
    return "window" if module.header.quantizer == "lossless" else "codes"


def _fastest(module: PackedModule, measured: dict[tuple[object, ...], dict[str, float]]) -> str:
    """The form for CUDA whose product with one row of activations takes least; of equal ones that of fixed width."""
    header, forms = module.header, {}
    for name in (_fixed_form(module), "pairs"):
        with contextlib.suppress(ValueError):
            forms[name] = lay_out(module.packed, name)
    if len(forms) < 2:
        # Where there is none, this says why.
        return next(iter(forms), "device")
    # Weights of one kind and size are as fast as each other.
    elements = header.out_features * header.in_features
    bits = tuple(round(8 * packed.nbytes / elements, 1) for packed in forms.values())
    where = (str(module.payload.device), header.quantizer, header.out_features, header.in_features, header.scale_shape)
    key = (*where, bits)
    if key not in measured:
        measured[key] = _measure_on_device(module, forms)
    fixed, pairs = measured[key].values()
    return "pairs" if fixed > _TIE * pairs else next(iter(forms))


def _measure_on_device(module: PackedModule, forms: dict[str, Packed]) -> dict[str, float]:
    """Median milliseconds of a product with one row of activations, the forms in turn, from memory and not a cache."""
    header, device = module.header, module.payload.device
    x = torch.randn(1, header.in_features, device=device, dtype=torch.bfloat16)
    scales = module.float_scales()
    layouts = {name: ops.inspect_packed(*(part.cpu() for part in packed[:3]))[1:3] for name, packed in forms.items()}
    cache = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in forms}
    with torch.inference_mode(), torch.cuda.device(device):
        for turn in range(_MEASUREMENTS + 2):
            for name, packed in forms.items():
                arguments = (*layouts[name], header.out_features, header.in_features, header.dtype)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                cache.fill_(turn)
                start.record()
                ops.fused_linear(x, *packed[:3], scales, None, *arguments)
                end.record()
                end.synchronize()
                if turn >= 2:
                    times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}
