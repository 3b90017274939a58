"""Signal-to-noise of log8 and of other formats of a byte for each coefficient, all on the same numbers.

Every format has a scale of 16 bits for each block, bfloat16 but for log8, and rounds to the nearest of its values. The
others' scale is the block's largest magnitude, as they are published; their blocks are those of the row, log8's always
64. "mu-law, absmax" is log8 without its search of scales. The dynamic tree is bitsandbytes' signed 8-bit map. Run:
python benchmarks/log8.py [--quick] [--json FILE]; ``--search`` looks for curves instead.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import infold
import torch
from harness import Results, interleaved_medians, parse_arguments
from torch import Tensor

#: The library's curves.
MU = (1, 2, 4, 8, 16, 32, 64, 256)
#: What --search chooses from.
CANDIDATES = (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 50, 64, 80, 100, 128, 256, 500, 1000, 2000)


def gaussian(count: int) -> Tensor:
    return torch.randn(count, dtype=torch.float64)


def student(count: int) -> Tensor:
    z = torch.randn(4, count, dtype=torch.float64)
    return z[0] / (z[1:].square().sum(0) / 3).sqrt()


def lognormal(count: int) -> Tensor:
    z = torch.randn(2, count, dtype=torch.float64)
    return z[0].sign() * (2 * z[1]).exp()


def pink(count: int) -> Tensor:
    return (torch.randn(count // 1024, 1024, dtype=torch.float64) / torch.arange(1, 1025)).flatten()


#: name: (draw, block of the other formats)
DATA: dict[str, tuple[Callable[[int], Tensor], int]] = {
    "Gaussian, block 64": (gaussian, 64),
    "Student-t3, block 1024": (student, 1024),
    "lognormal sigma 2, block 64": (lognormal, 64),
    "1/f, block 1024": (pink, 1024),
    # The same at equal bits.
    "Student-t3, block 64": (student, 64),
    "1/f, block 64": (pink, 64),
}


def mu_law(mu: float) -> Tensor:
    """Codes 0 to 127 of a mu-law curve."""
    steps = torch.arange(128, dtype=torch.float64) / 127
    return ((1 + mu) ** steps - 1) / mu


def eight_octaves() -> Tensor:
    """Zero, and 127 magnitudes in equal ratios over eight octaves."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), 2 ** torch.linspace(-8, 0, 127, dtype=torch.float64)])


def dynamic_tree() -> Tensor:
    """All values of the signed dynamic map: zero, one, and for each of seven decades the middles of equal intervals
    between its ends, twice as many as in the decade below, both signs.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float64)
        middles = 10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles]
    return torch.cat(values).sort().values


def fp8() -> Tensor:
    """Every finite value of e4m3, the largest one."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return values[values.isfinite()].unique() / 448


def symmetric(levels: Tensor) -> Tensor:
    return torch.cat([-levels[1:].flip(0), levels])


def nearest(x: Tensor, values: Tensor) -> Tensor:
    return values[torch.bucketize(x, (values[1:] + values[:-1]) / 2)]


def by_absmax(x: Tensor, values: Tensor, block: int) -> Tensor:
    """Each block in units of its largest magnitude, which is kept in bfloat16."""
    blocks = x.view(-1, block)
    scale = blocks.abs().amax(1, keepdim=True).bfloat16().double()
    return (nearest(blocks / scale, values) * scale).flatten()


def adaptive(x: Tensor) -> Tensor:
    """log8's curves and blocks, the best curve for the scale that is next above the largest magnitude."""
    blocks = x.view(-1, 64)
    mantissa, exponent = torch.frexp(blocks.abs().amax(1, keepdim=True))
    scale = torch.ldexp((mantissa * 64).ceil() / 64, exponent)
    tries = torch.stack([nearest(blocks / scale, symmetric(mu_law(mu))) * scale for mu in MU])
    best = (tries - blocks).square().sum(2, keepdim=True).argmin(0, keepdim=True)
    return tries.take_along_dim(best, 0).flatten()


def log8(x: Tensor) -> Tensor:
    return infold.log8_decode(infold.log8_encode(x), torch.float64)


