"""Fills a model that has no memory yet (the meta device), a unit at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from infold.tiers.units import Unit

Weights = Mapping[str, Tensor]


class _Files(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for."""

    def __init__(self, paths: list[Path]) -> None:
        files: list[Any] = [safe_open(str(path), "pt") for path in paths]
        self._places = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_weights(weights: Weights | str | Path | None) -> Weights | None:
    """A mapping of names to tensors: given, or of a safetensors file or a folder of them. Raises FileNotFoundError."""
    if weights is None or isinstance(weights, Mapping):
        return weights
    path = Path(weights)
    paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not paths:
        raise FileNotFoundError(f"{path}: expected safetensors files, found none")
    return _Files(paths)


def fill_buffers(model: nn.Module, weights: Weights | None) -> None:
    """Gives buffers on the meta device their values. Raises ValueError, naming it, for one that ``weights`` lacks."""
    for prefix, module in model.named_modules():
        for local, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[local] = _value(f"{prefix}.{local}" if prefix else local, buffer, weights)


def filled(unit: Unit, weights: Weights | None) -> Unit:
    """The unit, with its parameters on the meta device replaced by ones that hold their values.

    Raises ValueError, naming it, for a parameter that ``weights`` lacks or has in another shape.
    """
    new: dict[int, nn.Parameter] = {}
    for name, parameter in unit.parameters.items():
        if parameter.is_meta:
            new[id(parameter)] = nn.Parameter(_value(name, parameter, weights), parameter.requires_grad)
    if not new:
        return unit
    for root in unit.modules.values():
        for module in root.modules():
            for local, held in module._parameters.items():
                if held is not None and id(held) in new:
                    module._parameters[local] = new[id(held)]
    parameters = {name: new.get(id(parameter), parameter) for name, parameter in unit.parameters.items()}
    return replace(unit, parameters=parameters)


def _value(name: str, like: Tensor, weights: Weights | None) -> Tensor:
    if weights is None or name not in weights:
        raise ValueError(f"weights: expected {name!r}, which is on the meta device and has no value there")
    value = weights[name]
    if value.shape != like.shape:
        raise ValueError(f"weights: {name!r}: expected shape {list(like.shape)}, got {list(value.shape)}")
    return value.to(like.dtype, copy=True).contiguous()
