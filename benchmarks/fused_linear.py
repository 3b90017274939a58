"""The fused linear against F.linear: forward by batch, and the gradient of the input.

Weights are Gaussian. Each run uses another copy of its weight, of more than caches hold together: weights come
from memory, as in a model. The floor is the larger of two times that this machine shows in the same process: the
multiply-adds at the rate of a product in the input's dtype, and the packed bytes at the rate of a plain read.

`--isa avx2` holds Infold and its peers (ATen, oneDNN, MKL) to AVX2: the machine that the goals were set on had no more.
Without it every side uses what the CPU has, AMX included, and inputs come in bfloat16 too.

Run: python benchmarks/fused_linear.py [--quick] [--isa avx2] [--threads N] [--json FILE]
"""

from __future__ import annotations

import infold
import torch
import torch.nn.functional as F
from harness import Results, Run, interleaved_medians, machine_rates, parse_arguments, rotate
from infold._library import ops
from infold.packed import Packed, lay_out, pack, read_header

DENSE = {"F.linear float32": torch.float32, "F.linear bfloat16": torch.bfloat16, "F.linear float16": torch.float16}
FASTEST = "fastest dense"
CONFIGS = {
    "lossless": infold.FusedConfig("lossless"),
    "ecsq 4 bits": infold.FusedConfig("ecsq", bits=4),
    "int8": infold.FusedConfig("int8"),
    "int4 g128": infold.FusedConfig("int4"),
}
#: Times as fast as the peer, at batches 1, 8, 32 and two threads on AVX2.
GOALS = {
    ("lossless", "fast", "F.linear bfloat16"): (2.2, 6.5, 7.0),
    ("lossless", "fast", "F.linear float32"): (3.5, 3.8, 1.7),
    ("lossless", "compact", "F.linear bfloat16"): (0.6, 3.2, 5.5),
    ("ecsq 4 bits", "fast", "F.linear bfloat16"): (2.5, 6.3, 7.5),
    ("ecsq 4 bits", "compact", "F.linear bfloat16"): (0.8, 3.5, 6.2),
}
BATCHES = (1, 8, 32, 256)
#: Whether Infold multiplies bfloat16 as such here.
AMX = infold.build_info()["cpu"] == "amx"
#: Copies of a weight take this many bytes together: more than the caches keep.
COLD_BYTES = 400_000_000


