"""Components of time × space against plain components of flattened clips, at equal stored bytes.

Clips are generated: textured blobs and gratings that move before a background of 1/f amplitudes. Both kinds are fitted
on the first clips and store others, which they have not seen: a code for each, the components and the mean, in float32.
Plain PCA has more components to learn than there are clips; separable PCA loses what does not factorise. At each number
of bytes each has the ranks that promise most on the clips that it was fitted on. The last column counts codes alone:
plain PCA with as many values a clip, its components for free, as if there were no end of clips to store.

Run: python examples/video_pca.py [--quick] [--fitted N] [--stored N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from infold.tokenizers import PCA, SeparablePCA
from torch import Tensor


def clips(count: int, frames: int, size: int, seed: int) -> Tensor:
    """(count, frames, size, size), float32: background, two blobs and one windowed grating a clip, and noise."""
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    time_ = torch.arange(frames).float()[:, None, None]
    y, x = torch.meshgrid(*[torch.arange(size).float()] * 2, indexing="ij")
    frequency = torch.fft.fftfreq(size)
    radius = (frequency[:, None].square() + frequency.square()).sqrt().clamp_min(1 / size)
    white = torch.fft.fft2(torch.randn(count, size, size, generator=random))
    background = torch.fft.ifft2(white / radius).real
    result = (background / background.std(dim=(1, 2), keepdim=True))[:, None].repeat(1, frames, 1, 1)
    for kind in ("blob", "blob", "grating"):
        start, speed = uniform(0.2 * size, 0.8 * size, 2), uniform(-0.4, 0.4, 2) * size / frames
        centre = (start[:, :, None, None, None] + speed[:, :, None, None, None] * time_).unbind(1)
        angle, wavelength, phase, width = (
            v[:, None, None, None]
            for v in (uniform(0, 3.14), uniform(size / 6, size / 2), uniform(0, 6.28), uniform(size / 10, size / 5))
        )
        dx, dy = x - centre[0], y - centre[1]
        window = (-(dx.square() + dy.square()) / (2 * width.square())).exp()
        wave = (6.283 / wavelength * (angle.cos() * dx + angle.sin() * dy) + phase).cos()
        # A blob carries its texture along; a grating drifts inside its window.
        drift = (6.283 / wavelength * (angle.cos() * x + angle.sin() * y) + phase + 0.4 * time_).cos()
        result += 3 * window * (1 + 0.5 * wave if kind == "blob" else drift)
    return result + 0.05 * torch.randn(result.shape, generator=random)


def ranks_within(budget: float, stored: int, variances: list[Tensor]) -> tuple[int, int] | None:
    """The ranks (time, space) of at most ``budget`` values in all that lose least by the bound of `SeparablePCA`."""
    frames, pixels = map(len, variances)
    lost = [1 - v.double().cumsum(0) / v.double().sum() for v in variances]
    best = None
    for temporal in range(1, frames + 1):
        rest = budget - frames * pixels - frames * temporal
        spatial = min(int(rest // (pixels + stored * temporal)), pixels)
        if spatial >= 1:
            bound = float(lost[0][temporal - 1] + lost[1][spatial - 1])
            best = min(best or (bound, (temporal, spatial)), (bound, (temporal, spatial)))
    return best and best[1]


def explained(pca: PCA, components: int, x: Tensor) -> float:
    """The share of the variance of x (samples, features) about the mean that the first components keep."""
    centred = x - pca.mean_
    return float((centred @ pca.components_[:components].T).square().sum() / centred.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small clips, few of them")
    parser.add_argument("--fitted", type=int, help="clips that components are fitted on")
    parser.add_argument("--stored", type=int, help="clips that are stored")
    parser.add_argument("--out", type=Path, help="folder for video_pca.png")
    arguments = parser.parse_args()
    frames, size = (8, 16) if arguments.quick else (16, 32)
    fitted = arguments.fitted or (40 if arguments.quick else 400)
    stored = arguments.stored or (100 if arguments.quick else 1000)
    seen, new = clips(fitted, frames, size, 0), clips(stored, frames, size, 1)
    features = frames * size * size

    begun = time.perf_counter()
    plain = PCA(min(fitted - 1, features), method="exact").fit(seen.flatten(1))
    plain_time = time.perf_counter() - begun
    begun = time.perf_counter()
    modes = ((0,), (1, 2))
    whole = SeparablePCA((frames, size * size), modes=modes).fit(seen)
    print(f"{fitted} clips of {frames} × {size} × {size} fitted: plain {plain_time:.1f} s,", end=" ")
    print(f"separable {time.perf_counter() - begun:.1f} s; {stored} others stored")
    print(
        "| stored | plain: k | explained, % (fitted) | separable: ranks | explained, % (fitted) | plain, codes alone |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    rows = []
    for share in (0.004, 0.008, 0.016, 0.03, 0.06, 0.12, 0.25):
        budget = share * stored * features
        k = min(int((budget - features) // (features + stored)), plain.n_components_)
        ranks = ranks_within(budget, stored, whole.mode_variance_)
        if k < 1 or ranks is None:
            continue
        separable = SeparablePCA(ranks, modes=modes).fit(seen)
        numbers = [explained(plain, k, x.flatten(1)) for x in (new, seen)]
        numbers += [separable.explained_variance_ratio(x) for x in (new, seen)]
        rows.append((share, numbers))
        free = min(ranks[0] * ranks[1], plain.n_components_)
        cells = [f"{100 * new_:.1f} ({100 * seen_:.1f})" for new_, seen_ in (numbers[:2], numbers[2:])]
        alone = f"{100 * explained(plain, free, new.flatten(1)):.1f} (k = {free})"
        print(f"| {share:.1%} | {k} | {cells[0]} | {ranks[0]} × {ranks[1]} | {cells[1]} | {alone} |")
    if arguments.out:
        plot(rows, arguments.out / "video_pca.png")


def plot(rows: list[tuple[float, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    names = ("plain, new clips", "plain, fitted", "separable, new clips", "separable, fitted")
    for n, name in enumerate(names):
        style = {"color": f"C{n // 2}", "linestyle": "--" if n % 2 else "-", "label": name}
        axes.plot([100 * share for share, _ in rows], [100 * numbers[n] for _, numbers in rows], marker=".", **style)
    axes.set(xscale="log", xlabel="stored bytes, % of the clips", ylabel="variance explained, %")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
