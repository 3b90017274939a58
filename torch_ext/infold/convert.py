"""Replaces a model's linear, embedding and convolution layers by packed ones, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from infold.config import WEIGHT_DTYPES, FusedConfig, Layout
from infold.layers import (
    dense_kind,
    dense_weight,
    is_subclass,
    is_transposed_linear,
    packed_kind,
    packed_like,
    weight_of,
    would_lose,
)
from infold.layout import prepare_modules
from infold.nn import PackedModule
from infold.packed import Packed, pack
from infold.report import ConversionReport, LayerReport

FilterFn = Callable[[nn.Module, str], bool]
Configs = FusedConfig | Mapping[str, FusedConfig | None]


@torch.inference_mode(False)
def convert(
    model: nn.Module,
    config: Configs,
    filter_fn: FilterFn | None = None,
    *,
    skip: Collection[str] = (),
    progress: bool = True,
) -> ConversionReport:
    """Packs every linear, embedding and convolution layer in ``model``, in place: ``nn.Linear``, ``nn.Embedding``,
    ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` and transformers' ``Conv1D``.

    config: one for all layers, or one for each pattern of qualified names (``fnmatch``, first match wins, None leaves a
        layer dense; a layer that no pattern matches is left dense too).
    filter_fn: ``filter_fn(module, qualified_name)`` says whether to pack a layer.
    skip: qualified names, or patterns of them, to leave dense.

    Tied weights stay tied and a shared module is converted once. Layers that cannot be packed are left as they are and
    listed in the report with the reason; one warning names them. Raises ValueError if ``model`` is itself such a layer,
    or if a name in ``skip`` or a pattern in ``config`` matches no layer, and TypeError for arguments of another type;
    nothing is packed then.
    """
    _check_types(model, config, skip)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    if dense_kind(model):
        raise ValueError(
            f"model: expected a module that contains layers, got a {type(model).__name__}; "
            "use FusedDecompressLinear.from_linear, or its like for embeddings and convolutions"
        )
    layers_by_name = [name for module, all_names in names.items() if dense_kind(module) for name in all_names]
    _check_patterns(config, skip, layers_by_name)

    report = ConversionReport(model_bytes_before=_model_bytes(model))
    chosen: dict[nn.Module, FusedConfig] = {}
    for module, all_names in names.items():
        if not dense_kind(module):
            if not filter_fn or filter_fn(module, all_names[0]):
                _note_experts(module, all_names[0], report)
            continue
        layer_config = _config_for(config, all_names)
        skipped = any(fnmatchcase(name, pattern) for name in all_names for pattern in skip)
        if layer_config is None or skipped or (filter_fn and not filter_fn(module, all_names[0])):
            continue
        reason = _refusal(module, layer_config)
        if reason:
            report.refused[all_names[0]] = reason
        else:
            chosen[module] = layer_config
    _refuse_broken_ties(model, names, chosen, report)

    shared = _shared_weights(chosen)
    packed: dict[tuple[int, FusedConfig], tuple[Packed, LayerReport]] = {}
    with tqdm(chosen.items(), desc="packing", unit="layer", disable=not progress, leave=False) as layers:
        for module, layer_config in layers:
            name = names[module][0]
            layers.set_postfix_str(name, refresh=False)
            weight = weight_of(module)
            key = (id(weight), layer_config)
            dense = dense_weight(module)
            tied = packed.get(key)
            try:
                new = packed_like(
                    module,
                    tied[0] if tied else pack(dense, layer_config),
                    mode=layer_config.mode,
                    dtype=weight.dtype,
                    trainable_scales=layer_config.trainable_scales,
                    name=name,
                )
                # On a GPU it has to have a layout there.
                new.settle()
            except ValueError as error:
                report.refused[name] = str(error)
                continue
            if tied:
                entry = replace(tied[1], name=name, kind=packed_kind(new), tied_to=tied[1].name)
            else:
                entry = _layer_report(name, new, dense)
                if id(weight) in shared:
                    packed[key] = (new.packed, entry)
            report.layers.append(entry)
            for place in names[module]:
                parent, _, attribute = place.rpartition(".")
                setattr(model.get_submodule(parent), attribute, new)
    _lay_out(model, names, chosen, report)
    report.model_bytes_after = _model_bytes(model)
    if report.refused:
        lines = "; ".join(f"{name}: {reason}" for name, reason in report.refused.items())
        # Past the decorator.
        warnings.warn(f"left dense: {lines}", stacklevel=3)
    return report


def _lay_out(
    model: nn.Module,
    names: Mapping[nn.Module, list[str]],
    chosen: Mapping[nn.Module, FusedConfig],
    report: ConversionReport,
) -> None:
    """Lays the packed weights out as their configurations ask, and notes it."""
    wanted: dict[Layout, list[PackedModule]] = {}
    layouts = {names[module][0]: layer_config.layout for module, layer_config in chosen.items()}
    for layer in report.layers:
        wanted.setdefault(layouts[layer.name], []).append(cast(PackedModule, model.get_submodule(layer.name)))
    for layout, modules in wanted.items():
        prepare_modules(modules, layout)
    for index, layer in enumerate(report.layers):
        module = cast(PackedModule, model.get_submodule(layer.name))
        report.layers[index] = replace(layer, layout=module.layout, resident_bytes=module.packed.nbytes)


def _refusal(module: nn.Module, config: FusedConfig) -> str | None:
    """Why a layer cannot be packed."""
    if is_subclass(module):
        return f"{type(module).__name__} is a subclass that may compute something else"
    lost = would_lose(module)
    if lost:
        return f"it has {lost}, which would be lost"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rewrites the table on lookup"
    weight = weight_of(module)
    if isinstance(weight, nn.UninitializedParameter):
        return "its weight has no shape yet; run the model once first"
    if weight.device.type not in ("cpu", "cuda"):
        return f"its weight is on {weight.device}; pack on the CPU or on CUDA"
    if weight.is_cuda and config.layout != "auto":
        return f"layout {config.layout!r} is one of the CPU's, and its weight is on {weight.device}"
    if weight.dtype not in WEIGHT_DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
    if weight.numel() == 0:
        return "its weight is empty"
    return None


def _note_experts(module: nn.Module, name: str, report: ConversionReport) -> None:
    """Experts that are stacked in one 3-D parameter are linear layers that no module stands for."""
    if type(module).__module__.startswith("torch.nn."):
        return
    for attribute, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3 and min(parameter.shape) > 1:
            path = ".".join(filter(None, (name, attribute)))
            report.refused[path] = "a 3-D parameter (stacked experts?) is no linear layer"


def _refuse_broken_ties(
    model: nn.Module,
    names: Mapping[nn.Module, list[str]],
    chosen: dict[nn.Module, FusedConfig],
    report: ConversionReport,
) -> None:
    """Leaves a layer dense where its weight is also somebody else's who would stay dense or be packed differently."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, attribute))
    for module, layer_config in list(chosen.items()):
        transposed = is_transposed_linear(module)
        for owner, attribute in owners[id(weight_of(module))]:
            agrees = chosen.get(owner) == layer_config and is_transposed_linear(owner) == transposed
            if attribute != "weight" or not agrees:
                other = ".".join(filter(None, (names[owner][0], attribute)))
                report.refused[names[module][0]] = f"its weight is tied to {other}, which is not packed the same way"
    for module in [module for module in chosen if names[module][0] in report.refused]:
        del chosen[module]


def _shared_weights(chosen: Mapping[nn.Module, FusedConfig]) -> dict[int, Tensor]:
    """The weights that several layers have, by id. They are kept alive here, so that no id is used twice."""
    owners: dict[int, list[Tensor]] = {}
    for module in chosen:
        owners.setdefault(id(weight_of(module)), []).append(weight_of(module))
    return {key: weights[0] for key, weights in owners.items() if len(weights) > 1}


def _config_for(config: Configs, names: list[str]) -> FusedConfig | None:
    if isinstance(config, FusedConfig):
        return config
    for pattern, candidate in config.items():
        if any(fnmatchcase(name, pattern) for name in names):
            return candidate
    return None


def _check_types(model: object, config: object, skip: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got a {type(model).__name__}")
    if isinstance(skip, str):
        raise TypeError(f"skip: expected a collection of names, got a string (try [{skip!r}])")
    values = config.values() if isinstance(config, Mapping) else [config]
    for value in values:
        allowed = FusedConfig | None if isinstance(config, Mapping) else FusedConfig
        if not isinstance(value, allowed):
            hint = f" (try FusedConfig({value!r}))" if isinstance(value, str) else ""
            raise TypeError(f"config: expected a FusedConfig or a mapping of patterns to them, got {value!r}{hint}")


def _check_patterns(config: Configs, skip: Collection[str], names: list[str]) -> None:
    patterns = [*skip] if isinstance(config, FusedConfig) else [*skip, *config]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"name pattern {pattern!r}: expected to match a layer, matched none (try {pattern + '.*'!r}?)"
            )


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


def _layer_report(name: str, new: PackedModule, dense: Tensor) -> LayerReport:
    return LayerReport(
        name=name,
        kind=packed_kind(new),
        format=new.header.quantizer,
        shape=(new.header.out_features, new.header.in_features),
        bytes_before=dense.numel() * dense.element_size(),
        bytes_after=new.packed.nbytes,
        relative_error=relative_error(dense, new.unpack(dense.dtype).detach()),
        predictor=new.header.predictor,
    )


def _model_bytes(model: nn.Module) -> int:
    tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if not is_lazy(tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
