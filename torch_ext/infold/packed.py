"""A packed weight as plain tensors, and its header as plain integers."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from infold._library import CorruptWeightError, as_corrupt, ops
from infold.config import FusedConfig, MemoryLayout

QUANTIZERS = ("lossless", "ecsq", "int8", "int4")
#: By number; those of the CPU first.
LAYOUTS: tuple[MemoryLayout, ...] = get_args(MemoryLayout)
CPU_LAYOUTS: tuple[MemoryLayout, ...] = LAYOUTS[:2]
#: What `lay_out` may be asked for, and the operator's number: ``"device"`` is any for CUDA, of fixed width if it can.
FORMS = {"compact": 0, "fast": 1, "device": 2, "window": 3, "codes": 3, "pairs": 6, "raw": 8}
PREDICTORS = ("none", "left", "top", "average", "planar")
_DTYPES = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16}


class Packed(NamedTuple):
    """A packed weight: uint8 payload, int32 directory, uint8 tables, and scales (empty for a lossless weight)."""

    payload: Tensor
    directory: Tensor
    tables: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Everything that is stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self)


class Header(NamedTuple):
    """A packed weight's header."""

    version: int
    codec: int
    layout: int
    dtype: torch.dtype
    out_features: int
    in_features: int
    quantizer: str
    predictor: str
    scale_shape: tuple[int, int]


@torch.inference_mode(False)
def pack(weight: Tensor, config: FusedConfig) -> Packed:
    """Packs a dense (out_features, in_features) weight of dtype float32, float16 or bfloat16.

    On CUDA it is packed there into the layout that it has there: lossless bfloat16, int8 and int4. Others are packed on
    the CPU, in their compact form. Taken back, all of them are the same bytes as packed on the CPU.

    Raises ValueError for another shape or dtype, for a weight that is not finite in a quantised format, and where
    ``round_to`` makes infinities of finite values.
    """
    weight = weight.detach()
    if config.format == "lossless":
        rounded = weight if config.round_to is None else weight.to(config.round_to)
        if rounded is not weight and not torch.equal(rounded.isinf(), weight.isinf()):
            largest = torch.finfo(rounded.dtype).max
            raise ValueError(f"round_to: expected no value beyond {largest:g} for {config.round_to}, got some")
        return Packed(*ops.pack_lossless(rounded))
    if config.format == "ecsq":
        return Packed(*ops.pack_ecsq(weight, config.bits, config.max_error))
    if config.format == "int8":
        return Packed(*ops.pack_int8(weight))
    return Packed(*ops.pack_int4(weight, config.group_size))


@torch.inference_mode(False)
def lay_out(packed: Packed, layout: str) -> Packed:
    """The same weight in layout ``"compact"``, ``"fast"``, or one for CUDA: ``"window"`` or ``"codes"``, whichever it
    has; ``"pairs"``; or ``"device"``, the former or else the latter.

    It is the same exactly, and stays on its device; the scales are those that came.

    Raises ValueError where a weight has none for CUDA, or not this one.
    """
    tensors = (tensor.detach() for tensor in packed[:3])
    payload, directory, tables = ops.lay_out(*tensors, FORMS[layout])
    return Packed(payload, directory, tables, packed.scales)


def form_of(layout: MemoryLayout) -> str:
    """What `lay_out` is asked for to give this layout."""
    return next((form for form in ("codes", "pairs", "raw") if layout.startswith(form)), layout)


def read_header(packed: Packed, name: str, *, verify: bool) -> Header:
    """The header of the packed weight ``name``; with ``verify``, every checksum is compared first.

    Raises CorruptWeightError, which names the weight and the field.
    """
    # Only checksums need the payload, which is large to copy from a GPU.
    read = packed if verify else packed._replace(payload=packed.payload[:0])
    payload, directory, tables, scales = (tensor.detach().cpu() for tensor in read)
    # Trained scales are their own truth: the header's checksum is of those that were packed.
    frozen = float_scales(scales) if is_frozen(scales) else None
    try:
        fields = ops.inspect_packed(payload, directory, tables, frozen, verify)
    except (RuntimeError, ValueError) as error:
        raise as_corrupt(error, name) from error
    version, codec, layout, dtype, rows, cols, quantizer, predictor, scale_rows, scale_cols = fields
    if tuple(scales.shape) != (scale_rows, scale_cols) and scales.numel() + scale_rows:
        got = f"expected {(scale_rows, scale_cols)}, got {tuple(scales.shape)}"
        raise CorruptWeightError(f"{name}.scales", "shape", got)
    if not is_frozen(scales) and not scales.is_floating_point():
        raise CorruptWeightError(f"{name}.scales", "dtype", f"expected floats or their bits, got {scales.dtype}")
    return Header(
        version,
        codec,
        layout,
        _DTYPES[dtype],
        rows,
        cols,
        QUANTIZERS[quantizer],
        PREDICTORS[predictor],
        (scale_rows, scale_cols),
    )


def is_frozen(scales: Tensor) -> bool:
    """Whether scales are the integer bits of floats."""
    return scales.dtype in (torch.int16, torch.int32)


def frozen_scales(scales: Tensor) -> Tensor:
    """Scales as integer bits, so that ``module.bfloat16()`` cannot round them."""
    return scales.view(torch.int16 if scales.element_size() == 2 else torch.int32)


def float_scales(scales: Tensor) -> Tensor:
    """The floats of frozen scales; trainable ones are floats already."""
    if scales.dtype == torch.int16:
        return scales.view(torch.bfloat16)
    return scales.view(torch.float32) if scales.dtype == torch.int32 else scales
