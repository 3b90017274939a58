"""Layers whose weight is a spectrum."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from infold import spectral
from infold._library import ops


class FrequencyLinear(nn.Module):
    """y = x·Wᵀ + b with a block-circulant W: a ``block``-th of the parameters, and about as few operations.

    W consists of ⌈out_features / block⌉ by ⌈in_features / block⌉ circular convolutions, cut to size; each is held by
    its packed spectrum (`infold.spectral`), of as many real numbers as the block has. Shapes: x (..., in_features), y
    (..., out_features), in x's dtype. A layer to *train*: few trained dense weights are near to a circulant one.
    """

    spectrum: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block: int = 64,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Raises ValueError for sizes that are not positive."""
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features), ("block", block)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")
        self.in_features, self.out_features, self.block = in_features, out_features, block
        shape = (-(-out_features // block), -(-in_features // block), block)
        self.spectrum = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws W's elements, and the bias's, from U(-1/√in_features, 1/√in_features), as `nn.Linear` does."""
        bound = 1 / math.sqrt(self.in_features)
        blocks = torch.empty_like(self.spectrum, dtype=torch.float32).uniform_(-bound, bound)
        self.spectrum.copy_(spectral.pack_spectrum(blocks))
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, block: int = 64) -> FrequencyLinear:
        """The layer nearest to a dense one by the Frobenius norm of the difference, with a copy of its bias."""
        weight = linear.weight
        new = cls(linear.in_features, linear.out_features, block, linear.bias is not None, weight.device, weight.dtype)
        new.spectrum.copy_(spectral.pack_spectrum(spectral.circulant(weight.float(), block)))
        if new.bias is not None:
            new.bias.copy_(linear.bias)
        return new.train(linear.training)

    def dense_weight(self) -> Tensor:
        """W as a dense (out_features, in_features) matrix, in float32 or float64. Differentiable."""
        spectrum = self.spectrum if self.spectrum.dtype == torch.float64 else self.spectrum.float()
        return spectral.dense(spectral.unpack_spectrum(spectrum), self.out_features, self.in_features)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer of the same map, in this one's dtype."""
        dtype, device = self.spectrum.dtype, self.spectrum.device
        new = nn.Linear(self.in_features, self.out_features, self.bias is not None, device, dtype)
        new.weight.copy_(self.dense_weight())
        if self.bias is not None:
            new.bias.copy_(self.bias)
        return new.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = ops.frequency_linear(x, self.spectrum, self.bias, self.out_features)
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block={self.block}, "
            f"bias={self.bias is not None}"
        )
