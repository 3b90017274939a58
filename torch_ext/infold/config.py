"""What a layer is converted to, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Format = Literal["lossless", "ecsq", "int8", "int4"]
#: By number; those of the CPU first.
MemoryLayout = Literal[
    "compact",
    "fast",
    "window",
    "codes4",
    "codes5",
    "codes8",
    "pairs",
    "pairs_of_levels",
    "raw_bf16",
    "raw_f16",
    "raw_f32",
]
Layout = Literal["auto", "compact", "fast"]
#: Those for CUDA, by what `infold.prepare` is asked for.
DeviceLayout = Literal["window", "codes", "pairs", "raw"]
Mode = Literal["fused", "exact"]
FrequencyKind = Literal["circulant", "sparse"]
#: How a frequency layer holds its spectrum.
Storage = Literal["float", "log8"]

#: Dtypes of dense weights that can be packed.
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class FusedConfig:
    """How to pack a weight, and how to compute on it.

    format: ``"lossless"`` keeps every bit; ``"ecsq"`` is a uniform step with entropy-coded levels at any rate or error;
        ``"int8"`` has one scale a row; ``"int4"`` one for each row and ``group_size`` columns. All are entropy-coded.
    bits: for ecsq, the size in bits a weight (2 to 8, may be fractional), everything counted.
    max_error: for ecsq, the relative Frobenius error, instead of ``bits``. It is that of the reconstruction in float32;
        what rounds a weight to half precision (unpacking to it, bfloat16 products) adds its own, about 0.002.
    group_size: for int4, a multiple of 64; other formats refuse one.
    round_to: for lossless, a dtype to round the weight to first. This loses precision, and so has to be asked for.
    trainable_scales: scales of a quantised weight become float32 parameters that train, and that ``model.half()`` casts
        as any other. A weight that does not pay for quantising (a tiny one) is stored lossless and has none.
    layout: how the weight lies in memory: ``"compact"`` is the smallest; ``"fast"`` is 1.1 to 1.3 times that, and more
        for weights that are very regular (pruned, constant); ``"auto"`` measures. See `infold.prepare`. Files and state
        dicts hold the compact form; results are the same.
    mode: ``"fused"`` decodes inside the product; ``"exact"`` unpacks into a scratch that all layers share and calls
        ``F.linear``: for a lossless weight, the bits of the dense layer at equal shape and thread count (and, of a
        convolution, with a weight that is not channels-last).

    Raises ValueError for options that contradict each other, TypeError for ones of another type.
    """

    format: Format = "lossless"
    bits: float | None = None
    max_error: float | None = None
    group_size: int = 128
    round_to: torch.dtype | None = None
    trainable_scales: bool = False
    layout: Layout = "auto"
    mode: Mode = "fused"

    def __post_init__(self) -> None:
        _require_one_of("format", self.format, get_args(Format))
        _require_one_of("layout", self.layout, get_args(Layout))
        _require_one_of("mode", self.mode, get_args(Mode))
        _require_number("bits", self.bits)
        _require_number("max_error", self.max_error)
        if not isinstance(self.group_size, int):
            raise TypeError(f"group_size: expected an int, got {self.group_size!r}")
        ecsq = self.format == "ecsq"
        if ecsq and (self.bits is None) == (self.max_error is None):
            raise ValueError("format 'ecsq': expected exactly one of bits and max_error")
        if not ecsq and (self.bits is not None or self.max_error is not None):
            raise ValueError(f"bits and max_error: expected only with format 'ecsq', got them with {self.format!r}")
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise ValueError(f"bits: expected 2 to 8, got {self.bits}")
        _require_max_error(self.max_error)
        if self.group_size < 64 or self.group_size % 64:
            raise ValueError(f"group_size: expected a positive multiple of 64, got {self.group_size}")
        if self.format != "int4" and self.group_size != type(self).group_size:
            raise ValueError(f"group_size: expected only with format 'int4', got it with {self.format!r}")
        if self.round_to is not None and (self.format != "lossless" or self.round_to not in WEIGHT_DTYPES):
            raise ValueError("round_to: expected float32, float16 or bfloat16, with format 'lossless'")
        if self.trainable_scales and self.format == "lossless":
            raise ValueError("trainable_scales: expected a quantised format, for lossless weights have no scales")


@dataclass(frozen=True)
class FrequencyConfig:
    """Which spectrum takes the place of a linear layer's weight: the nearest of its kind, by the Frobenius norm.

    kind: ``"circulant"`` is `infold.nn.FrequencyLinear`, ``"sparse"`` `infold.nn.SparseFrequencyLinear`.
    block: for circulant, the size of a block: a ``block``-th of the parameters is left.
    density: for sparse, the share of the two-dimensional spectrum's numbers that is kept, above 0 and at most 1.
    max_error: a layer of a larger relative Frobenius error, as it is measured, stays dense; None converts them all.
        Trained weights are far from either kind: expect 0.8 and more, and see `infold.recover`.
    storage: ``"float"`` holds the spectrum in the weight's dtype, to train; ``"log8"`` in 8.25 bits a number, frozen.
        Sparse layers have the former alone.
    compare: whether to report what truncated SVD, ECSQ and int4 leave at the same bytes. It takes an eigendecomposition
        of each layer: about a minute for one of 4,096 features.

    Raises ValueError for options that contradict each other, TypeError for ones of another type.
    """

    kind: FrequencyKind = "circulant"
    block: int = 64
    density: float | None = None
    max_error: float | None = None
    storage: Storage = "float"
    compare: bool = True

    def __post_init__(self) -> None:
        _require_one_of("kind", self.kind, get_args(FrequencyKind))
        _require_one_of("storage", self.storage, get_args(Storage))
        _require_number("density", self.density)
        _require_number("max_error", self.max_error)
        if not isinstance(self.block, int) or isinstance(self.block, bool):
            raise TypeError(f"block: expected an int, got {self.block!r}")
        if self.block < 1:
            raise ValueError(f"block: expected a positive size, got {self.block}")
        sparse = self.kind == "sparse"
        if sparse and self.block != type(self).block:
            raise ValueError("block: expected only with kind 'circulant', got it with 'sparse'")
        if sparse != (self.density is not None):
            raise ValueError(
                f"density: expected with kind 'sparse' and only there, got {self.density} with {self.kind!r}"
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density: expected above 0 and at most 1, got {self.density}")
        if sparse and self.storage != "float":
            raise ValueError(f"storage: expected 'float' with kind 'sparse', got {self.storage!r}")
        _require_max_error(self.max_error)


def _require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _require_number(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def _require_max_error(value: float | None) -> None:
    if value is not None and not 0 < value < 1:
        raise ValueError(f"max_error: expected between 0 and 1, got {value}")
