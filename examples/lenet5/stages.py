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
from results import Outcome, Results
from torch import Tensor, nn
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
    for seed in range(seeds):
        for name, variant in VARIANTS.items():
            yield Job("accuracy", name, seed, partial(accuracy, variant, data, epochs, seed))
        tokens = f"tokens-{TOKENS}"
        for stage in (tiering.agreement, tiering.components, tiering.curve):
            yield Job(stage.__name__, tokens, seed, partial(stage, data, results, TOKENS, seed))
        yield Job("layers", "lenet5", seed, partial(tiering.layers, data, results, seed))
    yield Job("latency", "lenet5", 0, partial(tiering.latency, data, results, seconds))


# --- accuracy of tokenizers ---


class Variant(NamedTuple):
    """A network, and what it sees."""

    make: Callable[[], nn.Sequential]
    parts: Callable[[Mnist], dict[str, Part]]
    observe: Callable[[nn.Sequential], dict[str, Tensor]] | None = None
    #: Bytes of the tokenizer, float32.
    tokenizer_bytes: int = 0


def lenet_series(model: nn.Sequential) -> dict[str, Tensor]:
    """Some weights of each layer, always the same ones."""
    series = {}
    for name, unit in model.named_children():
        if isinstance(unit, nn.Conv2d | nn.Linear):
            flat = unit.weight.flatten()
            series[name] = flat[torch.linspace(0, len(flat) - 1, min(SAMPLED, len(flat))).long()]
    return series


def token_series(model: nn.Sequential) -> dict[str, Tensor]:
    """Norms of the first layer's columns, one a component, and some weights of each layer."""
    first = model[0]
    assert isinstance(first, nn.Linear)
    return {"components": first.weight.norm(dim=0), **lenet_series(model)}


def tokenizer_bytes(k: int) -> int:
    """Components and mean in float32."""
    return 4 * 784 * (k + 1)


VARIANTS = {
    "lenet5": Variant(lenet5, lambda data: as_images(data.images), lenet_series),
    "pixels": Variant(partial(perceptron, 784), lambda data: data.images),
}
for _k in COMPONENTS:
    VARIANTS[f"tokens-{_k}"] = Variant(
        partial(perceptron, _k),
        lambda data, k=_k: data.tokens(k),
        token_series if _k == TOKENS else None,
        tokenizer_bytes(_k),
    )
    VARIANTS[f"rebuilt-{_k}"] = Variant(
        lenet5, lambda data, k=_k: as_images(data.rebuilt(k)), tokenizer_bytes=tokenizer_bytes(_k)
    )


def accuracy(variant: Variant, data: Mnist, epochs: int, seed: int) -> Outcome:
    """Trains a network; keeps weights, Adam's second moments and trajectories where it is observed."""
    parts = variant.parts(data)
    trained = train(variant.make, parts["train"], epochs, seed, variant.observe)
    model = trained.model
    tested, loss = evaluate(model, parts["test"])
    row = {
        "accuracy": tested,
        "loss": loss,
        "validation": evaluate(model, parts["validation"])[0],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokenizer_bytes": variant.tokenizer_bytes,
        "seconds": trained.seconds,
    }
    tensors = {}
    if variant.observe is not None:
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"series.{name}": value for name, value in trained.series.items()}
        scores = AdamStateAnalyzer()(model, trained.optimizer)
        tensors |= {f"adam.{unit.name}": torch.tensor(scores[unit.name]) for unit in units(model)}
        first = next(model.parameters())
        tensors["adam.columns"] = adam_state(trained.optimizer, "exp_avg_sq")[first].flatten(1).mean(0)
    return Outcome([row], f"{100 * tested:.2f}%", tensors)


# --- variance ---


def variance(data: Mnist) -> Outcome:
    """Variance of each component as a share of the whole, and the first 64 as images."""
    pca = data.pca
    shares = pca.explained_variance_ratio_.tolist()
    rows = [{"component": number, "share": share} for number, share in enumerate(shares)]
    return Outcome(rows, f"{100 * sum(shares[:TOKENS]):.1f}% in {TOKENS}", {"components": pca.components_[:TOKENS]})
