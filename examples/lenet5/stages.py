"""Baseline, tokenizers, variance and trajectories: the roadmap's phases 2.1 to 2.3 as jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import tiering
import torch
from data import COMPONENTS, Mnist, Part, as_images
from infold.tiers import AdamStateAnalyzer, units
from infold.tiers.importance import adam_state
from infold.tiers.models import lenet5
from infold.tokenizers import PCATokenizer, SplinePCATokenizer, TrajectoryRecorder
from results import Outcome, Results, Row
from torch import nn
from training import evaluate, perceptron, train

#: The tokenizer that the roadmap names, whose components are put into tiers.
TOKENS = 64
CONTROL_POINTS = (4, 8, 16)
#: Weights of each layer whose trajectories are recorded.
SAMPLED = 400


class Job(NamedTuple):
    """What is computed at once, and skipped if its results are there."""

    stage: str
    variant: str
    seed: int
    run: Callable[[], Outcome]


def jobs(data: Mnist, results: Results, seeds: int, epochs: int, seconds: float) -> Iterator[Job]:
    """In the order of the roadmap; seeds outermost, so that a killed run has whole seeds."""
    yield Job("variance", "pca", 0, partial(variance, data))
    yield Job("splines", f"spline-{TOKENS}", 0, partial(splines, data))
    for seed in range(seeds):
        for name in VARIANTS:
            yield Job("accuracy", name, seed, partial(accuracy, data, results, name, epochs, seed))
        tokens = f"tokens-{TOKENS}"
        for name in ("lenet5", tokens):
            yield Job("trajectories", name, seed, partial(trajectories, results, name, seed))
        for stage in (tiering.agreement, tiering.components, tiering.curve):
            yield Job(stage.__name__, tokens, seed, partial(stage, data, results, TOKENS, seed))
        yield Job("layers", "lenet5", seed, partial(tiering.layers, data, results, seed))
    yield Job("latency", "lenet5", 0, partial(tiering.latency, data, results, seconds))


# --- accuracy of tokenizers ---


class Variant(NamedTuple):
    """A network, and what it sees."""

    make: Callable[[], nn.Sequential]
    parts: Callable[[Mnist], dict[str, Part]]
    recorded: Callable[[nn.Sequential], list[TrajectoryRecorder]] | None = None
    tokenizer: str | None = None


def recorders(model: nn.Sequential) -> list[TrajectoryRecorder]:
    """Of some weights of each layer, always the same ones."""
    return [TrajectoryRecorder.of_weights(model, n=n, elements=SAMPLED) for n in CONTROL_POINTS]


def token_recorders(model: nn.Sequential) -> list[TrajectoryRecorder]:
    """Of these and of the norms of the first layer's columns, one a component."""
    first, made = model[0], recorders(model)
    for recorder in made:
        recorder.add("components", lambda: first.weight.norm(dim=0))
    return made


VARIANTS = {
    "lenet5": Variant(lenet5, lambda data: as_images(data.images), recorders),
    "pixels": Variant(partial(perceptron, 784), lambda data: data.images),
}
for _k in COMPONENTS:
    VARIANTS[f"tokens-{_k}"] = Variant(
        partial(perceptron, _k),
        lambda data, k=_k: data.tokens(f"pca-{k}"),
        token_recorders if _k == TOKENS else None,
        f"pca-{_k}",
    )
    VARIANTS[f"rebuilt-{_k}"] = Variant(lenet5, lambda data, k=_k: as_images(data.rebuilt(k)), tokenizer=f"pca-{_k}")
VARIANTS[f"spline-{TOKENS}"] = Variant(
    partial(perceptron, TOKENS), lambda data: data.tokens(f"spline-{TOKENS}"), tokenizer=f"spline-{TOKENS}"
)


