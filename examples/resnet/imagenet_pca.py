"""PCA at ImageNet's input size, 224 × 224 × 3 = 150,528 dimensions, in blocks: its memory, its time, what it explains.

Images are generated a block at a time, with the statistics of natural ones: amplitudes fall as 1/f, phases are random,
and colour channels are correlated (one of brightness, two weaker ones of opponent colours). They have no edges and no
objects, so of real images the same components may explain another share.

Run: python examples/resnet/imagenet_pca.py --size 224 --images 8192 --batch 1024 --components 1024
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Iterator

import torch
from infold.tokenizers import PCA
from torch import Tensor

IMAGENET = 1_200_000


def images(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 3, size, size) bytes."""
    rows, columns = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)
    frequency = (rows.square() + columns.square()).sqrt()
    frequency[0, 0] = 1 / size
    # Noise of all phases; unit amplitudes, then 1/f.
    spectrum = torch.fft.rfft2(torch.randn(count, 3, size, size, generator=generator))
    field = torch.fft.irfft2(spectrum / spectrum.abs().clamp_min(1e-12) / frequency, s=(size, size))
    field = field / field.std(dim=(2, 3), keepdim=True)
    # Brightness and two opponent channels, of falling power (Ruderman et al. 1998).
    mixing = torch.tensor([[1, 0.25, 0.1], [1, 0, -0.2], [1, -0.25, 0.1]])
    return (128 + 48 * torch.einsum("rc,nchw->nrhw", mixing, field)).clamp(0, 255).to(torch.uint8)


def blocks(count: int, batch: int, size: int, seed: int) -> Iterator[Tensor]:
    """Flattened images (batch, 3 · size²)."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, batch):
        parts = [min(64, batch - done) for done in range(0, min(batch, count - start), 64)]
        yield torch.cat([images(part, size, generator).flatten(1) for part in parts])


def peak_rss() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def explained(pca: PCA, x: Tensor) -> float:
    """The share of the variance of x about the mean that components keep."""
    lost = total = 0.0
    for part in x.split(64):
        lost += float((part - pca.inverse_transform(pca.transform(part))).square().sum())
        total += float((part - pca.mean_).square().sum())
    return 1 - lost / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=1024, help="that are fitted")
    parser.add_argument("--batch", type=int, default=256, help="images in a block")
    parser.add_argument("--components", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=256, help="other images, to see what is explained")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.images % arguments.batch or arguments.images < 3 * arguments.batch:
        parser.error("--images: expected a multiple of --batch, three blocks or more")
    features = 3 * arguments.size**2
    print(f"{features:,} dimensions to {arguments.components:,} components, blocks of {arguments.batch:,} images")

    pca, before, taken = PCA(arguments.components, method="blocks"), peak_rss(), []
    for number, block in enumerate(blocks(arguments.images, arguments.batch, arguments.size, 0)):
        begun = time.perf_counter()
        pca.partial_fit(block)
        taken.append(time.perf_counter() - begun)
        print(f"block {number + 1}: {taken[-1]:.1f} s, peak {peak_rss() / 1e9:.2f} GB", flush=True)
    begun = time.perf_counter()
    components = pca.components_
    print(f"components {components.nbytes / 1e6:.0f} MB, after the last block in {time.perf_counter() - begun:.1f} s")
    slope = statistics.mean(taken[1:]) / arguments.batch
    peak = peak_rss()
    spread = f"{min(taken[1:]):.1f} to {max(taken[1:]):.1f} s"
    print(f"steady state {1000 * slope:.2f} s for 1,000 images (blocks after the first: {spread})")
    print(
        f"extrapolated to {IMAGENET:,} images: {slope * IMAGENET / 3600:.2f} h, reading and decoding them not included"
    )
    print(
        f"peak memory {peak / 1e9:.2f} GB, of which {before / 1e9:.2f} GB before the first block; images are generated"
    )
    print(f"all images would be {IMAGENET * features / 1e9:.0f} GB of bytes")
    (new,) = blocks(arguments.held_out, arguments.held_out, arguments.size, 1)
    fitted, unseen = explained(pca, block), explained(pca, new)
    print(f"explained variance: {unseen:.2%} of {len(new)} images held out, {fitted:.2%} of the last block fitted")


if __name__ == "__main__":
    main()
