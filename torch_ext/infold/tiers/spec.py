"""Memory tiers: how long it takes to fetch from each, and how much each holds."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TierSpec:
    """A memory tier as seen from where the model computes.

    setup_us: what a transfer takes beside its bytes, in microseconds.
    bandwidth_gb_s: gigabytes (1e9 bytes) a second *to the compute device*: a tier behind a link has the link's.
    capacity_bytes: what it holds; None is unlimited.
    resident: weights in this tier are computed on where they lie: a forward transfers nothing.
    on_disk: whether it is a file; else it is memory. depth: how many requests, of some 2 MiB, a disk is given at a
        time: where they are many, what is read ahead slows what is waited for.

    Raises ValueError for a setup time or a capacity below zero, a bandwidth or a depth that is not positive, and an
    empty name.
    """

    name: str
    setup_us: float
    bandwidth_gb_s: float
    capacity_bytes: int | None = None
    resident: bool = False
    on_disk: bool = False
    depth: int = 4

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name: expected a tier's name, got an empty string")
        if not (self.setup_us >= 0 and math.isfinite(self.setup_us)):
            raise ValueError(f"{self.name}: setup_us: expected zero or more microseconds, got {self.setup_us}")
        if not (self.bandwidth_gb_s > 0 and math.isfinite(self.bandwidth_gb_s)):
            raise ValueError(f"{self.name}: bandwidth_gb_s: expected a positive number, got {self.bandwidth_gb_s}")
        if self.capacity_bytes is not None and self.capacity_bytes < 0:
            raise ValueError(f"{self.name}: capacity_bytes: expected zero or more, got {self.capacity_bytes}")
        if self.depth < 1:
            raise ValueError(f"{self.name}: depth: expected one request or more, got {self.depth}")

    def transfer_seconds(self, nbytes: int) -> float:
        """How long a transfer of ``nbytes`` takes alone (math.md §8); none for no bytes and in a resident tier."""
        if self.resident or nbytes == 0:
            return 0.0
        return self.setup_us * 1e-6 + nbytes / (self.bandwidth_gb_s * 1e9)
