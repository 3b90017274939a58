"""Replaces a model's linear, embedding and convolution layers by packed ones or by frequency layers, in place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from infold.alternatives import alternatives
from infold.config import WEIGHT_DTYPES, FrequencyConfig, FusedConfig, Layout
from infold.frequency_layers import FrequencyLayer, format_of, frequency_like, stored_bytes
from infold.layers import (
    dense_kind,
    dense_weight,
    is_subclass,
    is_transposed_linear,
    packed_kind,
    packed_like,
    relative_error,
    weight_of,
    would_lose,
)
from infold.layout import prepare_modules
from infold.nn import PackedModule
from infold.packed import pack
from infold.report import ConversionReport, LayerReport
from infold.storages import refuse_attached

FilterFn = Callable[[nn.Module, str], bool]
Config = FusedConfig | FrequencyConfig
Configs = Config | Mapping[str, Config | None]


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
    ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` and transformers' ``Conv1D``. With a `FrequencyConfig`, puts the nearest
    frequency layer in the place of every linear one; the report then says what other methods leave at the same bytes.

    config: one for all layers, or one for each pattern of qualified names (``fnmatch``, first match wins, None leaves a
        layer dense; a layer that no pattern matches is left dense too).
    filter_fn: ``filter_fn(module, qualified_name)`` says whether to pack a layer.
    skip: qualified names, or patterns of them, to leave dense.

    Tied weights stay tied and a shared module is converted once. Layers that cannot be converted, or are over
    ``max_error``, are left as they are and listed in the report with the reason; one warning names them. Raises
    ValueError if ``model`` is itself such a layer, and if a name in ``skip`` or a pattern in ``config`` matches none,
    and TypeError for arguments of another type; nothing is converted then. A model whose weights are in tiers
    (`infold.tiers.attach`) is refused: convert it before.
    """
    _check_types(model, config, skip)
    refuse_attached(model, "convert before infold.tiers.attach, or after remove() of its handle")
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
    chosen: dict[nn.Module, Config] = {}
    for module, all_names in names.items():
        if not dense_kind(module):
            if not filter_fn or filter_fn(module, all_names[0]):
                _note_experts(module, all_names[0], report)
            continue
        layer_config = _config_for(config, all_names)
        skipped = any(fnmatchcase(name, pattern) for name in all_names for pattern in skip)
        if layer_config is None or skipped or (filter_fn and not filter_fn(module, all_names[0])):
            continue
        reason = refusal(module, layer_config)
        if reason:
            report.refused[all_names[0]] = reason
        else:
            chosen[module] = layer_config
    _refuse_broken_ties(model, names, chosen, report)

    shared = _shared_weights(chosen)
    made: dict[tuple[int, Config], tuple[nn.Module, LayerReport]] = {}
    with tqdm(chosen.items(), desc="converting", unit="layer", disable=not progress, leave=False) as layers:
        for module, layer_config in layers:
            name = names[module][0]
            layers.set_postfix_str(name, refresh=False)
            key = (id(weight_of(module)), layer_config)
            tied = made.get(key)
            try:
                new, entry = _converted(name, module, layer_config, tied)
            except ValueError as error:
                report.refused[name] = str(error)
                continue
            limit = layer_config.max_error if isinstance(layer_config, FrequencyConfig) else None
            if limit is not None and entry.relative_error > limit:
                report.refused[name] = f"its relative error would be {entry.relative_error:.3g}, over {limit:g}"
                report.over_max_error.append(entry)
                continue
            if tied is None and key[0] in shared:
                made[key] = (new, entry)
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


def _converted(
    name: str, module: nn.Module, config: Config, tied: tuple[nn.Module, LayerReport] | None
) -> tuple[nn.Module, LayerReport]:
    """What takes the place of a layer, and its report; ``tied`` is what took that of a layer of the same weight.

    Raises ValueError with the reason where it cannot be.
    """
    new: PackedModule | FrequencyLayer
    dense = dense_weight(module)
    if isinstance(config, FrequencyConfig):
        new = frequency_like(module, config, cast("FrequencyLayer | None", tied and tied[0]))
        kind = "linear"
    else:
        new = packed_like(
            module,
            cast(PackedModule, tied[0]).packed if tied else pack(dense, config),
            mode=config.mode,
            dtype=weight_of(module).dtype,
            trainable_scales=config.trainable_scales,
            name=name,
        )
        # On a GPU it has to have a layout there.
        new.settle()
        kind = packed_kind(new)
    if tied:
        return new, replace(tied[1], name=name, kind=kind, tied_to=tied[1].name)
    if isinstance(config, FrequencyConfig):
        return new, _frequency_report(name, cast(FrequencyLayer, new), dense, config)
    return new, _layer_report(name, cast(PackedModule, new), dense)


