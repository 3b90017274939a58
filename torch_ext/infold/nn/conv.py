"""Convolutions whose weight stays packed."""

from __future__ import annotations

import copy
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infold._library import ops
from infold.config import FusedConfig, Mode
from infold.nn.fused import PackedModule, require
from infold.packed import Packed, pack

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CLASSES: tuple[type[Conv], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Window(NamedTuple):
    """What a convolution is beyond its weight and bias; as the attributes of ``torch.nn.ConvNd``."""

    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    @classmethod
    def of(cls, conv: Conv | FusedDecompressConv) -> Window:
        """The window of a dense or packed convolution."""
        if isinstance(conv, FusedDecompressConv):
            return conv.window
        return cls(*(getattr(conv, field) for field in cls._fields))

    @property
    def borders(self) -> list[tuple[int, int]]:
        """Padding before and after each spatial dimension."""
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        padding = (0,) * len(self.kernel_size) if isinstance(self.padding, str) else self.padding
        return [(before, before) for before in padding]


class FusedDecompressConv(PackedModule):
    """``torch.nn.Conv1d``, ``2d`` or ``3d`` with its weight packed as (out_channels, in_channels / groups · kernel).

    A pointwise convolution (kernel 1, no padding, one group) of at most 128 pixels in the batch is the fused product
    over them. Any other, and every one in mode ``"exact"``, unpacks into a scratch that all layers share and calls the
    library's convolution: for a lossless weight, the bits of the dense layer.

    x: (batch, in_channels, 1 to 3 spatial dimensions), batch optional, in float32, float64, float16 or bfloat16; the
    result has x's dtype. Gradients flow to x, the bias, and trainable scales.
    """

    def __init__(
        self,
        packed: Packed,
        window: Window,
        bias: nn.Parameter | None = None,
        *,
        mode: Mode = "fused",
        dtype: torch.dtype | None = None,
        trainable_scales: bool = False,
        name: str = "weight",
    ) -> None:
        super().__init__(packed, dtype=dtype, trainable_scales=trainable_scales, name=name)
        self.window = window
        self.mode: Mode = mode
        self.register_parameter("bias", bias)
        borders = window.borders
        constant = window.padding_mode == "zeros"
        # The library pads both sides alike, with zeros; what is more than that is padded before it.
        self._padding = [min(border) if constant else 0 for border in borders]
        extra = [(a - p, b - p) for (a, b), p in zip(borders, self._padding, strict=True)]
        self._padding_before = [side for pair in reversed(extra) for side in pair]

    in_channels = property(lambda self: self.window.in_channels)
    out_channels = property(lambda self: self.header.out_features)
    kernel_size = property(lambda self: self.window.kernel_size)
    stride = property(lambda self: self.window.stride)
    padding = property(lambda self: self.window.padding)
    dilation = property(lambda self: self.window.dilation)
    groups = property(lambda self: self.window.groups)
    padding_mode = property(lambda self: self.window.padding_mode)

    @classmethod
    def from_conv(cls, conv: Conv, config: FusedConfig) -> FusedDecompressConv:
        """Packs a dense convolution's weight and shares its bias. Raises ValueError for any other class."""
        require("conv", conv, *_CLASSES)
        module = cls(
            pack(conv.weight.flatten(1), config),
            Window.of(conv),
            cast("nn.Parameter | None", conv.bias),
            mode=config.mode,
            dtype=conv.weight.dtype,
            trainable_scales=config.trainable_scales,
        )
        return module.train(conv.training)

    def to_conv(self) -> Conv:
        """The dense convolution, with the unpacked weight."""
        weight, window = self.weight, self.window
        conv = _CLASSES[len(window.kernel_size) - 1](
            window.in_channels,
            self.header.out_features,
            *window[1:6],  # type: ignore[arg-type]
            bias=self.bias is not None,
            padding_mode=window.padding_mode,  # type: ignore[arg-type]
            device=weight.device,
            dtype=self.dtype,
        )
        conv.weight = nn.Parameter(weight)
        if self.bias is not None:
            conv.bias = copy.deepcopy(self.bias)
        return conv.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The dense weight in the convolution's shape, unpacked anew at each access; takes no gradient."""
        weight = self.unpack().detach()
        return weight.view(len(weight), self.window.in_channels // self.window.groups, *self.window.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == len(self.window.kernel_size) + 1:
            return self._convolve(x.unsqueeze(0)).squeeze(0)
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        window = self.window
        if any(self._padding_before):
            mode = "constant" if window.padding_mode == "zeros" else window.padding_mode
            x = F.pad(x, self._padding_before, mode)
        where = (window.kernel_size, window.stride, self._padding, window.dilation, window.groups)
        tensors = self._tensors()
        layout = (*self._layout(), self.header.dtype, self.mode == "exact")
        return ops.fused_conv.default(x, *tensors, self.bias, *where, *layout)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        window = self.window
        sizes = f"{window.in_channels}, {self.out_channels}, kernel_size={window.kernel_size}, stride={window.stride}"
        rest = f"padding={window.padding}, dilation={window.dilation}, groups={window.groups}"
        return f"{sizes}, {rest}, bias={self.bias is not None}, {self._describe()}, mode={self.mode}"
