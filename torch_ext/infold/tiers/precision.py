"""A precision for each layer under one budget of bytes: reverse water-filling over Infold's codecs.

Of all choices of a codec a layer, the one of the least Σ F·D, where D is the squared error of a layer's weight and F
how much the loss minds it: to second order the loss rises by half of Σ Fᵢ·dᵢ², F the Fisher information's diagonal
(math.md §7). Bytes and errors are measured on the weights themselves, by `infold.packed.pack`, not modelled.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from tqdm import tqdm

from infold.config import FusedConfig
from infold.convert import refusal
from infold.layers import dense_kind, dense_weight, is_transposed_linear
from infold.nn import FusedDecompressLinear
from infold.packed import pack
from infold.report import format_bytes
from infold.tiers.units import units
from infold.tiers.water_filling import Option, water_fill

#: What a layer may become.
CANDIDATES: tuple[FusedConfig, ...] = (
    FusedConfig("lossless"),
    *(FusedConfig("ecsq", bits=bits) for bits in range(2, 9)),
    FusedConfig("int8"),
    FusedConfig("int4"),
)


@dataclass(frozen=True)
class LayerCurve:
    """What each candidate makes of a layer, measured.

    names: the layer's qualified name first, then those of layers tied to it. unit: whose importance it has.
    nbytes: everything stored, by candidate. squared_error: ‖W − Ŵ‖², Frobenius, by candidate.
    """

    names: tuple[str, ...]
    unit: str
    parameters: int
    candidates: tuple[FusedConfig, ...]
    nbytes: tuple[int, ...]
    squared_error: tuple[float, ...]


@dataclass(frozen=True)
class LayerPrecision:
    """A layer's precision as it was chosen; fields are those of its `LayerCurve`."""

    names: tuple[str, ...]
    config: FusedConfig
    parameters: int
    nbytes: int
    squared_error: float
    importance: float

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True, eq=False)
class PrecisionPlan(Mapping[str, FusedConfig]):
    """A configuration for each layer by qualified name: what `infold.convert` takes. Prints as a table.

    Layers that cannot be converted are not in it: `convert` leaves them dense, and the budget does not count them.
    """

    layers: tuple[LayerPrecision, ...]
    budget_bytes: int

    @property
    def nbytes(self) -> int:
        """Of the packed weights, tied ones once; biases are not counted."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def loss(self) -> float:
        """Σ F·D over all layers."""
        return sum(layer.importance * layer.squared_error for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(sum(layer.parameters for layer in self.layers), 1)

    def __getitem__(self, name: str) -> FusedConfig:
        for layer in self.layers:
            if name in layer.names:
                return layer.config
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for layer in self.layers for name in layer.names)

    def __len__(self) -> int:
        return sum(len(layer.names) for layer in self.layers)

    def __str__(self) -> str:
        width = max([len(layer.names[0]) for layer in self.layers] + [len("total")])
        head = f"{'layer':<{width}}  {'precision':<12} {'stored':>10} {'bits/w':>7} {'importance':>11} {'error²':>10}"
        lines = [head, "-" * len(head)]
        for layer in self.layers:
            tail = "".join(f"  = {name}" for name in layer.names[1:])
            lines.append(
                f"{layer.names[0]:<{width}}  {label(layer.config):<12} {format_bytes(layer.nbytes):>10} "
                f"{layer.bits_per_weight:>7.2f} {layer.importance:>11.3g} {layer.squared_error:>10.3g}{tail}"
            )
        lines.append("-" * len(head))
        budget = f"of {format_bytes(self.budget_bytes)}"
        lines.append(f"{'total':<{width}}  {budget:<12} {format_bytes(self.nbytes):>10} {self.bits_per_weight:>7.2f}")
        return "\n".join(lines)


def allocate_precision(
    model: nn.Module,
    budget_bytes: int,
    importance: Mapping[str, float] | None = None,
    *,
    candidates: Sequence[FusedConfig] = CANDIDATES,
    skip: Collection[str] = (),
    progress: bool = True,
) -> PrecisionPlan:
    """The precision of each layer that makes the loss rise least, all packed weights together in ``budget_bytes``.

    importance: by unit name (`infold.tiers.units`), as an analyzer gives it; None counts every layer's error the same.
    skip: qualified names, or patterns of them, that stay dense. Others: see `measure_precision` and `water_fill`.

        infold.convert(model, infold.tiers.allocate_precision(model, 40_000_000, fisher(model, batches)))
    """
    curves = measure_precision(model, candidates, skip=skip, progress=progress)
    return plan_precision(curves, budget_bytes, importance)


@torch.no_grad()
def measure_precision(
    model: nn.Module,
    candidates: Sequence[FusedConfig] = CANDIDATES,
    *,
    skip: Collection[str] = (),
    progress: bool = True,
) -> list[LayerCurve]:
    """Packs every layer that `infold.convert` would convert with every candidate, and keeps the sizes and the errors.

    Layers of one weight are one curve. Raises ValueError for no candidate, no layer, and, with the layer's name, for a
    weight that a candidate refuses.
    """
    if not candidates:
        raise ValueError("candidates: expected one at least, got none")
    unit_of = {module: unit.name for unit in units(model) for module in unit.modules.values()}
    groups = _layers(model, skip)
    if not groups:
        raise ValueError("model: expected a layer that can be packed, got none")
    curves = []
    with tqdm(groups.items(), desc="measuring", unit="layer", disable=not progress, leave=False) as layers:
        for names, module in layers:
            weight = dense_weight(module)
            measured = [_measure(names[0], weight, config) for config in candidates]
            sizes, errors = (tuple(column) for column in zip(*measured, strict=True))
            curves.append(LayerCurve(names, unit_of[module], weight.numel(), tuple(candidates), sizes, errors))
    return curves


def plan_precision(
    curves: Sequence[LayerCurve], budget_bytes: int, importance: Mapping[str, float] | None = None
) -> PrecisionPlan:
    """As `allocate_precision`, from curves that are measured already.

    Raises ValueError for a layer whose unit has no importance, a negative or infinite importance, and a budget below
    the smallest size that the layers have.
    """
    missing = sorted({curve.unit for curve in curves if importance is not None and curve.unit not in importance})
    if missing:
        raise ValueError(f"importance: expected that of every unit with a layer, missing {', '.join(missing)}")
    weights = [1.0 if importance is None else importance[curve.unit] for curve in curves]
    for curve, weight in zip(curves, weights, strict=True):
        if not 0 <= weight < math.inf:
            raise ValueError(f"importance of {curve.unit}: expected a finite number from zero up, got {weight}")
    options = [
        [Option(size, weight * error) for size, error in zip(curve.nbytes, curve.squared_error, strict=True)]
        for curve, weight in zip(curves, weights, strict=True)
    ]
    chosen = water_fill(options, budget_bytes)
    layers = tuple(
        LayerPrecision(c.names, c.candidates[i], c.parameters, c.nbytes[i], c.squared_error[i], weight)
        for c, i, weight in zip(curves, chosen, weights, strict=True)
    )
    return PrecisionPlan(layers, budget_bytes)


def label(config: FusedConfig) -> str:
    """A configuration in a word or two."""
    if config.format != "ecsq":
        return config.format
    return f"ecsq {config.bits:g}" if config.bits is not None else f"ecsq ±{config.max_error:g}"


def _layers(model: nn.Module, skip: Collection[str]) -> dict[tuple[str, ...], nn.Module]:
    """Layers that can be converted, those of one weight together: all of their names, and the first of them."""
    names: dict[nn.Module, list[str]] = {}
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for module in names:
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, attribute))

    def takes(module: nn.Module) -> bool:
        skipped = any(fnmatchcase(name, pattern) for name in names[module] for pattern in skip)
        return dense_kind(module) is not None and not skipped and refusal(module, FusedConfig()) is None

    groups: dict[tuple[str, ...], nn.Module] = {}
    for tied in owners.values():
        modules = [module for module, _ in tied]
        # A tie to what is not converted, or lies the other way round, is one that `convert` would refuse to break.
        whole = all(attribute == "weight" and takes(module) for module, attribute in tied)
        if whole and len({is_transposed_linear(module) for module in modules}) == 1:
            groups[tuple(dict.fromkeys(name for module in modules for name in names[module]))] = modules[0]
    return groups


def _measure(name: str, weight: Tensor, config: FusedConfig) -> tuple[int, float]:
    """Bytes and squared error of a weight packed."""
    try:
        packed = pack(weight, config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    unpacked = FusedDecompressLinear(packed).unpack(weight.dtype)
    if config.format == "lossless" and config.round_to is None:
        return packed.nbytes, 0.0
    # A few rows at a time: a float64 copy of a whole vocabulary is large.
    parts = zip(torch.split(weight, 1024), torch.split(unpacked, 1024), strict=True)
    return packed.nbytes, sum(float((a.double() - b.double()).square().sum()) for a, b in parts)
