"""Modules that compute on packed weights."""

from infold.nn.conv import FusedDecompressConv
from infold.nn.fused import FusedDecompressEmbedding, FusedDecompressLinear, PackedModule

__all__ = ["FusedDecompressConv", "FusedDecompressEmbedding", "FusedDecompressLinear", "PackedModule"]
