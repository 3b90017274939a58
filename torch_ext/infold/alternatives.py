"""What other methods leave of a weight in as many bytes as a layer stores."""

from __future__ import annotations

import torch
from torch import Tensor

from infold.config import FusedConfig
from infold.layers import relative_error
from infold.nn import FusedDecompressLinear
from infold.packed import Packed, pack
from infold.report import Alternative

#: The rates that ``FusedConfig.bits`` takes.
_LEAST_BITS, _MOST_BITS = 2.0, 8.0
#: Halvings of the interval of errors where ECSQ has to be smaller than that.
_HALVINGS = 10


def alternatives(weight: Tensor, nbytes: int) -> tuple[Alternative, ...]:
    """Truncated SVD, ECSQ and int4 of a (out_features, in_features) weight, each of ``nbytes`` at most if it can.

    int4 has one size only. Raises ValueError for a weight that is not finite.
    """
    return svd(weight, nbytes), ecsq(weight, nbytes), _packed("int4", weight, pack(weight, FusedConfig("int4")))


def svd(weight: Tensor, nbytes: int) -> Alternative:
    """The product of two float16 factors of the largest rank that ``nbytes`` hold; rank 0 leaves everything."""
    exact = weight.double()
    rows, cols = exact.shape
    rank = min(nbytes // (2 * (rows + cols)), rows, cols)
    # The smaller Gram matrix has the singular vectors, and is much cheaper to decompose.
    wide = exact if rows <= cols else exact.T
    vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)[:, :rank]
    right = vectors.T @ wide
    # Either factor gets the root of the singular values, so that both lie well within float16.
    root = right.norm(dim=1).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    product = (vectors * root).half().double() @ (right / root[:, None]).half().double()
    error = relative_error(exact, product if rows <= cols else product.T)
    return Alternative("svd", 2 * rank * (rows + cols), error)


def ecsq(weight: Tensor, nbytes: int) -> Alternative:
    """ECSQ of the largest size that ``nbytes`` hold, or of the smallest that it has."""
    bits = 8 * nbytes / weight.numel()
    if bits >= _LEAST_BITS:
        packed = pack(weight, FusedConfig("ecsq", bits=min(bits, _MOST_BITS)))
        if packed.nbytes <= nbytes:
            return _packed("ecsq", weight, packed)
    # Lower rates are asked for by their error.
    low, high = 0.0, 1.0
    best = smallest = pack(weight, FusedConfig("ecsq", max_error=1 - 2**-_HALVINGS))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        packed = pack(weight, FusedConfig("ecsq", max_error=middle))
        if packed.nbytes <= nbytes:
            best, high = packed, middle
        else:
            low = middle
    return _packed("ecsq", weight, best if best.nbytes <= nbytes else smallest)


def _packed(method: str, weight: Tensor, packed: Packed) -> Alternative:
    unpacked = FusedDecompressLinear(packed).unpack(torch.float32).detach()
    return Alternative(method, packed.nbytes, relative_error(weight.float(), unpacked))
