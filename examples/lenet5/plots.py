"""The figures of the report."""

from __future__ import annotations

from infold.spectral.plot import figure
from results import Results


def draw(results: Results) -> None:
    """Every figure, as a PNG in the results' folder."""
    _variance(results)
    _components(results)


def _variance(results: Results) -> None:
    shares = [row["share"] for row in results.rows("variance")]
    cumulative = [100 * sum(shares[: n + 1]) for n in range(len(shares))]
    drawing = figure(6, 4)
    axes = drawing.add_subplot()
    axes.plot(range(1, len(shares) + 1), cumulative)
    for edge in (16, 48, 64):
        axes.axvline(edge, color="grey", linewidth=0.5)
    axes.set(xlabel="components", ylabel="variance of all pixels explained, %", ylim=(0, 100), title="MNIST, PCA")
    drawing.savefig(results.folder / "variance.png", dpi=120)


def _components(results: Results) -> None:
    images = results.tensors("variance", "pca", 0)["components"].view(-1, 28, 28)
    drawing = figure(8, 8)
    for number, image in enumerate(images):
        axes = drawing.add_subplot(8, 8, number + 1)
        limit = float(image.abs().max())
        axes.imshow(image.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
        axes.set_axis_off()
    drawing.savefig(results.folder / "components.png", dpi=120)
