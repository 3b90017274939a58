"""Linear and embedding layers whose weight stays packed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from infold._library import CorruptWeightError, ops
from infold.config import FusedConfig, Mode
from infold.packed import Packed, float_scales, frozen_scales, pack, read_header


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class PackedModule(nn.Module):
    """What linear and embedding share: a packed (out_features, in_features) weight, its parts parameters.

    They are no buffers because DDP broadcasts buffers on every forward, and accelerate leaves them behind.
    """

    payload: nn.Parameter
    directory: nn.Parameter
    tables: nn.Parameter
    scales: nn.Parameter | None
    bias: nn.Parameter | None
    _dtype: Tensor

    def __init__(
        self, packed: Packed, *, dtype: torch.dtype | None = None, trainable_scales: bool = False, name: str = "weight"
    ) -> None:
        """``packed`` may hold parameters of another module, to be shared with it. ``dtype`` is that of the dense weight
        where it is not the packed one. ``name`` is what errors call the weight.
        """
        super().__init__()
        for field in ("payload", "directory", "tables"):
            value = getattr(packed, field)
            setattr(self, field, value if isinstance(value, nn.Parameter) else _frozen(value))
        if packed.scales.numel() == 0:
            self.register_parameter("scales", None)
        elif isinstance(packed.scales, nn.Parameter):
            self.scales = packed.scales
        elif trainable_scales:
            self.scales = nn.Parameter(float_scales(packed.scales).float())
        else:
            scales = packed.scales
            self.scales = _frozen(frozen_scales(scales) if scales.is_floating_point() else scales)
        self._read_header(name, verify=False)
        # Follows `.to(dtype)` as a dense weight would; holds nothing.
        self.register_buffer("_dtype", torch.empty(0, dtype=dtype or self.header.dtype), persistent=False)

    def _read_header(self, name: str, *, verify: bool) -> None:
        self.header = read_header(self.packed, name, verify=verify)
        expected = self.header.scale_shape
        got = (0, 0) if self.scales is None else tuple(self.scales.shape)
        if got != expected:
            raise CorruptWeightError(f"{name}.scales", "shape", f"expected {expected}, got {got}")

    @property
    def packed(self) -> Packed:
        """The packed weight's tensors; they are this module's parameters."""
        scales = self.payload.new_empty((0, 0), dtype=torch.float32) if self.scales is None else self.scales
        return Packed(self.payload, self.directory, self.tables, scales)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the dense weight would have."""
        return self._dtype.dtype

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked anew at each access, for code that reads ``layer.weight``; takes no gradient."""
        return self.unpack().detach()

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense (out_features, in_features) weight; a lossless one bit for bit. Differentiable in the scales."""
        return ops.unpack(*self._tensors(), *self._layout(), dtype or self.dtype)  # type: ignore[no-any-return]

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        scales = None if self.scales is None else float_scales(self.scales)
        return self.payload, self.directory, self.tables, scales

    def _layout(self) -> tuple[int, int, int, int]:
        header = self.header
        return header.codec, header.layout, header.out_features, header.in_features

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        # Another weight has another size. `data` is replaced, not the parameter: modules that share it still do.
        for field, parameter in self._parameters.items():
            loaded = state_dict.get(prefix + field)
            if field == "bias" or parameter is None or loaded is None:
                continue
            if loaded.dtype == parameter.dtype and loaded.shape != parameter.shape:
                parameter.data = torch.empty(loaded.shape, dtype=parameter.dtype, device=parameter.device)
        shape = self.header.out_features, self.header.in_features
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)
        self._read_header(prefix.removesuffix("."), verify=True)
        loaded_shape = self.header.out_features, self.header.in_features
        if loaded_shape != shape:
            errors: list[str] = rest[-1]
            errors.append(f"size mismatch for {prefix}payload: a packed weight of {loaded_shape}, expected {shape}")

    def _describe(self) -> str:
        bits = 8 * self.packed.nbytes / max(self.header.out_features * self.header.in_features, 1)
        return f"format={self.header.quantizer}, bits={bits:.2f}"


class FusedDecompressLinear(PackedModule):
    """``y = x Wᵀ + b`` with W packed: decoded a tile at a time inside the product, never materialised.

    x: (..., in_features) in float32, float64, float16 or bfloat16; y: (..., out_features) in x's dtype, summed in
    float32 (float64 for float64). Gradients flow to x, the bias, and trainable scales.
    """

    def __init__(
        self,
        packed: Packed,
        bias: nn.Parameter | None = None,
        *,
        mode: Mode = "fused",
        dtype: torch.dtype | None = None,
        trainable_scales: bool = False,
        name: str = "weight",
    ) -> None:
        super().__init__(packed, dtype=dtype, trainable_scales=trainable_scales, name=name)
        self.mode: Mode = mode
        self.register_parameter("bias", bias)

    @property
    def in_features(self) -> int:
        return self.header.in_features

    @property
    def out_features(self) -> int:
        return self.header.out_features

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: FusedConfig) -> FusedDecompressLinear:
        """Packs a dense layer's weight and shares its bias."""
        packed = pack(linear.weight, config)
        module = cls(
            packed,
            linear.bias,
            mode=config.mode,
            dtype=linear.weight.dtype,
            trainable_scales=config.trainable_scales,
        )
        return module.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense layer, with the unpacked weight."""
        weight = self.weight
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, weight.device, self.dtype)
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = copy.deepcopy(self.bias)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return ops.fused_linear(  # type: ignore[no-any-return]
            x, *self._tensors(), self.bias, *self._layout(), self.header.dtype, self.mode == "exact"
        )

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self._describe()}, mode={self.mode}"


class FusedDecompressEmbedding(PackedModule):
    """An embedding whose table is packed: the tiles that hold the rows looked up are decoded, each once.

    indices: int64 or int32 of any shape; result: (*indices.shape, embedding_dim) in the dense table's dtype.
    """

    def __init__(
        self,
        packed: Packed,
        padding_idx: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        trainable_scales: bool = False,
        name: str = "weight",
    ) -> None:
        super().__init__(packed, dtype=dtype, trainable_scales=trainable_scales, name=name)
        self.padding_idx = padding_idx

    @property
    def num_embeddings(self) -> int:
        return self.header.out_features

    @property
    def embedding_dim(self) -> int:
        return self.header.in_features

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, config: FusedConfig) -> FusedDecompressEmbedding:
        """Packs a dense embedding's table. ``max_norm`` is refused: it rewrites the table on lookup."""
        if embedding.max_norm is not None:
            raise ValueError("max_norm: expected None, for it rewrites the table on lookup")
        packed = pack(embedding.weight, config)
        dtype, trainable = embedding.weight.dtype, config.trainable_scales
        module = cls(packed, embedding.padding_idx, dtype=dtype, trainable_scales=trainable)
        return module.train(embedding.training)

    def to_embedding(self) -> nn.Embedding:
        """The dense embedding, with the unpacked table."""
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=self.weight)
        return embedding.train(self.training)

    def forward(self, indices: Tensor) -> Tensor:
        return ops.fused_embedding(indices, *self._tensors(), *self._layout(), self.dtype)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._describe()}"