def _lay_out(
    model: nn.Module,
    names: Mapping[nn.Module, list[str]],
    chosen: Mapping[nn.Module, Config],
    report: ConversionReport,
) -> None:
    """Lays the packed weights out as their configurations ask, and notes it."""
    wanted: dict[Layout, list[PackedModule]] = {}
    layouts = {names[module][0]: config.layout for module, config in chosen.items() if isinstance(config, FusedConfig)}
    packed = {layer.name: model.get_submodule(layer.name) for layer in report.layers if layer.name in layouts}
    for name, module in packed.items():
        wanted.setdefault(layouts[name], []).append(cast(PackedModule, module))
    for layout, modules in wanted.items():
        prepare_modules(modules, layout)
    for index, layer in enumerate(report.layers):
        if layer.name in packed:
            module = cast(PackedModule, packed[layer.name])
            report.layers[index] = replace(layer, layout=module.layout, resident_bytes=module.packed.nbytes)


def refusal(module: nn.Module, config: Config) -> str | None:
    """Why a layer cannot be converted; None where it can."""
    if isinstance(config, FrequencyConfig) and dense_kind(module) != "linear":
        return "a frequency layer takes the place of linear layers only"
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
    if weight.is_cuda and isinstance(config, FusedConfig) and config.layout != "auto":
        return f"layout {config.layout!r} is one of the CPU's, and its weight is on {weight.device}"
    if weight.dtype not in WEIGHT_DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
    if weight.numel() == 0:
        return "its weight is empty"
    return None


def _note_experts(module: nn.Module, name: str, report: ConversionReport) -> None:
    """Experts that are stacked in one 3-D parameter are linear layers that no module stands for."""
    if type(module).__module__.startswith(("torch.nn.", "infold.")):
        return
    for attribute, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3 and min(parameter.shape) > 1:
            path = ".".join(filter(None, (name, attribute)))
            report.refused[path] = "a 3-D parameter (stacked experts?) is no linear layer"


def _refuse_broken_ties(
    model: nn.Module,
    names: Mapping[nn.Module, list[str]],
    chosen: dict[nn.Module, Config],
    report: ConversionReport,
) -> None:
    """Leaves a layer dense where its weight is also somebody else's who would stay dense or become another."""
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
                report.refused[names[module][0]] = f"its weight is tied to {other}, which is not converted the same way"
    for module in [module for module in chosen if names[module][0] in report.refused]:
        del chosen[module]


def _shared_weights(chosen: Mapping[nn.Module, Config]) -> dict[int, Tensor]:
    """The weights that several layers have, by id. They are kept alive here, so that no id is used twice."""
    owners: dict[int, list[Tensor]] = {}
    for module in chosen:
        owners.setdefault(id(weight_of(module)), []).append(weight_of(module))
    return {key: weights[0] for key, weights in owners.items() if len(weights) > 1}


def _config_for(config: Configs, names: list[str]) -> Config | None:
    if isinstance(config, Config):
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
        allowed = Config | None if isinstance(config, Mapping) else Config
        if not isinstance(value, allowed):
            hint = f" (try FusedConfig({value!r}))" if isinstance(value, str) else ""
            expected = "a FusedConfig, a FrequencyConfig or a mapping of patterns to them"
            raise TypeError(f"config: expected {expected}, got {value!r}{hint}")


def _check_patterns(config: Configs, skip: Collection[str], names: list[str]) -> None:
    patterns = [*skip] if isinstance(config, Config) else [*skip, *config]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"name pattern {pattern!r}: expected to match a layer, matched none (try {pattern + '.*'!r}?)"
            )


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


def _frequency_report(name: str, new: FrequencyLayer, dense: Tensor, config: FrequencyConfig) -> LayerReport:
    """Raises ValueError for a weight that is not finite."""
    error = relative_error(dense.float(), new.dense_weight().detach())
    if not math.isfinite(error):
        raise ValueError("its weight is not finite")
    stored = stored_bytes(new)
    return LayerReport(
        name=name,
        kind="linear",
        format=format_of(config),
        shape=(new.out_features, new.in_features),
        bytes_before=dense.numel() * dense.element_size(),
        bytes_after=stored,
        relative_error=error,
        layout=config.storage,
        resident_bytes=stored,
        alternatives=alternatives(dense.cpu(), stored) if config.compare else (),
    )


def _model_bytes(model: nn.Module) -> int:
    tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if not is_lazy(tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
