"""The block-circulant product on a GPU against cuBLAS and two compositions in PyTorch; for gpu_check.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from infold._library import ops
from infold.spectral import pack_spectrum
from torch import Tensor

Sides = dict[str, list[Callable[[], object]]]

#: (features, block).
SHAPES = ((4096, 64), (4096, 32), (4096, 128), (1024, 64))
BATCHES = (1, 4, 16, 32, 64, 256, 1024, 4096)
#: Times as fast, at 4096 features in blocks of 64.
GOALS = {"cuBLAS": {1: 4.0, 4096: 4.0}, "torch.fft": dict.fromkeys(BATCHES, 5.0)}


def by_transforms(x: Tensor, spectra: Tensor) -> Tensor:
    """By torch.fft, of complex spectra (frequency, inputs, outputs)."""
    n = 2 * (spectra.shape[0] - 1)
    values = x if x.dtype == torch.float64 else x.float()
    inputs = torch.fft.rfft(values.unflatten(1, (-1, n))).permute(2, 0, 1)
    return torch.fft.irfft((inputs @ spectra).permute(1, 2, 0), n).flatten(1).to(x.dtype)


def by_products(x: Tensor, forward: Tensor, spectra: Tensor, back: Tensor) -> Tensor:
    """By three matrix products in x's dtype, of spectra (frequency, 2 · inputs, 2 · outputs): real parts first."""
    n, count = forward.shape
    inputs = (x.view(-1, n) @ forward).view(len(x), -1, count // 2, 2).permute(2, 0, 3, 1).flatten(2)
    outputs = (inputs @ spectra).unflatten(2, (2, -1)).permute(1, 3, 0, 2).flatten(2)
    return (outputs @ back).flatten(1)


def operands(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What `by_products` takes, for blocks (outputs, inputs, n) in time."""
    n = blocks.shape[-1]
    spectra = torch.fft.rfft(blocks).permute(2, 1, 0)
    re, im = spectra.real, spectra.imag
    products = torch.cat([torch.cat([re, im], 2), torch.cat([-im, re], 2)], 1)
    basis = torch.view_as_real(torch.fft.rfft(torch.eye(n, device=blocks.device))).flatten(1)
    weights = torch.full((n // 2 + 1, 1), 2.0, device=blocks.device)
    weights[0] = weights[-1] = 1
    back = basis * (weights.expand(-1, 2).flatten() / n)
    return basis.to(dtype), products.to(dtype).contiguous(), back.T.to(dtype).contiguous()


def rates(
    rows_out: list[dict[str, Any]], interleaved: Callable[[Sides], dict[str, float]], copies_bytes: float
) -> None:
    """Each shape and batch, weights out of the cache."""
    for features, n in SHAPES:
        blocks = torch.randn(features // n, features // n, n, device="cuda") / features**0.5
        packed = pack_spectrum(blocks)
        count = min(100, int(copies_bytes / packed.nbytes) + 1)
        own = [packed.clone() for _ in range(count)]
        spectra = [torch.fft.rfft(blocks).permute(2, 1, 0).contiguous() for _ in range(count)]
        products = [operands(blocks, torch.bfloat16) for _ in range(count)]
        dense = (torch.randn(features, features, device="cuda") / features**0.5).bfloat16()
        denses = [dense.clone() for _ in range(int(copies_bytes / dense.nbytes) + 1)]
        for batch in BATCHES:
            x = torch.randn(batch, features, device="cuda").bfloat16()
            exact = by_transforms(x.double(), torch.fft.rfft(blocks.double()).permute(2, 1, 0))
            runs: dict[str, Callable[..., Tensor]] = {
                "ours": lambda w, x=x, features=features: ops.frequency_linear(x, w, None, features),
                "torch.fft": lambda w, x=x: by_transforms(x, w),
                "three products": lambda w, x=x: by_products(x, *w),
                "cuBLAS": lambda w, x=x: F.linear(x, w),
            }
            weights = {"ours": own, "torch.fft": spectra, "three products": products, "cuBLAS": denses}
            few = 8 if batch > 256 else 100
            sides: Sides = {}
            errors = {}
            for name, run in runs.items():
                sides[name] = [lambda w=w, run=run: run(w) for w in weights[name][:few]]  # type: ignore[misc]
                if name != "cuBLAS":
                    errors[name] = ((run(weights[name][0]).double() - exact).norm() / exact.norm()).item()
            medians = interleaved(sides)
            ratios = {name: medians[name] / medians["ours"] for name in medians if name != "ours"}
            case = f"circulant {features}, blocks of {n}, batch {batch}"
            print(
                f"{case}: us "
                + ", ".join(f"{name} {microseconds:.2f}" for name, microseconds in medians.items())
                + "; times as fast "
                + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
                + "; errors "
                + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()),
                flush=True,
            )
            goals = (
                {name: by_batch.get(batch) for name, by_batch in GOALS.items()} if (features, n) == SHAPES[0] else {}
            )
            row = {"case": case, "microseconds": medians, "ratios": ratios, "errors": errors, "goals": goals}
            rows_out.append(row)
        del own, spectra, products, denses
        torch.cuda.empty_cache()
