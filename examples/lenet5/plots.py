"""The figures of the report."""

from __future__ import annotations

import torch.nn.functional as F
from infold.spectral.plot import figure
from infold.tokenizers import TrajectoryRecorder
from queries import names, of
from results import Results


def draw(results: Results) -> None:
    """Every figure, as a PNG in the results' folder."""
    _variance(results)
    _components(results)
    _accuracy(results)
    _curve(results)
    _trajectories(results)


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
    images = results.tensors("variance", "pca", 0)["components"]
    # One picture of 8 × 8, each component by its own largest entry, with a line between.
    scaled = F.pad((images / images.abs().amax(1, keepdim=True)).view(8, 8, 28, 28), (1, 1, 1, 1), value=float("nan"))
    drawing = figure(8, 8)
    axes = drawing.add_subplot()
    axes.imshow(scaled.transpose(1, 2).reshape(240, 240).numpy(), cmap="RdBu", vmin=-1, vmax=1)
    axes.set_axis_off()
    drawing.savefig(results.folder / "components.png", dpi=120)


def _accuracy(results: Results) -> None:
    drawing = figure(7, 4)
    axes = drawing.add_subplot()
    variants = names(results.rows("accuracy"), "variant")
    found = [of(results, "accuracy", "accuracy", 100, variant=variant) for variant in variants]
    bars = [0.0 if each.count == 1 else each.half for each in found]
    axes.errorbar([each.mean for each in found], range(len(found)), xerr=bars, fmt="o", capsize=3)
    axes.set_yticks(range(len(variants)), variants)
    axes.axvline(of(results, "accuracy", "accuracy", 100, variant="lenet5").mean, color="grey", linewidth=0.5)
    axes.set(xlabel="test accuracy, %, mean and 95% interval")
    drawing.savefig(results.folder / "accuracy.png", dpi=120)


def _curve(results: Results) -> None:
    rows = results.rows("curve")
    drawing = figure(10, 4)
    for place, (below, title) in enumerate((("nothing", "others dropped"), ("int4", "others in 4 bits")), 1):
        axes = drawing.add_subplot(1, 2, place)
        for order in names(rows, "order"):
            # Kept components name a point: every order has as many bytes there, but for what the codec's coder saves.
            points = [
                (
                    of(results, "curve", "bytes", 1e-3, order=order, below=below, kept=kept).mean,
                    of(results, "curve", "accuracy", 100, order=order, below=below, kept=kept).mean,
                )
                for kept in names(rows, "kept")
            ]
            axes.plot(*zip(*points, strict=True), ".-", label=order)
        axes.set(xlabel="classifier, kB", ylabel="test accuracy, %", title=title)
        axes.legend()
    drawing.savefig(results.folder / "curve.png", dpi=120)


def _trajectories(results: Results) -> None:
    rows = results.rows("trajectories")
    drawing = figure(6, 4)
    axes = drawing.add_subplot()
    points = names(rows, "control_points")
    for variant, series in dict.fromkeys((row["variant"], row["series"]) for row in rows):
        wanted = {"variant": variant, "series": series}
        errors = [of(results, "trajectories", "mean", 100, control_points=count, **wanted).mean for count in points]
        axes.loglog(points, errors, ".-", label=f"{variant}: {series}")
    axes.set(xlabel="control points", ylabel="mean relative error, %")
    axes.legend(fontsize="small")
    drawing.savefig(results.folder / "trajectories.png", dpi=120)
    recorder = TrajectoryRecorder.load(results.path("recorder-8", "tokens-64", 0, "safetensors"))
    recorder.plot(results.folder / "series.png", names=["components", "0.weight", "2.weight"], elements=8)
