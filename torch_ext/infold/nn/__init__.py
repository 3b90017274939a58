"""Modules that compute on packed weights, and on spectra."""

from infold.nn.adapter import FrequencyAdapter, adapter_state_dict, add_adapters
from infold.nn.conv import FusedDecompressConv
from infold.nn.frequency import FrequencyLinear
from infold.nn.frequency_conv import FrequencyConv1d, FrequencyConv2d, FrequencyConv3d
from infold.nn.fused import FusedDecompressEmbedding, FusedDecompressLinear, PackedModule
from infold.nn.sparse_frequency import SparseFrequencyLinear

__all__ = [
    "FrequencyAdapter",
    "FrequencyConv1d",
    "FrequencyConv2d",
    "FrequencyConv3d",
    "FrequencyLinear",
    "FusedDecompressConv",
    "FusedDecompressEmbedding",
    "FusedDecompressLinear",
    "PackedModule",
    "SparseFrequencyLinear",
    "adapter_state_dict",
    "add_adapters",
]
