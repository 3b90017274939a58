"""How to pack a layer."""

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
        for name, value, allowed in (
            ("format", self.format, get_args(Format)),
            ("layout", self.layout, get_args(Layout)),
            ("mode", self.mode, get_args(Mode)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        for name, number in (("bits", self.bits), ("max_error", self.max_error)):
            if number is not None and not isinstance(number, int | float):
                raise TypeError(f"{name}: expected a number, got {number!r}")
        if not isinstance(self.group_size, int):
            raise TypeError(f"group_size: expected an int, got {self.group_size!r}")
        ecsq = self.format == "ecsq"
        if ecsq and (self.bits is None) == (self.max_error is None):
            raise ValueError("format 'ecsq': expected exactly one of bits and max_error")
        if not ecsq and (self.bits is not None or self.max_error is not None):
            raise ValueError(f"bits and max_error: expected only with format 'ecsq', got them with {self.format!r}")
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise ValueError(f"bits: expected 2 to 8, got {self.bits}")
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise ValueError(f"max_error: expected between 0 and 1, got {self.max_error}")
        if self.group_size < 64 or self.group_size % 64:
            raise ValueError(f"group_size: expected a positive multiple of 64, got {self.group_size}")
        if self.format != "int4" and self.group_size != type(self).group_size:
            raise ValueError(f"group_size: expected only with format 'int4', got it with {self.format!r}")
        if self.round_to is not None and (self.format != "lossless" or self.round_to not in WEIGHT_DTYPES):
            raise ValueError("round_to: expected float32, float16 or bfloat16, with format 'lossless'")
        if self.trainable_scales and self.format == "lossless":
            raise ValueError("trainable_scales: expected a quantised format, for lossless weights have no scales")
