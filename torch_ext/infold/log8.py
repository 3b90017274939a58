"""Coefficients of a byte each: a curve and a scale for every 64 (``docs/log8.md``)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from infold._library import ops


class Log8(NamedTuple):
    """Encoded coefficients: 8.25 bits each where they are a multiple of 64."""

    #: uint8, in the coefficients' shape.
    codes: Tensor
    #: int16, one for 64 coefficients in their flat order.
    words: Tensor

    @property
    def nbytes(self) -> int:
        """Everything that is stored."""
        return self.codes.nbytes + self.words.nbytes


def log8_encode(x: Tensor) -> Log8:
    """Encodes float coefficients of any shape. Raises ValueError that names an index whose number is not finite."""
    return Log8(*ops.log8_encode(x))


def log8_decode(encoded: Log8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The coefficients in a float dtype. Raises ValueError for words that are not as many as the codes need."""
    x: Tensor = ops.log8_decode(*encoded, dtype)
    return x
