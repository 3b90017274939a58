"""How plans name the codec of a unit."""

from __future__ import annotations

import re

from infold.config import FusedConfig

#: The name of weights that are stored as they are.
RAW = "raw"


def config_of(codec: str) -> FusedConfig | None:
    """``"lossless"``, ``"int8"``, ``"int4"``, or ``"ecsq-B"`` with B bits a weight; None for ``"raw"``.

    Raises ValueError for another name.
    """
    if codec == RAW:
        return None
    if codec in ("lossless", "int8", "int4"):
        return FusedConfig(codec)  # type: ignore[arg-type]
    bits = re.fullmatch(r"ecsq-(\d(?:\.\d{1,4})?)", codec)
    if bits is None:
        raise ValueError(f"codec: expected raw, lossless, int8, int4 or ecsq-B with B bits, got {codec!r}")
    return FusedConfig("ecsq", bits=float(bits[1]))
