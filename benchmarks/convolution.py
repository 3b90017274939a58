"""Packed convolutions against the dense ones in float32: ResNet-50's shapes, and all of it with random weights.

A convolution that is not pointwise unpacks its weight and runs the library's convolution: it cannot be faster, and the
ratio says how near it comes. Pointwise ones of few pixels are the fused product; "unpacked" is the other way for them.
Lossless weights are rounded to bfloat16 first, so both sides compute on the same numbers; layout fast.

Run: python benchmarks/convolution.py [--quick] [--isa avx2] [--threads N] [--json FILE]
"""

from __future__ import annotations

import copy
import warnings

import infold
import torch
from harness import Results, Run, interleaved_medians, parse_arguments
from infold.nn import FusedDecompressConv
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

FORMATS = {
    "lossless": infold.FusedConfig(round_to=torch.bfloat16, layout="fast"),
    "int8": infold.FusedConfig("int8", layout="fast"),
}
#: in channels, out channels, kernel, pixels a side
SHAPES = [(64, 256, 1, 56), (512, 128, 1, 28), (256, 1024, 1, 14), (2048, 512, 1, 7), (64, 64, 3, 56), (512, 512, 3, 7)]


def layer(results: Results, shape: tuple[int, int, int, int], batch: int, name: str) -> None:
    """One layer, packed both ways."""
    channels, out, kernel, side = shape
    conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
    x = torch.randn(batch, channels, side, side)
    packed = FusedDecompressConv.from_conv(conv, FORMATS[name])
    infold.prepare(nn.ModuleList([packed]), "fast")
    unpacked = copy.deepcopy(packed)
    unpacked.mode = "exact"
    conv.weight.data = packed.weight
    runs: dict[str, Run] = {"dense": lambda: conv(x), "packed": lambda: packed(x), "unpacked": lambda: unpacked(x)}
    medians = interleaved_medians(runs, results.arguments.seconds / 2)
    case = f"{channels} to {out}, {kernel}x{kernel}, {side}x{side}, batch {batch}, {name}"
    for way in ("packed", "unpacked") if kernel == 1 else ("packed",):
        results.add(f"{case}, {way}", "conv2d float32", medians[way], medians["dense"])


def network(results: Results, batch: int, name: str) -> None:
    """A whole ResNet-50."""
    dense = ResNetModel(ResNetConfig()).eval()
    packed = copy.deepcopy(dense)
    report = infold.convert(packed, FORMATS[name], progress=False)
    x = torch.randn(batch, 3, 224, 224)

    def run(model: nn.Module) -> Tensor:
        return model(x).last_hidden_state  # type: ignore[no-any-return]

    medians = interleaved_medians(
        {"dense": lambda: run(dense), "packed": lambda: run(packed)}, results.arguments.seconds
    )
    sizes = f"weights {report.bytes_before / 1e6:.1f} MB dense, {report.resident_bytes / 1e6:.1f} in memory"
    results.add(f"ResNet-50, batch {batch}, {name}", "float32", medians["packed"], medians["dense"], note=sizes)


def main() -> None:
    arguments = parse_arguments(__doc__)
    warnings.filterwarnings("ignore", message="left dense")
    torch.manual_seed(0)
    results = Results(arguments)
    shapes = SHAPES[2:4] if arguments.quick else SHAPES
    with torch.inference_mode():
        for name in FORMATS:
            for shape in shapes:
                for batch in (1, 8):
                    layer(results, shape, batch, name)
        for name in FORMATS:
            for batch in (1,) if arguments.quick else (1, 8):
                network(results, batch, name)
    results.write(isa=arguments.isa)


if __name__ == "__main__":
    main()
