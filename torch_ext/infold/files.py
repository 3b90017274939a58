"""Packed models in safetensors files: written atomically, verified before anything changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from infold._library import CorruptWeightError
from infold.checked_files import CHECKSUMS, destination, read, read_object, tensor_checksum, verify, write
from infold.config import Mode
from infold.frequency_layers import FrequencyLayer, options_of, rebuilt
from infold.layers import dense_kind, dense_weight, packed_kind, packed_like, weight_of, would_lose
from infold.layout import relay
from infold.nn import FusedDecompressConv, PackedModule
from infold.packed import Packed, read_header
from infold.storages import refuse_attached

_FORMAT = "infold-1"
_METADATA = ("modules", "aliases", CHECKSUMS)
_FIELDS = ("payload", "directory", "tables", "scales")
#: Those of frequency layers, of either kind and storage.
_SPECTRUM = ("spectrum", "codes", "words", "coefficients", "indices")
_OWN = (*_FIELDS, *_SPECTRUM)


def save(model: nn.Module, path: str | Path) -> None:
    """Writes a converted model's whole state to a safetensors file, tied tensors once.

    The file appears complete or not at all: it is written beside ``path`` (or what that links to), synced, and renamed.
    Raises ValueError for a model that is one packed layer, or whose state dict holds more than tensors.
    """
    if isinstance(model, PackedModule):
        raise ValueError(f"model: expected a module that contains layers, got a {type(model).__name__}")
    path = destination(path)
    modules: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule):
            mode = getattr(module, "mode", "fused")
            modules[name] = {"kind": packed_kind(module), "mode": mode, "layout": module.layout}
            if isinstance(module, FusedDecompressConv):
                modules[name]["kernel_size"] = list(module.window.kernel_size)
        elif isinstance(module, FrequencyLayer) and name:
            modules[name] = {"kind": "linear", **options_of(module)}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor in the state dict, got {type(tensor).__name__}")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            # A copy where tensors overlap without being the same: safetensors stores no views.
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    metadata = {"format": _FORMAT, "modules": json.dumps(modules), "aliases": json.dumps(aliases)}
    write(path, tensors, metadata, tensor_checksum)


@torch.inference_mode(False)
def load_into(model: nn.Module, path: str | Path) -> None:
    """Loads a file of `save` into a model of the same architecture, dense or converted, in place.

    Everything is read and verified first: a bad file leaves the model as it was. Raises CorruptWeightError, which names
    the tensor and the field, and ValueError where the file is of another model, or no file of `save`.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    modules = read_object(metadata, "modules", path, dict)
    aliases = read_object(metadata, "aliases", path, str)
    for alias, name in aliases.items():
        if name not in tensors:
            raise CorruptWeightError(alias, "aliases", f"expected a tensor of the file, got {name!r}")

    if modules:
        refuse_attached(model, "load before infold.tiers.attach")
    # A frequency layer that is there already takes its numbers as any other.
    there = {name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, FrequencyLayer)}
    modules = {name: options for name, options in modules.items() if name not in there or "frequency" not in options}
    shared: dict[str, nn.Parameter] = {}
    packed: dict[str, PackedModule] = {}
    replacements: dict[str, nn.Module] = {}
    same: dict[nn.Module, nn.Module] = {}
    for name, options in modules.items():
        target = _target(model, name, options)
        if "frequency" in options:
            new: nn.Module = same.get(target) or _frequency_layer(name, options, target, tensors, aliases, shared)
        else:
            made = same.get(target) or _packed_module(name, options, target, tensors, aliases, shared)
            new = packed[name] = cast(PackedModule, made)
        replacements[name] = same[target] = new
    _lay_out(packed, modules)

    own = {f"{name}.{field}" for name in modules for field in _OWN}
    rest = {name: tensor for name, tensor in tensors.items() if name not in own}
    rest.update({alias: tensors[name] for alias, name in aliases.items() if alias not in own})
    expected = {name: tensor for name, tensor in model.state_dict().items() if not _is_replaced(name, modules)}
    _compare(rest, expected)

    for name, replacement in replacements.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, replacement)
    # A model on the meta device has no memory to copy into: it takes the file's tensors.
    on_meta = {name for name in rest if expected[name].is_meta}
    model.load_state_dict({name: rest[name].to(expected[name].dtype) for name in on_meta}, strict=False, assign=True)
    model.load_state_dict({name: rest[name] for name in rest.keys() - on_meta}, strict=False)


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    tensors, metadata = read(path)
    if not set(_METADATA) & metadata.keys():
        raise ValueError(f"{path}: expected a file of infold.save, got one without its metadata")
    found = metadata.get("format")
    if found != _FORMAT:
        raise CorruptWeightError(str(path), "format", f"expected {_FORMAT!r}, got {found!r}")
    verify(tensors, metadata, ("format", *_METADATA), tensor_checksum, path)
    return tensors, metadata


