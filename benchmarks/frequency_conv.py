"""Convolution by spectra against PyTorch's direct one, and against its composition of torch.fft operators.

The composition transforms the whole input, which for a valid convolution needs no padding: rfft of x and of the kernel,
a product (for channels that are not depthwise, einsum's), irfft and a view. Kernels of other lengths show where the
direct convolution is the quicker one.

Run: python benchmarks/frequency_conv.py [--quick] [--threads N] [--seconds S] [--json FILE]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import Results, Run, interleaved_medians, parse_arguments
from infold._library import ops
from torch import Tensor

#: channels, groups, batch: for inputs of 8192 and kernels of 1024
CASES = [(1, 1, 1), (1, 1, 8), (16, 16, 1), (16, 16, 8), (16, 1, 1), (16, 1, 8)]
#: kernels of other lengths, for the same inputs
KERNELS = [8, 16, 32, 64, 128, 256]


def composed(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """The valid convolution by torch.fft, for one group or depthwise."""
    length = x.shape[-1]
    spectrum, kernel = torch.fft.rfft(x), torch.fft.rfft(weight, length).conj()
    product = torch.einsum("bif,oif->bof", spectrum, kernel) if groups == 1 else spectrum * kernel[:, 0]
    return torch.fft.irfft(product, length)[..., : length - weight.shape[-1] + 1]


def case(
    results: Results, channels: int, groups: int, batch: int, kernel: int, goals: tuple[float, float] | None
) -> None:
    """One shape, forward."""
    x, weight = torch.randn(batch, channels, 8192), torch.randn(channels, channels // groups, kernel)
    runs: dict[str, Run] = {
        "ours": lambda: ops.frequency_conv(x, weight, None, [1], [0], [1], groups, False),
        "fft": lambda: composed(x, weight, groups),
        "direct": lambda: F.conv1d(x, weight, groups=groups),
    }
    torch.testing.assert_close(runs["ours"](), runs["fft"](), rtol=1e-3, atol=1e-3)
    medians = interleaved_medians(runs, results.arguments.seconds)
    kind = "depthwise" if groups > 1 else "dense"
    name = f"{channels} to {channels} {kind}, batch {batch}, 8192, kernel {kernel}"
    direct, fft = goals or (None, None)
    results.add(name, "conv1d", medians["ours"], medians["direct"], direct)
    results.add(name, "torch.fft", medians["ours"], medians["fft"], fft)


def training(results: Results, channels: int, groups: int, batch: int) -> None:
    """Forward and both gradients."""
    x = torch.randn(batch, channels, 8192, requires_grad=True)
    weight = torch.randn(channels, channels // groups, 1024, requires_grad=True)

    def step(y: Tensor) -> object:
        return torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    runs: dict[str, Run] = {
        "ours": lambda: step(ops.frequency_conv(x, weight, None, [1], [0], [1], groups, False)),
        "fft": lambda: step(composed(x, weight, groups)),
    }
    medians = interleaved_medians(runs, results.arguments.seconds)
    kind = "depthwise" if groups > 1 else "dense"
    name = f"{channels} to {channels} {kind}, batch {batch}, with gradients"
    results.add(name, "torch.fft", medians["ours"], medians["fft"])


def main() -> None:
    arguments = parse_arguments(__doc__)
    torch.manual_seed(0)
    results = Results(arguments)
    with torch.inference_mode():
        for channels, groups, batch in CASES[:3] if arguments.quick else CASES:
            case(results, channels, groups, batch, 1024, (5.0, 2.0))
        for kernel in [] if arguments.quick else KERNELS:
            case(results, 1, 1, 1, kernel, None)
            case(results, 16, 1, 1, kernel, None)
    for channels, groups, batch in [(1, 1, 1)] if arguments.quick else [(1, 1, 1), (16, 16, 4), (16, 1, 1)]:
        training(results, channels, groups, batch)
    results.write(isa=arguments.isa)


if __name__ == "__main__":
    main()