def tokenizer_bytes(tokenizer: PCATokenizer) -> int:
    """Of what it has to hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tokenizer.state_dict().values())


def accuracy(data: Mnist, results: Results, name: str, epochs: int, seed: int) -> Outcome:
    """Trains a network; keeps weights, Adam's second moments and trajectories where it is recorded."""
    variant = VARIANTS[name]
    parts = variant.parts(data)
    trained = train(variant.make, parts["train"], epochs, seed, variant.recorded)
    model = trained.model
    tested, loss = evaluate(model, parts["test"])
    row = {
        "accuracy": tested,
        "loss": loss,
        "validation": evaluate(model, parts["validation"])[0],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokenizer_bytes": 0 if variant.tokenizer is None else tokenizer_bytes(data.tokenizer(variant.tokenizer)),
        "seconds": trained.seconds,
    }
    tensors = {}
    for recorder in trained.recorders:
        recorder.save(results.path(f"recorder-{recorder.n}", name, seed, "safetensors"))
    if trained.recorders:
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        scores = AdamStateAnalyzer()(model, trained.optimizer)
        tensors |= {f"adam.{unit.name}": torch.tensor(scores[unit.name]) for unit in units(model)}
        first = next(model.parameters())
        tensors["adam.columns"] = adam_state(trained.optimizer, "exp_avg_sq")[first].flatten(1).mean(0)
    return Outcome([row], f"{100 * tested:.2f}%", tensors)


# --- trajectories ---


def trajectories(results: Results, name: str, seed: int) -> Outcome:
    """How much of each recorded series is lost in so many control points."""
    rows = []
    for n in CONTROL_POINTS:
        recorder = TrajectoryRecorder.load(results.path(f"recorder-{n}", name, seed, "safetensors"))
        for series, trajectory in recorder.trajectories().items():
            errors, moved = trajectory.error.to_size, trajectory.error.to_deviation
            row = {"series": series, "control_points": n, "count": errors.numel(), "points": trajectory.samples}
            row |= {"mean": float(errors.mean()), "median": float(errors.median()), "p90": float(errors.quantile(0.9))}
            row |= {"centred": float(moved.mean()), "ratio": trajectory.compression_ratio}
            rows.append(row)
    worst = max((row for row in rows if row["control_points"] == 8), key=lambda row: row["mean"])
    return Outcome(rows, f"8 control points, worst mean error: {100 * worst['mean']:.1f}% ({worst['series']})")


# --- variance ---


def variance(data: Mnist) -> Outcome:
    """Variance of each component as a share of the whole, and the first 64 as images."""
    pca = data.pca
    shares = pca.explained_variance_ratio_.tolist()
    rows = [{"component": number, "share": share} for number, share in enumerate(shares)]
    return Outcome(rows, f"{100 * sum(shares[:TOKENS]):.1f}% in {TOKENS}", {"components": pca.components_[:TOKENS]})


def splines(data: Mnist) -> Outcome:
    """What splines before the PCA do to the mean squared error of rebuilt images they were not fitted to."""
    fitted = data.tokenizer(f"spline-{TOKENS}")
    assert isinstance(fitted, SplinePCATokenizer)
    some = data.images["train"].x[:1000]

    def moved(tokenizer: SplinePCATokenizer) -> int:
        """Pixels that the spline changes."""
        return int(((tokenizer.spline(some) - some).abs().amax(0) > 1e-4).sum())

    rows: list[Row] = [
        {"spline": "fit", "strength": strength, "error": error} for strength, error in fitted.validation.items()
    ]
    x = data.images["validation"].x
    rebuilt = {
        name: made.inverse(made(x)) for name, made in (("none", data.tokenizer(f"pca-{TOKENS}")), ("kept", fitted))
    }
    # A spline keeps to the range of pixels, which clipping does as well.
    for name, image in list(rebuilt.items()):
        rebuilt[f"{name}, clipped"] = image.clamp(float(x.min()), float(x.max()))
    rows += [{"spline": name, "error": float((image - x).square().mean())} for name, image in rebuilt.items()]
    rows.append({"spline": "chosen", "strength": fitted.strength, "moved": moved(fitted)})
    return Outcome(rows, f"fit keeps strength {fitted.strength}, moves {rows[-1]['moved']} of 784 pixels")
