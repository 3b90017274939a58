"""Convolutions that are computed as products of spectra."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from infold._library import ops
from infold.nn.conv import Conv, Window

Self = TypeVar("Self", bound="_FrequencyConv")


class _FrequencyConv(_ConvNd):
    """What the three classes share: PyTorch's arguments, parameters and initial values, another way to compute."""

    _dense: type[Conv]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode not in ("zeros", "circular"):
            raise ValueError(f"padding_mode: expected 'zeros' or 'circular', got {self.padding_mode!r}")
        borders = Window.of(self).borders  # type: ignore[arg-type]
        self._borders = [before for before, _ in borders] + [after for _, after in borders]

    def _arguments(self) -> dict[str, Any]:
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
        device, dtype = self.weight.device, self.weight.dtype
        return {name: getattr(self, name) for name in names} | {
            "bias": self.bias is not None,
            "device": device,
            "dtype": dtype,
        }

    @classmethod
    @torch.no_grad()
    def from_conv(cls: type[Self], conv: Conv) -> Self:
        """A layer of the same map, with copies of a dense convolution's parameters. Raises ValueError for others."""
        if not isinstance(conv, cls._dense):
            raise ValueError(f"conv: expected a {cls._dense.__name__}, got {type(conv).__name__}")
        new = cls(**_FrequencyConv._arguments(conv))  # type: ignore[arg-type]
        new.load_state_dict(conv.state_dict())
        return new.train(conv.training)

    @torch.no_grad()
    def to_conv(self) -> Conv:
        """The dense convolution of the same map, with copies of the parameters."""
        new = self._dense(**self._arguments())
        new.load_state_dict(self.state_dict())
        return new.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == len(self.kernel_size) + 1:
            return self._convolve(x.unsqueeze(0)).squeeze(0)
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        where = (self.stride, self._borders, self.dilation, self.groups, self.padding_mode == "circular")
        y: Tensor = ops.frequency_conv(x, self.weight, self.bias, *where)
        return y


class FrequencyConv1d(_FrequencyConv, nn.Conv1d):
    """``torch.nn.Conv1d`` by Fourier transforms: quick where the kernel is long, about from 64 elements on.

    Arguments, parameters, their initial values and the state dict are those of ``nn.Conv1d``, with ``padding_mode``
    ``"zeros"`` or ``"circular"``; results are its results, to rounding. Long inputs are transformed piece by piece:
    the memory for spectra does not grow with them.
    """

    _dense = nn.Conv1d


class FrequencyConv2d(_FrequencyConv, nn.Conv2d):
    """``torch.nn.Conv2d`` by Fourier transforms; see `FrequencyConv1d`."""

    _dense = nn.Conv2d


class FrequencyConv3d(_FrequencyConv, nn.Conv3d):
    """``torch.nn.Conv3d`` by Fourier transforms; see `FrequencyConv1d`."""

    _dense = nn.Conv3d
