"""Linear and embedding layers whose weight stays packed."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from infold._library import ops
from infold.config import FusedConfig, MemoryLayout, Mode
from infold.packed import (
    CPU_LAYOUTS,
    LAYOUTS,
    Packed,
    float_scales,
    form_of,
    frozen_scales,
    is_frozen,
    lay_out,
    pack,
    read_header,
)

_FIELDS = Packed._fields


#: The canonical form of each payload that is laid out otherwise, as long as somebody holds it: modules that share a
#: weight then put the same tensors into a state dict.
_canonical: Any = WeakTensorKeyDictionary()


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def require(what: str, module: nn.Module, *classes: type[nn.Module]) -> None:
    """Refuses a layer of another class: one derived from these may compute something else."""
    if type(module) not in classes:
        expected = " or ".join(f"nn.{cls.__name__}" for cls in classes)
        raise ValueError(f"{what}: expected an {expected}, got a {type(module).__qualname__}")


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
            self.scales = _frozen(scales if is_frozen(scales) else frozen_scales(scales))
        self.header = read_header(self.packed, name, verify=False)
        # Follows `.to(dtype)` as a dense weight would; holds nothing.
        self.register_buffer("_dtype", torch.empty(0, dtype=dtype or self.header.dtype), persistent=False)

    @property
    def packed(self) -> Packed:
        """The packed weight's tensors; they are this module's parameters."""
        scales = self._no_scales() if self.scales is None else self.scales
        return Packed(self.payload, self.directory, self.tables, scales)

    @property
    def layout(self) -> MemoryLayout:
        """How the weight lies in memory; see `infold.prepare`."""
        return LAYOUTS[self.header.layout]

    @torch.inference_mode(False)
    def lay_out(self, layout: str) -> None:
        """Lays the weight out in memory, in place and exactly: ``"compact"``, ``"fast"``, or for CUDA ``"window"``,
        ``"codes"``, ``"pairs"`` or ``"device"``, whichever of them.

        Whoever shares it has to `refresh_header`.
        """
        if layout not in (form_of(self.layout), "device" if self._is_for_device else None):
            laid_out = lay_out(self.packed, layout)
            for field in _FIELDS[:3]:
                getattr(self, field).data = getattr(laid_out, field)
        self.refresh_header()

    def settle(self) -> None:
        """Lays the weight out for its device, where ``.to(device)`` has moved it since."""
        if self._is_misplaced() and not torch.compiler.is_compiling():
            # Another module that shares the weight may have laid it out.
            self.refresh_header()
            if self._is_misplaced():
                self.lay_out("device" if self.payload.is_cuda else "fast")

    def _is_misplaced(self) -> bool:
        return self.payload.is_cuda != self._is_for_device

    @property
    def _is_for_device(self) -> bool:
        return self.layout not in CPU_LAYOUTS

    def canonical(self) -> Packed:
        """The packed weight in its compact form, the one that is stored."""
        if self.layout == "compact":
            return self.packed
        address, kept = _canonical.get(self.payload, (None, ()))
        tensors = [reference() for reference in kept]
        if address != self.payload.data_ptr() or any(tensor is None for tensor in tensors):
            tensors = list(lay_out(self.packed, "compact")[:3])
            _canonical[self.payload] = (self.payload.data_ptr(), [weakref.ref(tensor) for tensor in tensors])
        payload, directory, tables = tensors
        return Packed(payload, directory, tables, self.packed.scales)

    def refresh_header(self, name: str = "weight") -> None:
        """Reads the header again, after the tensors have changed."""
        # New data may lie where older data lay: the address alone does not tell them apart.
        _canonical.pop(self.payload, None)
        self.header = read_header(self.packed, name, verify=False)

    def float_scales(self) -> Tensor | None:
        """The scales as floats; None for a lossless weight."""
        return None if self.scales is None else float_scales(self.scales)

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
        return ops.unpack.default(*self._tensors(), *self._layout(), dtype or self.dtype)  # type: ignore[no-any-return]

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What operators take first. Comes before `_layout`."""
        self.settle()
        return self.payload, self.directory, self.tables, self.float_scales()

    def _layout(self) -> tuple[int, int, int, int]:
        header = self.header
        return header.codec, header.layout, header.out_features, header.in_features

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "compact":
            canonical = self.canonical()
            destination.update({prefix + field: getattr(canonical, field) for field in _FIELDS[:3]})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        """Takes any packed weight of this shape, whatever its format and size; verifies it before anything changes."""
        missing_keys, unexpected_keys, error_msgs = lists
        missing = [prefix + field for field in _FIELDS[:3] if prefix + field not in state_dict]
        if missing:
            # Part of a weight is no weight: what is there stays.
            missing_keys.extend(missing)
        else:
            loaded = Packed(*(state_dict.get(prefix + field, self._no_scales()) for field in _FIELDS))
            header = read_header(loaded, prefix.removesuffix(".") or "weight", verify=True)
            shape, expected = header[4:6], self.header[4:6]
            if shape != expected:
                error_msgs.append(f"size mismatch for {prefix}payload: a packed weight of {shape}, expected {expected}")
            else:
                loaded = loaded if header.layout == self.header.layout else self._like_own(loaded)
                self._take(loaded, assign=local_metadata.get("assign_to_params_buffers", False))
                self.refresh_header()
        rest = {name: tensor for name, tensor in state_dict.items() if name not in {prefix + f for f in _FIELDS}}
        found: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, found, unexpected_keys, error_msgs)
        missing_keys.extend(name for name in found if name.removeprefix(prefix) not in _FIELDS)

    def _like_own(self, loaded: Packed) -> Packed:
        """A loaded weight in this one's layout, or, if it has no such, in the one that it has for this device."""
        try:
            return lay_out(loaded, form_of(self.layout))
        except ValueError:
            if not self._is_for_device:
                raise
            return lay_out(loaded, "device")

    def _take(self, loaded: Packed, *, assign: bool) -> None:
        """Makes a loaded weight this module's. Parameters keep their identity: modules that share them still do."""
        for field in _FIELDS[:3]:
            parameter, tensor = getattr(self, field), getattr(loaded, field).detach()
            parameter.data = tensor if assign else tensor.to(parameter.device, copy=True)
        scales = loaded.scales.detach()
        if scales.numel() == 0:
            self.register_parameter("scales", None)
            return
        # Scales that trained there, or that train here, are floats that train.
        trains = not is_frozen(scales) or (self.scales is not None and self.scales.is_floating_point())
        scales = (float_scales(scales).float() if trains else scales).to(self.payload.device, copy=not assign)
        if self.scales is not None and self.scales.dtype == scales.dtype:
            self.scales.data = scales
        else:
            self.scales = nn.Parameter(scales, requires_grad=trains)

    def _no_scales(self) -> Tensor:
        return self.payload.new_empty((0, 0), dtype=torch.float32)

    def _describe(self) -> str:
        bits = 8 * self.packed.nbytes / max(self.header.out_features * self.header.in_features, 1)
        return f"format={self.header.quantizer}, layout={self.layout}, bits={bits:.2f}"


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
        """Packs a dense layer's weight and shares its bias. Raises ValueError for any other class."""
        require("linear", linear, nn.Linear)
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
        return ops.fused_linear.default(  # type: ignore[no-any-return]
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
        """Packs a dense embedding's table. Raises ValueError for any other class, and for ``max_norm``: it rewrites the
        table on lookup.
        """
        require("embedding", embedding, nn.Embedding)
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
        rows: Tensor = ops.fused_embedding.default(indices, *self._tensors(), *self._layout(), self.dtype)
        if self.padding_idx is not None and rows.requires_grad:
            # As in nn.Embedding, the padding row trains nothing.
            rows = torch.where((indices == self.padding_idx).unsqueeze(-1), rows.detach(), rows)
        return rows

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._describe()}"
