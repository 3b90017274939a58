"""A packed weight as one range of bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from infold.packed import Packed
from infold.tiers.units import aligned


class PackedLayout:
    """The tensors of a packed weight, side by side in one range of memory.

    nbytes: of the range, so that another one may begin behind it.
    """

    def __init__(self, packed: Packed) -> None:
        self._parts: list[tuple[int, int, torch.dtype, torch.Size]] = []
        end = 0
        for tensor in packed:
            self._parts.append((end, tensor.nbytes, tensor.dtype, tensor.shape))
            end += aligned(tensor.nbytes)
        self.nbytes = end

    def write(self, packed: Packed, memory: Tensor) -> None:
        """Copies the tensors to the beginning of uint8 ``memory``."""
        for (start, size, *_), tensor in zip(self._parts, packed, strict=True):
            memory[start : start + size].copy_(as_bytes(tensor))

    def view(self, memory: Tensor) -> Packed:
        """The packed weight that begins where ``memory`` does, not copied."""
        return Packed(*(memory[at : at + size].view(dtype).view(shape) for at, size, dtype, shape in self._parts))


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's values as flat uint8."""
    return tensor.contiguous().flatten().view(torch.uint8)
