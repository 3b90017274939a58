"""A linear layer whose weight has a sparse two-dimensional spectrum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from infold import spectral
from infold._library import ops
from infold.nn.frequency import check_features


class SparseFrequencyLinear(nn.Module):
    """y = x·Wᵀ + b, where of W's two-dimensional spectrum few coefficients are not zero. W is never built.

    W[i, j] = scale · Re Σ_k (a_k + i·b_k)·exp(2πi(u_k·i/M - v_k·j/N)) for M = out_features and N = in_features.
    ``coefficients`` (K, 2) holds (a, b) and trains; ``indices`` (2, K) int32 holds (u, v) in the half-plane 0 <= v <=
    N/2, with u <= M/2 where v is 0 or N/2: of two conjugate frequencies the one that stands for both. What has the
    same index is added up. The imaginary part of a coefficient that is its own conjugate has no effect, and its
    gradient is zero. With ``real=True`` b is zero and ``coefficients`` is (K,), as in FourierFT (`infold.peft`).

    Shapes: x (..., in_features), y (..., out_features), in x's dtype. Operations a row: O(N log N + K + M log M). A
    layer to *train*, or an adapter: trained dense weights have no sparse spectra.
    """

    coefficients: nn.Parameter
    indices: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        density: float | None = None,
        indices: Tensor | None = None,
        bias: bool = True,
        scale: float | None = None,
        real: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Takes ``indices`` as they are, or draws a share ``density`` (0 to 1) of the half-plane without replacement,
        by ``generator`` (on the CPU) where there is one.

        ``scale`` is √(2/(M·N)) if not given: coefficients are then coordinates in an orthonormal basis of matrices (but
        for the at most four that are their own conjugates), so that the norm of W is that of the coefficients.

        Raises ValueError for sizes that are not positive, for a density out of range, for both or none of ``density``
        and ``indices``, for an index out of the half-plane, and for a scale that is zero or not finite.
        """
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")
        scale = math.sqrt(2 / (in_features * out_features)) if scale is None else float(scale)
        if scale == 0 or not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number that is not zero, got {scale}")
        self.in_features, self.out_features, self.scale, self.real = in_features, out_features, scale, real
        if (density is None) == (indices is None):
            given = "neither" if density is None else "both"
            raise ValueError(f"density, indices: expected one of them, got {given}")
        if density is not None:
            indices = self._draw(_checked(density), generator)
        assert indices is not None
        self._check(indices)
        self.indices = nn.Parameter(indices.to(device=device, dtype=torch.int32), requires_grad=False)
        count = indices.shape[1]
        self.coefficients = nn.Parameter(torch.empty((count,) if real else (count, 2), device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _draw(self, density: float, generator: torch.Generator | None) -> Tensor:
        sizes = self.out_features, self.in_features
        size = spectral.half_plane_size(*sizes)
        # On the CPU whatever the default device is: the generator is the CPU's.
        chosen = torch.randperm(size, generator=generator, device="cpu")[: max(1, round(density * size))]
        indices = spectral.half_plane(*sizes, chosen)
        return indices[:, spectral.by_output_frequency(indices, self.out_features)]

    def _check(self, indices: Tensor) -> None:
        if indices.dim() != 2 or indices.shape[0] != 2 or indices.dtype not in (torch.int32, torch.int64):
            got = f"{indices.dtype} {list(indices.shape)}"
            raise ValueError(f"indices: expected an int32 or int64 tensor of shape [2, K], got {got}")
        if indices.is_meta:
            return
        u, v = indices.long()
        rows, cols = self.out_features, self.in_features
        last = torch.where((v == 0) | (2 * v == cols), rows // 2, rows - 1)
        bad = (v < 0) | (v > cols // 2) | (u < 0) | (u > last)
        if bad.any():
            k = int(bad.nonzero()[0])
            expected = f"0 <= v <= {cols // 2} and 0 <= u < {rows}, or u <= {rows // 2} where v is 0 or N/2"
            raise ValueError(f"indices[:, {k}]: expected {expected}, got (u, v) = ({int(u[k])}, {int(v[k])})")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws coefficients from a normal distribution by which W's elements have the variance of `nn.Linear`'s,
        1/(3·in_features), and the bias from U(-1/√in_features, 1/√in_features).
        """
        degrees = self.coefficients.numel() / 2
        if degrees > 0:
            self.coefficients.normal_(0, 1 / (abs(self.scale) * math.sqrt(3 * self.in_features * degrees)))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            self.bias.uniform_(-bound, bound)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, density: float, scale: float | None = None) -> SparseFrequencyLinear:
        """The layer nearest to a dense one, by the Frobenius norm of the difference, of all that have a share
        ``density`` (0 to 1) of its degrees of freedom: M·N·density real numbers, two for each coefficient (one for each
        that is its own conjugate). The bias is a copy.
        """
        weight = linear.weight
        degrees = max(1, round(_checked(density) * weight.numel()))
        coefficients, indices = spectral.largest(weight.detach(), degrees)
        sizes = linear.in_features, linear.out_features
        has_bias = linear.bias is not None
        new = cls(*sizes, None, indices, has_bias, scale, device=weight.device, dtype=weight.dtype)
        new.coefficients.copy_(coefficients / new.scale)
        if new.bias is not None:
            new.bias.copy_(linear.bias)
        return new.train(linear.training)

    def complex_coefficients(self) -> Tensor:
        """The coefficients (K, 2) as pairs of real and imaginary parts: the parameter itself unless ``real``."""
        if not self.real:
            return self.coefficients
        return torch.stack([self.coefficients, torch.zeros_like(self.coefficients)], -1)

    def dense_weight(self) -> Tensor:
        """W as a dense (out_features, in_features) matrix, in float32 or float64. Differentiable."""
        coefficients = self.complex_coefficients()
        coefficients = coefficients if coefficients.dtype == torch.float64 else coefficients.float()
        return spectral.sparse_dense(coefficients * self.scale, self.indices, self.out_features, self.in_features)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer of the same map, in this one's dtype."""
        weight = self.dense_weight()
        sizes = self.in_features, self.out_features
        new = nn.Linear(*sizes, self.bias is not None, weight.device, self.coefficients.dtype)
        new.weight.copy_(weight)
        if self.bias is not None:
            new.bias.copy_(self.bias)
        return new.train(self.training)

    def requires_grad_(self, requires_grad: bool = True) -> SparseFrequencyLinear:
        """As `nn.Module` does, but for the indices, which are integers."""
        self.coefficients.requires_grad_(requires_grad)
        if self.bias is not None:
            self.bias.requires_grad_(requires_grad)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Takes as many coefficients as there are, for the count of a projection depends on the weight."""
        stored = state_dict.get(prefix + "indices")
        if isinstance(stored, Tensor) and stored.dim() == 2 and stored.shape[1] != self.indices.shape[1]:
            count = stored.shape[1]
            self.indices.data = self.indices.new_empty(2, count)
            self.coefficients.data = self.coefficients.new_empty(count, *self.coefficients.shape[1:])
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(self, x: Tensor) -> Tensor:
        check_features(x, self.in_features)
        coefficients = self.complex_coefficients()
        y: Tensor = ops.sparse_frequency_linear(x, coefficients, self.indices, self.bias, self.out_features, self.scale)
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"coefficients={self.indices.shape[1]}, bias={self.bias is not None}, scale={self.scale:.6g}, "
            f"real={self.real}"
        )


def _checked(density: float) -> float:
    if not 0 < density <= 1:
        raise ValueError(f"density: expected a number above 0, up to 1, got {density}")
    return density