def _target(model: nn.Module, name: str, options: Mapping[str, Any]) -> nn.Module:
    try:
        target = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{name}: expected a layer of the model, got none") from error
    lost = would_lose(target)
    if lost:
        raise ValueError(f"{name}: expected a plain layer, got one with {lost}, which would be lost")
    kind = packed_kind(target) if isinstance(target, PackedModule) else dense_kind(target)
    if kind is None or kind != options.get("kind"):
        raise ValueError(f"{name}: expected a layer of kind {options.get('kind')!r}, got {type(target).__name__}")
    return target


def _lay_out(replacements: Mapping[str, PackedModule], modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Lays the weights out as they were when the file was written; files hold the compact form."""
    by_weight: dict[int, tuple[str, list[PackedModule]]] = {}
    for name, module in replacements.items():
        layout = "fast" if modules[name].get("layout") == "fast" else "compact"
        by_weight.setdefault(id(module.payload), (layout, []))[1].append(module)
    for layout, sharing in by_weight.values():
        relay(sharing, layout)


def _parameter(
    full: str, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], shared: dict[str, nn.Parameter]
) -> nn.Parameter | None:
    """A tensor of the file as a parameter, the same one for all that share it; None if there is none."""
    full = aliases.get(full, full)
    if full in tensors and full not in shared:
        tensor = tensors[full]
        shared[full] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    return shared.get(full)


def _frequency_layer(
    name: str,
    options: Mapping[str, Any],
    target: nn.Module,
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    shared: dict[str, nn.Parameter],
) -> nn.Module:
    found = {field: _parameter(f"{name}.{field}", tensors, aliases, shared) for field in _SPECTRUM}
    try:
        return rebuilt(target, options, {field: tensor for field, tensor in found.items() if tensor is not None})
    except (KeyError, TypeError) as error:
        raise CorruptWeightError(name, "modules", f"expected a frequency layer, got {dict(options)}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _packed_module(
    name: str,
    options: Mapping[str, Any],
    target: nn.Module,
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    shared: dict[str, nn.Parameter],
) -> PackedModule:
    def parameter(field: str) -> Tensor:
        found = _parameter(f"{name}.{field}", tensors, aliases, shared)
        if found is None and field != "scales":
            raise CorruptWeightError(f"{name}.{field}", field, "expected a tensor, got none")
        return torch.empty(0, 0) if found is None else found

    if isinstance(target, nn.Conv1d | nn.Conv2d | nn.Conv3d | FusedDecompressConv):
        # A packed weight is a matrix: it does not say what its columns are.
        expected, found = list(target.kernel_size), options.get("kernel_size")
        if found != expected:
            raise ValueError(f"{name}: expected a weight of kernel size {expected}, got {found}")
    packed = Packed(*(parameter(field) for field in _FIELDS))
    header = read_header(packed, name, verify=True)
    # As when a state dict is loaded: the model's dtype stays.
    dtype = target.dtype if isinstance(target, PackedModule) else weight_of(target).dtype
    mode: Mode = "exact" if options.get("mode") == "exact" else "fused"
    module = packed_like(target, packed, mode=mode, dtype=dtype, name=name)
    if isinstance(target, PackedModule):
        shape = (target.header.out_features, target.header.in_features)
    else:
        rows, cols = dense_weight(target).shape
        shape = (rows, cols)
    if shape != (header.out_features, header.in_features):
        raise ValueError(f"{name}: expected a weight of {shape}, got {(header.out_features, header.in_features)}")
    return module


def _is_replaced(name: str, modules: Mapping[str, Any]) -> bool:
    module, _, field = name.rpartition(".")
    return module in modules and field in ("weight", *_OWN)


def _compare(rest: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing, unexpected = expected.keys() - rest.keys(), rest.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(
            f"file: expected the model's tensors, missing {sorted(missing)}, unexpected {sorted(unexpected)}"
        )
    for name, tensor in rest.items():
        like = expected[name]
        if tensor.shape != like.shape:
            raise ValueError(f"{name}: expected shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != like.dtype and not (tensor.is_floating_point() and like.is_floating_point()):
            raise ValueError(f"{name}: expected dtype {like.dtype}, got {tensor.dtype}")
