"""Layers whose weight is a spectrum."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor, nn

from infold import spectral
from infold._library import ops
from infold.config import Storage
from infold.log8 import Log8, log8_decode, log8_encode


def check_features(x: Tensor, in_features: int) -> None:
    """Raises ValueError unless x's last dimension has ``in_features``: the operators take what their blocks cover."""
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x: expected a last dimension of {in_features}, got shape {tuple(x.shape)}")


class FrequencyLinear(nn.Module):
    """y = x·Wᵀ + b with a block-circulant W: a ``block``-th of the parameters, and about as few operations.

    W consists of ⌈out_features / block⌉ by ⌈in_features / block⌉ circular convolutions, cut to size; each is held by
    its packed spectrum (`infold.spectral`), of as many real numbers as the block has. Shapes: x (..., in_features), y
    (..., out_features), in x's dtype. A layer to *train*: few trained dense weights are near to a circulant one.

    ``storage="log8"`` holds the spectrum in 8.25 bits a number, as the parameters ``codes`` (uint8) and ``words``
    (int16) in the place of ``spectrum``, and decodes it when it is used. It is frozen then: the bias alone trains.
    ``.to(dtype)`` leaves it as it is.
    """

    spectrum: nn.Parameter | None
    codes: nn.Parameter | None
    words: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block: int = 64,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        storage: Storage = "float",
    ) -> None:
        """Raises ValueError for sizes that are not positive and for another storage."""
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features), ("block", block)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if storage not in get_args(Storage):
            raise ValueError(f"storage: expected one of {get_args(Storage)}, got {storage!r}")
        self.in_features, self.out_features, self.block = in_features, out_features, block
        self.storage: Storage = storage
        shape = (-(-out_features // block), -(-in_features // block), block)
        spectrum = torch.empty(shape, device=device, dtype=dtype)
        if storage == "log8":
            words = torch.empty(-(-spectrum.numel() // 64), device=device, dtype=torch.int16)
            self._hold(Log8(torch.empty_like(spectrum, dtype=torch.uint8), words))
        else:
            self._hold(spectrum)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws W's elements, and the bias's, from U(-1/√in_features, 1/√in_features), as `nn.Linear` does."""
        bound = 1 / math.sqrt(self.in_features)
        like = self._encoded().codes if self.spectrum is None else self.spectrum
        self._write(spectral.pack_spectrum(torch.empty_like(like, dtype=torch.float32).uniform_(-bound, bound)))
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    def _hold(self, spectrum: Tensor | Log8) -> None:
        """Makes a spectrum the layer's parameters.

        Encoded ones are no buffers because DDP broadcasts buffers on every forward.
        """
        if isinstance(spectrum, Tensor):
            self.spectrum = nn.Parameter(spectrum)
        else:
            self.register_parameter("spectrum", None)
        for name in Log8._fields:
            part = None if isinstance(spectrum, Tensor) else getattr(spectrum, name)
            self.register_parameter(name, None if part is None else nn.Parameter(part, requires_grad=False))

    def _write(self, spectrum: Tensor) -> None:
        """Gives the spectrum other numbers."""
        if self.spectrum is not None:
            self.spectrum.copy_(spectrum)
        elif not spectrum.is_meta:
            for parameter, part in zip(self._encoded(), log8_encode(spectrum), strict=True):
                parameter.copy_(part)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, block: int = 64, storage: Storage = "float") -> FrequencyLinear:
        """The layer nearest to a dense one by the Frobenius norm of the difference, with a copy of its bias."""
        weight, has_bias = linear.weight, linear.bias is not None
        sizes = linear.in_features, linear.out_features, block
        new = cls(*sizes, has_bias, weight.device, weight.dtype, storage)
        new._write(spectral.pack_spectrum(spectral.circulant(weight.float(), block)))
        if new.bias is not None:
            new.bias.copy_(linear.bias)
        return new.train(linear.training)

    def to_log8(self) -> FrequencyLinear:
        """The layer with its spectrum in log8, frozen; the two share the bias. Raises ValueError if it is so already,
        and for a spectrum that is not finite.
        """
        if self.spectrum is None:
            raise ValueError('storage: expected "float", got "log8"')
        return self._with(log8_encode(self.spectrum.detach()), "log8")

    def to_float(self, dtype: torch.dtype = torch.float32) -> FrequencyLinear:
        """The layer with its spectrum in a float dtype, to train; the two share the bias. Raises ValueError if it is
        so already.
        """
        if self.spectrum is not None:
            raise ValueError('storage: expected "log8", got "float"')
        return self._with(self.packed_spectrum().to(dtype), "float")

    def _with(self, spectrum: Tensor | Log8, storage: Storage) -> FrequencyLinear:
        new = type(self)(self.in_features, self.out_features, self.block, False, "meta", storage=storage)
        new._hold(spectrum)
        new.bias = self.bias
        return new.train(self.training)

    def packed_spectrum(self) -> Tensor:
        """The packed spectra (`infold.spectral`): the parameter itself, or in float32 what log8 decodes to."""
        return self.spectrum if self.spectrum is not None else log8_decode(self._encoded())

    def _encoded(self) -> Log8:
        assert self.codes is not None
        assert self.words is not None
        return Log8(self.codes, self.words)

    def requires_grad_(self, requires_grad: bool = True) -> FrequencyLinear:
        """As `nn.Module` does. Raises ValueError for a log8 layer that should: its spectrum does not train."""
        if requires_grad and self.spectrum is None:
            raise ValueError(
                "requires_grad: a log8 layer does not train its spectrum; use `bias.requires_grad_()` to train the "
                "bias, or `to_float()` to train both"
            )
        return super().requires_grad_(requires_grad)

    def dense_weight(self) -> Tensor:
        """W as a dense (out_features, in_features) matrix, in float32 or float64. Differentiable."""
        spectrum = self.packed_spectrum()
        spectrum = spectrum if spectrum.dtype == torch.float64 else spectrum.float()
        return spectral.dense(spectral.unpack_spectrum(spectrum), self.out_features, self.in_features)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer of the same map, in this one's dtype (float32 for log8)."""
        weight = self.dense_weight()
        dtype = torch.float32 if self.spectrum is None else self.spectrum.dtype
        new = nn.Linear(self.in_features, self.out_features, self.bias is not None, weight.device, dtype)
        new.weight.copy_(weight)
        if self.bias is not None:
            new.bias.copy_(self.bias)
        return new.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        check_features(x, self.in_features)
        y: Tensor
        if self.spectrum is not None:
            y = ops.frequency_linear(x, self.spectrum, self.bias, self.out_features)
        else:
            y = ops.frequency_linear_log8(x, self.codes, self.words, self.bias, self.out_features)
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block={self.block}, "
            f"bias={self.bias is not None}, storage={self.storage}"
        )
