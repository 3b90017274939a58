"""Modules that compute on packed weights."""

from infold.nn.fused import FusedDecompressEmbedding, FusedDecompressLinear, PackedModule

__all__ = ["FusedDecompressEmbedding", "FusedDecompressLinear", "PackedModule"]
