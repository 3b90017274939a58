"""Writes golden files: packed weights that every later version must read to the same bits.

A file that is there is never rewritten. Run: python python_tests/data/make_golden.py [NAME ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from infold import FusedConfig
from infold._library import ops
from infold.packed import lay_out, pack, read_header
from safetensors.torch import save_file


def gaussian(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    return (torch.randn(rows, cols, generator=generator) * 0.05).to(dtype)


def special(dtype: torch.dtype) -> torch.Tensor:
    weight = gaussian(70, 130, dtype)
    for place, value in enumerate([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-7, 6e4]):
        weight[place * 9, place * 17] = value
    return weight


def sparse() -> torch.Tensor:
    weight = gaussian(70, 330, torch.bfloat16)
    weight.view(-1)[::40], weight.view(-1)[::990] = 0.0, -0.0
    weight[5, 7], weight[69, 329] = 1e-20, 1e20
    return weight


def outliers() -> torch.Tensor:
    weight = gaussian(40, 1100)
    weight[3, 1000], weight[39, 5] = 7.0, -9.0
    return weight


def smooth() -> torch.Tensor:
    rows, cols = torch.arange(96).unsqueeze(1), torch.arange(192)
    return torch.sin(rows / 31) + torch.cos(cols / 47)


GOLDEN = {
    "lossless_bf16": lambda: (special(torch.bfloat16), FusedConfig()),
    "lossless_fp16": lambda: (special(torch.float16), FusedConfig()),
    "lossless_fp32": lambda: (special(torch.float32), FusedConfig()),
    "raw_bf16": lambda: (gaussian(2, 9, torch.bfloat16), FusedConfig()),
    "constant_fp32": lambda: (torch.full((33, 65), -1.5), FusedConfig()),
    "ecsq_3_bits": lambda: (gaussian(130, 200), FusedConfig("ecsq", bits=3)),
    "ecsq_8_bits": lambda: (gaussian(64, 300), FusedConfig("ecsq", bits=8)),
    "ecsq_outliers": lambda: (outliers(), FusedConfig("ecsq", bits=4)),
    "ecsq_predicted": lambda: (smooth(), FusedConfig("ecsq", max_error=0.01)),
    "int8": lambda: (gaussian(100, 160), FusedConfig("int8")),
    "int4_group_64": lambda: (gaussian(100, 200), FusedConfig("int4", group_size=64)),
    # From version 2 on: sixteen classes, several streams, the fast layout.
    "alias_bf16": lambda: (special(torch.bfloat16), FusedConfig()),
    "alias_streams": lambda: (gaussian(33, 2100, torch.bfloat16), FusedConfig()),
    "fast_bf16": lambda: (special(torch.bfloat16), FusedConfig(layout="fast")),
    "fast_fp32": lambda: (special(torch.float32), FusedConfig(layout="fast")),
    "fast_ecsq": lambda: (outliers(), FusedConfig("ecsq", bits=4, layout="fast")),
    "fast_predicted": lambda: (smooth(), FusedConfig("ecsq", max_error=0.01, layout="fast")),
    "fast_int8": lambda: (gaussian(100, 160), FusedConfig("int8", layout="fast")),
    # From version 3 on: a palette.
    "fast_palette": lambda: (sparse(), FusedConfig(layout="fast")),
}


def main() -> None:
    folder = Path(__file__).parent
    for name in sys.argv[1:] or GOLDEN:
        path = folder / f"{name}.safetensors"
        if path.exists():
            print(f"{path.name} is there already")
            continue
        weight, config = GOLDEN[name]()
        packed = pack(weight, config)
        if config.layout == "fast":
            packed = lay_out(packed, "fast")
        header = read_header(packed, name, verify=True)
        scales = packed.scales if packed.scales.numel() else None
        layout = (header.codec, header.layout, header.out_features, header.in_features)
        dense = ops.unpack(*packed[:3], scales, *layout, weight.dtype)
        save_file({**packed._asdict(), "dense": dense}, path, {"header": json.dumps([str(field) for field in header])})
        print(f"{path.name}: {header}")


if __name__ == "__main__":
    main()
