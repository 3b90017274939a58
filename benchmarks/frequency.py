"""Block-circulant layers against dense ones, against the same layer composed in PyTorch, and against PEFT's C3A; layers
of sparse spectra against dense ones and PEFT's FourierFT.

Square layers without a bias, float32 where nothing else is said; "training" is forward and both gradients. Warm: each
peer runs eight times in its turn, so that what the others evict is read again once in eight. The compositions are the
same map: from `torch.fft`, with the weight's spectra computed before; and as three matrix products (real DFT, one
product for each frequency, inverse). C3A's layer adds a circulant map to a dense one; only its part is timed. The floor
is that of the multiply-adds of spectra and transforms at the rate that this machine shows for a matrix product, or of
the bytes of the weight, whichever takes longer.

FourierFT's layer adds the matrix of a sparse spectrum to a dense one; only its part is timed, which builds the matrix,
and ours has the same spectrum. These take turns one by one, for FourierFT's is long.

Run: python benchmarks/frequency.py [--quick] [--isa avx2] [--threads N] [--json FILE]
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from harness import Results, Run, interleaved_medians, machine_rates, parse_arguments
from infold import peft, spectral
from infold.nn import FrequencyLinear
from peft import FourierFTConfig
from peft.tuners.c3a.utils import BlockCircularConvolution
from peft.tuners.fourierft.layer import FourierFTLinear
from torch import Tensor, nn

#: By batch: against F.linear, and against the better composition, at 4096 and blocks of 64.
GOALS = {1: (60, 2.5), 16: (40, 2.5), 256: (14, 1.7)}
TRAINING_GOAL = 10.0
#: Times that a peer runs in its turn.
TURN = 8


def warm(runs: dict[str, Run]) -> dict[str, Run]:
    """Each run several times."""

    def repeat(run: Run) -> Run:
        def several() -> None:
            for _ in range(TURN):
                run()

        return several

    return {name: repeat(run) for name, run in runs.items()}


def from_fft(x: Tensor, spectra: Tensor, block: int) -> Tensor:
    """The product composed from torch.fft; ``spectra`` are (frequency, output block, input block)."""
    rows = x.shape[0]
    transformed = torch.fft.rfft(x.view(rows, -1, block)).permute(2, 1, 0)
    product = torch.bmm(spectra, transformed).permute(2, 1, 0)
    return torch.fft.irfft(product, block).reshape(rows, -1)


class Gemms:
    """The product as three matrix products, all of them real."""

    def __init__(self, layer: FrequencyLinear) -> None:
        block = layer.block
        transform = spectral.pack_spectrum(torch.eye(block, dtype=torch.float64)).T
        self.block, self.half = block, block // 2
        self.forward_matrix = transform.float().contiguous()
        scale = torch.full((block,), math.sqrt(block / 2), dtype=torch.float64)
        scale[[0, self.half]] = math.sqrt(block)
        self.inverse_matrix = (transform * scale[:, None]).float().contiguous()
        # Of each frequency pair [[re, -im], [im, re]]; frequency 0 and Nyquist, which stand alone, make up one.
        spectrum = layer.spectrum.detach()
        re, im = spectrum[..., : self.half], spectrum[..., self.half :]
        off = torch.stack([-im, im])
        off[..., 0] = 0
        low, high = re.clone(), re.clone()
        high[..., 0] = im[..., 0]
        top = torch.cat([low, off[0]], 1).permute(2, 0, 1)
        bottom = torch.cat([off[1], high], 1).permute(2, 0, 1)
        self.pairs = torch.cat([top, bottom], 1).transpose(1, 2).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        rows, half = x.shape[0], self.half
        transformed = x.view(-1, self.block) @ self.forward_matrix.T
        pairs = transformed.view(rows, -1, 2, half).permute(3, 0, 2, 1).reshape(half, rows, -1)
        product = torch.bmm(pairs, self.pairs).view(half, rows, 2, -1).permute(1, 3, 2, 0).reshape(-1, self.block)
        return (product @ self.inverse_matrix).view(rows, -1)


def layer_case(results: Results, rates: tuple[float, float], features: int, block: int, batch: int) -> None:
    torch.manual_seed(0)
    layer = FrequencyLinear(features, features, block, bias=False)
    blocks = spectral.unpack_spectrum(layer.spectrum.detach())
    spectra = torch.fft.rfft(blocks).permute(2, 0, 1).contiguous()
    gemms = Gemms(layer)
    dense = torch.randn(features, features) / math.sqrt(features)
    x = torch.randn(batch, features)
    half, x_half = dense.bfloat16(), x.bfloat16()
    c3a = blocks.contiguous()
    expected = layer(x).detach()
    for other in (from_fft(x, spectra, block), gemms(x)):
        torch.testing.assert_close(other, expected, rtol=1e-3, atol=1e-4)
    count = features // block
    operations = batch * (2 * count * count * block + 2 * features * block / 2)
    floor = max(operations / rates[0], layer.spectrum.numel() * 4 / rates[1])
    with torch.no_grad():
        runs: dict[str, Run] = {
            "ours": lambda: layer(x),
            "F.linear": lambda: F.linear(x, dense),
            "F.linear bfloat16": lambda: F.linear(x_half, half),
            "torch.fft": lambda: from_fft(x, spectra, block),
            "three GEMMs": lambda: gemms(x),
            "C3A": lambda: BlockCircularConvolution.apply(x, c3a),
        }
        medians = interleaved_medians(warm(runs), results.arguments.seconds / 3)
    report(results, f"d {features}, n {block}, batch {batch}, forward", (features, block, batch), medians, floor, False)

    weight = dense.clone().requires_grad_()
    variable = spectra.clone().requires_grad_()
    kernel = c3a.clone().requires_grad_()
    x = x.requires_grad_()
    g = torch.randn(batch, features)

    def step(run: Run) -> Run:
        return training_step(run, g, [x, weight, variable, kernel, layer.spectrum])

    runs = {
        "ours": step(lambda: layer(x)),
        "F.linear": step(lambda: F.linear(x, weight)),
        "torch.fft": step(lambda: from_fft(x, variable, block)),
        "C3A": step(lambda: BlockCircularConvolution.apply(x, kernel)),
    }
    medians = interleaved_medians(warm(runs), results.arguments.seconds / 3)
    case = f"d {features}, n {block}, batch {batch}, training"
    report(results, case, (features, block, batch), medians, 3 * floor, True)


def sparse_case(results: Results, rate: float, features: int, count: int, batch: int) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(features, features, bias=False)
    config = FourierFTConfig(n_frequency=count, init_weights=False)
    theirs = FourierFTLinear(dense, "default", config=config, n_frequency=count)
    spectrum = theirs.fourierft_spectrum["default"]
    ours = peft.from_fourierft(spectrum, features, features)
    x, g = torch.randn(batch, features), torch.randn(batch, features)
    expected = F.linear(x, theirs.get_delta_weight("default"))
    torch.testing.assert_close(ours(x), expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))
    # Of a complex transform of n: 5 n log2(n) operations, half as many multiply-adds, and half of them for real ones.
    floor = batch * (4 * count + 2 * 1.25 * features * math.log2(features)) / rate
    runs: dict[str, Run] = {
        "ours": lambda: ours(x),
        "F.linear": lambda: F.linear(x, dense.weight),
        "FourierFT": lambda: F.linear(x, theirs.get_delta_weight("default")),
    }
    case = f"d {features}, {count} coefficients, batch {batch}"
    with torch.no_grad():
        medians = interleaved_medians(runs, results.arguments.seconds / 3)
    for peer in ("F.linear", "FourierFT"):
        results.add(f"{case}, forward", peer, medians["ours"], medians[peer], floor_ms=floor)
    leaves = [x.requires_grad_(), dense.weight.requires_grad_(), spectrum, ours.coefficients]
    training = {name: training_step(run, g, leaves) for name, run in runs.items()}
    medians = interleaved_medians(training, results.arguments.seconds / 3)
    for peer in ("F.linear", "FourierFT"):
        results.add(f"{case}, training", peer, medians["ours"], medians[peer], floor_ms=3 * floor)


def training_step(run: Run, gradient: Tensor, leaves: list[Tensor]) -> Run:
    """Forward and backward."""

    def whole() -> None:
        y = run()
        assert isinstance(y, Tensor)
        y.backward(gradient)
        for tensor in leaves:
            tensor.grad = None

    return whole


def report(
    results: Results,
    case: str,
    shape: tuple[int, int, int],
    medians: dict[str, float],
    floor: float,
    training: bool,
) -> None:
    features, block, batch = shape
    has_goals = (features, block) == (4096, 64)
    composed = min((medians[name], name) for name in ("torch.fft", "three GEMMs") if name in medians)[1]
    for peer, time in medians.items():
        if peer == "ours":
            continue
        goal = None
        if has_goals and peer == "F.linear":
            goal = TRAINING_GOAL if training else GOALS[batch][0]
        elif has_goals and peer == composed and not training:
            goal = GOALS[batch][1]
        elif has_goals and peer == "C3A":
            goal = 10.0
        results.add(case, peer, medians["ours"] / TURN, time / TURN, goal=goal, floor_ms=floor)


def main() -> None:
    arguments = parse_arguments(__doc__)
    results = Results(arguments)
    rates = machine_rates()
    cases = [(features, block) for features in (1024, 4096) for block in (16, 64, 256)]
    for features, block in [(1024, 64)] if arguments.quick else cases:
        for batch in (1, 16) if arguments.quick else (1, 16, 256):
            layer_case(results, rates, features, block, batch)
    for features in (1024,) if arguments.quick else (1024, 4096):
        for count in (1000,) if arguments.quick else (1000, features * features // 100):
            for batch in (1, 16) if arguments.quick else (1, 16, 256):
                sparse_case(results, rates[0], features, count, batch)
    results.write(isa=arguments.isa)


if __name__ == "__main__":
    main()
