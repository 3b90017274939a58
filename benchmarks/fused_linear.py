"""The fused linear against F.linear, forward, batch by batch.

Weights are Gaussian; each run uses another copy of its weight, so that it comes from memory as in a model. The floor is
the larger of two times that this machine shows in the same process: the multiply-adds at the rate of a float32 product,
and the packed bytes at the rate of a plain read.

Run: python benchmarks/fused_linear.py [--quick] [--json FILE]
"""

from __future__ import annotations

import infold
import torch
import torch.nn.functional as F
from harness import Results, Run, interleaved_medians, machine_rates, parse_arguments, rotate
from infold.nn import FusedDecompressLinear
from torch import nn

#: bits a weight of a dense peer's dtype
DENSE = {"F.linear float32": torch.float32, "F.linear bfloat16": torch.bfloat16, "F.linear float16": torch.float16}
CONFIGS = {
    "lossless": infold.FusedConfig("lossless"),
    "ecsq 4 bits": infold.FusedConfig("ecsq", bits=4),
    "int8": infold.FusedConfig("int8"),
}


def dense_run(weights: list[torch.Tensor], x: torch.Tensor) -> Run:
    return rotate(lambda index: lambda: F.linear(x, weights[index]), len(weights))


def packed_run(modules: list[FusedDecompressLinear], x: torch.Tensor) -> Run:
    return rotate(lambda index: lambda: modules[index](x), len(modules))


def int8_peer(weights: list[torch.Tensor], x: torch.Tensor) -> Run:
    """PyTorch's own weight-only int8 product, bfloat16 activations."""
    scales = [(weight.abs().amax(1) / 127).bfloat16() for weight in weights]
    codes = [(w / s.float().unsqueeze(1)).round().to(torch.int8) for w, s in zip(weights, scales, strict=True)]
    x = x.bfloat16()

    def make(index: int) -> Run:
        return lambda: torch._weight_int8pack_mm(x, codes[index], scales[index])

    return rotate(make, len(weights))


def main() -> None:
    arguments = parse_arguments(__doc__)
    shapes = [(1024, 1024)] if arguments.quick else [(4096, 4096), (11008, 4096)]
    seconds = 0.1 if arguments.quick else arguments.seconds
    results = Results(arguments)
    multiplies, bytes_read = machine_rates()
    torch.manual_seed(0)
    for rows, cols in shapes:
        copies = 4 if arguments.quick else max(2, 128_000_000 // (rows * cols * 2))
        weights = [0.02 * torch.randn(rows, cols) for _ in range(copies)]
        halves = [weight.bfloat16() for weight in weights]
        packed: dict[str, list[FusedDecompressLinear]] = {}
        for name, config in CONFIGS.items():
            packed[name] = []
            for weight in halves:
                dense = nn.Linear(cols, rows, bias=False)
                dense.weight = nn.Parameter(weight)
                packed[name].append(FusedDecompressLinear.from_linear(dense, config))
        for batch in (1, 8, 32):
            x = torch.randn(batch, cols)
            runs: dict[str, Run] = {}
            for name, modules in packed.items():
                runs[name] = packed_run(modules, x)
            for peer, dtype in DENSE.items():
                dense_weights = weights if dtype == torch.float32 else [weight.to(dtype) for weight in weights]
                runs[peer] = dense_run(dense_weights, x.to(dtype))
            reason = ""
            try:
                int8 = int8_peer(weights, x)
                int8()
                runs["_weight_int8pack_mm"] = int8
            except (RuntimeError, AttributeError) as error:
                reason = str(error).splitlines()[0]
            with torch.inference_mode():
                medians = interleaved_medians(runs, seconds)
            for name, modules in packed.items():
                nbytes = modules[0].packed.nbytes
                floor = max(batch * rows * cols / multiplies, nbytes / bytes_read)
                for peer in [*DENSE, "_weight_int8pack_mm"]:
                    case = f"{name}, {rows}x{cols}, batch {batch}"
                    note = "" if peer in medians else f"did not run: {reason}"
                    results.add(case, peer, medians[name], medians.get(peer), floor_ms=floor, note=note)
    results.write()


if __name__ == "__main__":
    main()