#: name: (decoded from x and the row's block, whether its blocks are always 64)
FORMATS: dict[str, tuple[Callable[[Tensor, int], Tensor], bool]] = {
    "int8 absmax": (lambda x, block: by_absmax(x, torch.arange(-127, 128).double() / 127, block), False),
    "fp8 e4m3": (lambda x, block: by_absmax(x, fp8(), block), False),
    "dynamic tree": (lambda x, block: by_absmax(x, dynamic_tree(), block), False),
    "8 octaves": (lambda x, block: by_absmax(x, symmetric(eight_octaves()), block), False),
    "mu-law 255": (lambda x, block: by_absmax(x, symmetric(mu_law(255)), block), False),
    "mu-law, absmax": (lambda x, block: adaptive(x), True),
    "log8": (lambda x, block: log8(x), True),
}


def decibels(x: Tensor, decoded: Tensor, block: int) -> tuple[float, float]:
    """Of all numbers together, and the mean over blocks."""
    signal, noise = x.view(-1, block).square().sum(1), (x - decoded).view(-1, block).square().sum(1)
    return float(10 * (signal.sum() / noise.sum()).log10()), float(10 * (signal / noise).log10().mean())


def search() -> None:
    """Eight curves by coordinate descent, for the mean over the data of the mean over blocks."""
    errors = []
    for draw in (gaussian, student, lognormal, pink):
        blocks = draw(1 << 15).view(-1, 64)
        mantissa, exponent = torch.frexp(blocks.abs().amax(1, keepdim=True))
        # The scales that the encoder tries.
        scales = torch.ldexp(((mantissa * 64).ceil() + torch.arange(-1, 6)) / 64, exponent)[..., None]
        u = blocks[:, None] / scales
        tries = [((nearest(u, symmetric(mu_law(mu))) - u) * scales).square().sum(2).amin(1) for mu in CANDIDATES]
        errors.append(torch.stack(tries) / blocks.square().sum(1))

    def score(chosen: tuple[float, ...]) -> float:
        rows = [CANDIDATES.index(mu) for mu in chosen]
        return statistics.mean(float(-10 * error[rows].amin(0).log10().mean()) for error in errors)

    chosen: tuple[float, ...] = MU
    print(f"{score(chosen):.3f} dB  {chosen}, the library's")
    for _ in range(3):
        for place in range(8):
            others = chosen[:place] + chosen[place + 1 :]
            chosen = max(((*others, mu) for mu in CANDIDATES if mu not in others), key=score)
        print(f"{score(chosen):.3f} dB  {tuple(sorted(chosen))}")
    print(f"{score(CANDIDATES):.3f} dB  all {len(CANDIDATES)} candidates")


def main() -> None:
    if "--search" in sys.argv:
        torch.manual_seed(0)
        search()
        return
    arguments = parse_arguments(__doc__)
    count, seeds = (1 << 15, 3) if arguments.quick else (1 << 17, 9)
    table = []
    print(f"dB, medians of {seeds} seeds; in brackets the mean over blocks; then bits a coefficient\n")
    for name, (draw, block) in DATA.items():
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMATS}
        for seed in range(seeds):
            torch.manual_seed(seed)
            x = draw(count).float().double()
            for peer, (code, _) in FORMATS.items():
                found[peer].append(decibels(x, code(x, block), block))
        print(name)
        for peer, (_, own_blocks) in FORMATS.items():
            whole, mean = (statistics.median(values) for values in zip(*found[peer], strict=True))
            bits = 8 + 16 / (64 if own_blocks else block)
            table.append({"data": name, "format": peer, "snr_db": whole, "mean_block_snr_db": mean, "bits": bits})
            print(f"  {peer:<16} {whole:6.2f}  ({mean:6.2f})  {bits:.3f}")
    x = gaussian(1 << 20).float()
    encoded = infold.log8_encode(x)
    out = {"encode": lambda: infold.log8_encode(x), "decode": lambda: infold.log8_decode(encoded)}
    rates = {name: x.nbytes / 1e3 / ms for name, ms in interleaved_medians(out, arguments.seconds).items()}
    print("\nMB/s of float32, " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
    Results(arguments).write(seeds=seeds, coefficients=count, table=table, megabytes_per_second=rates)


if __name__ == "__main__":
    main()