def copies(nbytes: int, quick: bool) -> int:
    return 3 if quick else max(3, COLD_BYTES // nbytes)


def dense_runs(weight: torch.Tensor, quick: bool, product: object) -> Run:
    weights = [weight.clone() for _ in range(copies(weight.numel() * weight.element_size(), quick))]
    return rotate(lambda index: lambda: product(weights[index]), len(weights))  # type: ignore[operator]


def packed_runs(packed: Packed, quick: bool, product: object) -> Run:
    """`product(tensors and layout integers)` with another copy of the payload each time."""
    header = read_header(packed, "weight", verify=False)
    scales = packed.scales if packed.scales.numel() else None
    layout = (header.codec, header.layout, header.out_features, header.in_features, header.dtype)
    payloads = [packed.payload.clone() for _ in range(copies(packed.nbytes, quick))]

    def make(index: int) -> Run:
        weight = (payloads[index], packed.directory, packed.tables, scales)
        return lambda: product(weight, layout)  # type: ignore[operator]

    return rotate(make, len(payloads))


def int8_peer(weight: torch.Tensor, quick: bool, x: torch.Tensor) -> Run:
    """PyTorch's own weight-only int8 product, bfloat16 activations."""
    scales = (weight.abs().amax(1) / 127).bfloat16()
    codes = (weight / scales.float().unsqueeze(1)).round().to(torch.int8)
    x = x.bfloat16()
    return dense_runs(codes, quick, lambda codes: torch._weight_int8pack_mm(x, codes, scales))


def inputs(what: str, x: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The input in float32, and where Infold multiplies bfloat16 as such, in that too."""
    return [(what, x), *([(f"{what} of bfloat16", x.bfloat16())] if AMX else [])]


def main() -> None:
    arguments = parse_arguments(__doc__)
    shapes = [(1024, 1024)] if arguments.quick else [(4096, 4096), (11008, 4096)]
    seconds = 0.1 if arguments.quick else arguments.seconds
    results = Results(arguments)
    multiplies, bytes_read = machine_rates()
    bfloat16_multiplies = machine_rates(torch.bfloat16)[0] if AMX else None
    torch.manual_seed(0)
    goals_apply = arguments.threads == 2 and infold.build_info()["cpu"] == "avx2" and not arguments.quick
    for rows, cols in shapes:
        weight = 0.02 * torch.randn(rows, cols)
        packed: dict[tuple[str, str], Packed] = {}
        for name, config in CONFIGS.items():
            packed[name, "compact"] = pack(weight.bfloat16(), config)
            packed[name, "fast"] = lay_out(packed[name, "compact"], "fast")
        dense = {peer: weight.to(dtype) for peer, dtype in DENSE.items()}

        def report(
            what: str, batch: int, runs: dict[object, Run], rows: int = rows, cols: int = cols, packed: object = packed
        ) -> None:
            with torch.inference_mode():
                medians = interleaved_medians(runs, seconds)  # type: ignore[arg-type]
            peers = {peer: medians[peer] for peer in runs if isinstance(peer, str)}
            peers[FASTEST] = min(medians[peer] for peer in DENSE if peer in medians)
            for (name, layout), weight in packed.items():  # type: ignore[attr-defined]
                operations, nbytes = batch * rows * cols, weight.nbytes
                rate = bfloat16_multiplies if bfloat16_multiplies and what.endswith("bfloat16") else multiplies
                floor = max(operations / rate, nbytes / bytes_read)
                for peer, peer_ms in peers.items():
                    goal = GOALS.get((name, layout, peer)) if goals_apply and what == "forward" else None
                    index = BATCHES.index(batch)
                    results.add(
                        f"{what} {name} {layout}, {rows}x{cols}, batch {batch}",
                        peer,
                        medians[name, layout],  # type: ignore[index]
                        peer_ms,
                        goal=goal[index] if goal and index < len(goal) else None,
                        floor_ms=floor,
                        operations=operations,
                        bytes=nbytes,
                        bits=8 * nbytes / (rows * cols),
                    )

        for batch in BATCHES:
            x = torch.randn(batch, cols)
            peers: dict[object, Run] = {}
            for peer, dtype in DENSE.items():
                y = x.to(dtype)
                peers[peer] = dense_runs(dense[peer], arguments.quick, lambda weight, y=y: F.linear(y, weight))
            if batch <= 32:
                peers["_weight_int8pack_mm"] = int8_peer(weight, arguments.quick, x)
            for what, y in inputs("forward", x):
                runs: dict[object, Run] = {}
                for key, form in packed.items():
                    runs[key] = packed_runs(
                        form, arguments.quick, lambda weight, layout, y=y: ops.fused_linear(y, *weight, None, *layout)
                    )
                report(what, batch, runs | peers)
        for batch in (32, 256):
            gradient = torch.randn(batch, rows)
            for what, g in inputs("backward", gradient):
                runs = {}
                for key, form in packed.items():
                    runs[key] = packed_runs(
                        form, arguments.quick, lambda weight, layout, g=g: ops.fused_linear_dx(g, *weight, *layout)
                    )
                # Without AMX, PyTorch takes seconds for this product in bfloat16.
                for peer in ("F.linear float32", "F.linear bfloat16")[: 2 if g.dtype == torch.bfloat16 else 1]:
                    y = gradient.to(DENSE[peer])
                    runs[peer] = dense_runs(dense[peer], arguments.quick, lambda weight, y=y: y @ weight)
                report(what, batch, runs)
    results.write(
        multiply_adds_per_ms=multiplies,
        bfloat16_multiply_adds_per_ms=bfloat16_multiplies,
        bytes_read_per_ms=bytes_read,
    )


if __name__ == "__main__":
    main()
