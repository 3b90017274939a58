"""A precision plan as llama.cpp's quantiser takes it: ``--tensor-type`` patterns."""

from __future__ import annotations

import re

import torch

from infold.config import FusedConfig
from infold.tiers.gguf import gguf_name
from infold.tiers.precision import PrecisionPlan

#: Types by the most bits a weight that they stand for; their own sizes are 2.63, 3.44, 4.5, 5.5, 6.56 and 8.5 bits.
TYPES: tuple[tuple[float, str], ...] = (
    (2, "q2_k"),
    (3, "q3_k"),
    (4, "q4_k"),
    (5, "q5_k"),
    (6, "q6_k"),
    (8, "q8_0"),
)
_FLOATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def tensor_types(plan: PrecisionPlan, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    r"""``pattern=type`` for each layer, for ``llama-quantize --tensor-type``: ``^blk\.0\.attn_q\.weight$=q4_k``.

    int4 becomes q4_k, int8 q8_0, ecsq the smallest type of `TYPES` that stands for its bits (those that it takes, where
    it was asked for by error), lossless ``dtype``. The sizes are llama.cpp's then, not the plan's, and it replaces
    K-quants itself where a row is no multiple of 256. Of tied layers the first is named: GGUF stores one tensor.

    Raises ValueError, which names them, for layers that GGUF has no name for, and for a dtype of no float.
    """
    if dtype not in _FLOATS:
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    names = {layer.names[0]: _tensor(layer.names[0]) for layer in plan.layers}
    unknown = [name for name, tensor in names.items() if tensor is None]
    if unknown:
        raise ValueError(f"plan: expected layers of a Llama-style model, got {', '.join(unknown)}")
    result = []
    for layer in plan.layers:
        pattern = re.escape(names[layer.names[0]] or "")
        result.append(f"^{pattern}$={_type(layer.config, layer.bits_per_weight, dtype)}")
    return result


def _tensor(layer: str) -> str | None:
    """GGUF's name of a layer's weight; None where it has none."""
    try:
        return gguf_name(f"{layer}.weight")
    except ValueError:
        return None


def _type(config: FusedConfig, bits_per_weight: float, dtype: torch.dtype) -> str:
    if config.format == "lossless":
        return _FLOATS[config.round_to or dtype]
    bits = {"int8": 8.0, "int4": 4.0}.get(config.format, config.bits or bits_per_weight)
    return next((name for most, name in TYPES if bits <= most), TYPES[-1][1])
