"""Modules that compute on packed weights, and on spectra."""

from infold.nn.conv import FusedDecompressConv
from infold.nn.frequency import FrequencyLinear
from infold.nn.fused import FusedDecompressEmbedding, FusedDecompressLinear, PackedModule

__all__ = [
    "FrequencyLinear",
    "FusedDecompressConv",
    "FusedDecompressEmbedding",
    "FusedDecompressLinear",
    "PackedModule",
]
