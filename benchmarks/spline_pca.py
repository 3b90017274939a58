"""PCA against scikit-learn's and PyTorch's: MNIST to 64 components, and 150,528 features to 1,024 in bounded memory.

    python benchmarks/spline_pca.py --data FOLDER [--large] [--json FILE]

Each run fits 60,000x784 and projects it. All run in turn in one process, those that take seconds less often.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.decomposition
import torch
from harness import Results, parse_arguments
from infold.tokenizers import PCA
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import mnist

COMPONENTS = 64
#: Of the large case: features, components and the image's shape.
FEATURES, MANY, SHAPE = 150_528, 1024, (3, 224, 224)
#: The goals of peers.
GOALS = {"IncrementalPCA": 20.0, "PCA covariance_eigh": 1.0}
#: Rounds of every run, and of those that take longer than this many milliseconds.
SLOW_MS = 2000.0

Fit = Callable[[], object]


def load_images(folder: Path) -> Tensor:
    """MNIST's training images (n, 784), uint8."""
    standardised = mnist.load(folder, "train").images
    return ((standardised * 0.3081 + 0.1307) * 255).round().to(torch.uint8)


def fits(images: Tensor) -> dict[str, Fit]:
    """Every fit with the projection of all that it fitted; each returns its components as (k, d)."""
    floats = images.float() / 255
    array = floats.numpy()

    def ours(x: Tensor, **options: Any) -> Fit:
        def run() -> Tensor:
            pca = PCA(COMPONENTS, **options).fit(x)
            pca.transform(x)
            return pca.components_

        return run

    def theirs(make: Callable[[], Any]) -> Fit:
        def run() -> np.ndarray:
            pca = make()
            pca.fit_transform(array)
            return pca.components_

        return run

    def solver(name: str) -> Fit:
        # Seeded, so that runs are alike.
        return theirs(lambda: sklearn.decomposition.PCA(COMPONENTS, svd_solver=name, random_state=0))

    def lowrank() -> Tensor:
        torch.manual_seed(0)
        _, _, right = torch.pca_lowrank(floats, q=COMPONENTS)
        (floats - floats.mean(0)) @ right
        return right.T

    return {
        "ours uint8": ours(images),
        "ours float32": ours(floats),
        "ours blocks": ours(images, method="blocks"),
        "ours randomized": ours(floats, method="randomized"),
        "IncrementalPCA": theirs(lambda: sklearn.decomposition.IncrementalPCA(COMPONENTS)),
        "IncrementalPCA batch 6000": theirs(lambda: sklearn.decomposition.IncrementalPCA(COMPONENTS, batch_size=6000)),
        "PCA covariance_eigh": solver("covariance_eigh"),
        "PCA randomized": solver("randomized"),
        "PCA arpack": solver("arpack"),
        "PCA full": solver("full"),
        "torch.pca_lowrank": lowrank,
    }


def explained(images: Tensor, components: object) -> float:
    """The share of the variance of images / 255 along orthonormal components, in float64, with none of our code."""
    x = images.double() / 255
    x -= x.mean(0)
    scatter = x.T @ x
    # scikit-learn's arrays may run backwards, which tensors cannot.
    rows = torch.as_tensor(components.copy() if isinstance(components, np.ndarray) else components, dtype=torch.float64)
    return float((rows @ scatter * rows).sum() / scatter.trace())


def medians_in_turn(runs: Mapping[str, Fit], rounds: int, slow_rounds: int) -> dict[str, float]:
    """Median milliseconds, in turn: the harness's, but that slow runs have fewer rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    slow = set()
    # The first round warms up.
    for turn in range(rounds + 1):
        for name, run in runs.items():
            if name in slow and turn > slow_rounds:
                continue
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
            if times[name][0] > SLOW_MS:
                slow.add(name)
    return {name: statistics.median(values[1:] or values) for name, values in times.items()}


def mnist_cases(results: Results, images: Tensor, arguments: argparse.Namespace) -> None:
    """Ours against every peer, in one run."""
    runs = fits(images)
    if arguments.quick:
        runs.pop("PCA full")
    shares = {name: explained(images, run()) for name, run in runs.items()}
    medians = medians_in_turn(runs, 3 if arguments.quick else 9, 1 if arguments.quick else 3)
    case = f"fit and project {images.shape[0]}x{images.shape[1]} to {COMPONENTS}"
    for own in [name for name in runs if name.startswith("ours")]:
        for peer in [name for name in runs if not name.startswith("ours")]:
            results.add(
                f"{case}, {own.removeprefix('ours ')}",
                peer,
                medians[own],
                medians[peer],
                GOALS.get(peer) if own in ("ours uint8", "ours float32") else None,
                note=f"explains {shares[own]:.4%}, peer {shares[peer]:.4%}",
                explained=shares[own],
                peer_explained=shares[peer],
            )


def natural_images(batch: int, seed: int) -> Iterator[Tensor]:
    """Batches (batch, 150528) of uint8 noise whose amplitude falls as 1/f, as photographs' does."""
    generator = torch.Generator().manual_seed(seed)
    _, height, width = SHAPE
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / height
    while True:
        images = torch.empty(batch, *SHAPE, dtype=torch.uint8)
        for image in images:
            # Channels share most of what they show.
            noise = torch.randn(4, height, width, generator=generator)
            spectrum = torch.fft.rfft2(noise[:1] + 0.3 * noise[1:]) / frequency
            pixels = torch.fft.irfft2(spectrum, s=(height, width))
            image.copy_((127.5 + 50 * (pixels - pixels.mean()) / pixels.std()).clamp(0, 255).round())
        yield images.flatten(1)


def large(batches: int, batch: int, threads: int) -> None:
    """Fits in a process of its own; prints milliseconds an image, peak bytes, and the share explained."""
    torch.set_num_threads(threads)
    pca = PCA(MANY, method="blocks")
    source, taken = natural_images(batch, 0), []
    base = _peak()
    for _ in range(batches):
        images = next(source)
        start = time.perf_counter()
        pca.partial_fit(images)
        taken.append(time.perf_counter() - start)
    start = time.perf_counter()
    share = float(pca.explained_variance_ratio_.sum()) if pca.n_samples_seen_ >= MANY else float("nan")
    ready = time.perf_counter() - start
    held_out = next(source)
    back = pca.inverse_transform(pca.transform(held_out)).sub_(held_out).square_().sum(dtype=torch.float64)
    spread = held_out.double().sub_(pca.mean_).square_().sum()
    # The first batches fill the basis, so the last are those of a long fit.
    later = taken[-(-MANY // batch) :] or taken[-1:]
    print(1e3 * statistics.median(later) / batch, 1e3 * ready, _peak(), base, share, 1 - float(back / spread))


def _peak() -> int:
    """Bytes, of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def large_cases(results: Results, arguments: argparse.Namespace) -> None:
    """150,528 features; peak memory is the process's, its libraries included."""
    for batch, batches in [(256, 6)] if arguments.quick else [(256, 12), (1024, 4)]:
        command = [sys.executable, __file__, "--child", str(batches), str(batch), str(arguments.threads)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        per_image, ready, peak, base, share, held_out = map(float, run.stdout.split())
        results.add(
            f"blocks, {FEATURES} features to {MANY}, {batches} batches of {batch}: per image",
            "none",
            per_image,
            None,
            note=f"peak {peak / 1e9:.2f} GB (goal 4), {base / 1e9:.2f} before; explains {share:.2%}, "
            f"of held-out images {held_out:.2%}",
            peak_bytes=peak,
            base_bytes=base,
            components_ms=ready,
            goal_bytes=4e9,
            explained=share,
            explained_held_out=held_out,
        )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=mnist.SUBSET, help="MNIST's IDX files (else a subset of 1,000)")
    parser.add_argument("--large", action="store_true", help="also the fit of 150,528 features")


def main() -> None:
    """Runs the cases."""
    if sys.argv[1:2] == ["--child"]:
        batches, batch, threads = map(int, sys.argv[2:])
        return large(batches, batch, threads)
    arguments = parse_arguments(__doc__, _options)
    results = Results(arguments)
    mnist_cases(results, load_images(arguments.data), arguments)
    if arguments.large:
        large_cases(results, arguments)
    results.write(sklearn=sklearn.__version__)
    return None


if __name__ == "__main__":
    main()
