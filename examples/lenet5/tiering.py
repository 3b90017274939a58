"""Tiers of a trained network by several signals, against controls: what each order of components or layers costs.

Where a weight lies changes no output, so here a tier is a *precision*: what is hot keeps its bits, what is cold loses
most of them or all. Bytes are those of Infold's codecs, everything counted.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import infold
import torch
import torch.nn.functional as F
from data import Mnist, Part, as_images
from infold import FusedConfig, tiers
from infold.nn import FusedDecompressLinear
from infold.packed import pack
from infold.tiers.models import lenet5
from infold.tokenizers import TrajectoryRecorder
from results import Outcome, Results, Row
from torch import Tensor, nn
from training import BATCH, evaluate

Scores = Mapping[str, float]
#: Shares of all bytes in the hot, the warm and the cold tier: the documents', and their more aggressive ones.
CUTS = {"30/50/20": (0.3, 0.5, 0.2), "15/60/25": (0.15, 0.6, 0.25), "10/60/30": (0.1, 0.6, 0.3)}
#: What the tiers hold.
SCHEMES = {"mild": ("float32", "int8", "int4"), "harsh": ("int8", "int4", "nothing")}
LAYER_SCHEMES = {"mild": ("float32", "int8", "int4"), "harsh": ("int8", "int4", "ecsq")}
KEPT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
RANDOM_DRAWS = 5
STEP = 4  # of the sweep: weights are multiples of a quarter


class Split(NamedTuple):
    """A perceptron on tokens; ``columns`` (components, hidden) is its first layer's weight, transposed."""

    columns: Tensor
    bias: Tensor
    head: Tensor
    head_bias: Tensor

    def quality(self, columns: Tensor, part: Part) -> tuple[float, float]:
        """Accuracy and cross-entropy with other columns."""
        logits = F.linear(F.relu(torch.addmm(self.bias, part.x, columns)), self.head, self.head_bias)
        return float((logits.argmax(1) == part.y).float().mean()), float(F.cross_entropy(logits, part.y))

    def rest_bytes(self) -> int:
        """What is in no tier, and which tier each component is in, at two bits each."""
        own = sum(4 * tensor.numel() for tensor in (self.bias, self.head, self.head_bias))
        return own + math.ceil(len(self.columns) / 4)


def load(results: Results, k: int, seed: int) -> Split:
    """That of a finished training."""
    state = results.tensors("accuracy", f"tokens-{k}", seed)
    return Split(
        state["model.0.weight"].T.contiguous(), state["model.0.bias"], state["model.2.weight"], state["model.2.bias"]
    )


def stored(rows: Tensor, form: str) -> tuple[Tensor, int]:
    """Rows (count, hidden) as they come out of a tier, and the bytes that they take there."""
    if form == "nothing" or not len(rows):
        return torch.zeros_like(rows), 0
    if form == "float32":
        return rows, 4 * rows.numel()
    packed = pack(rows, FusedConfig("int8" if form == "int8" else "int4"))
    return FusedDecompressLinear(packed).unpack(rows.dtype), packed.nbytes


def in_tiers(columns: Tensor, tier_of: Mapping[str, int], forms: tuple[str, ...]) -> tuple[Tensor, int]:
    """All columns with each tier in its form, and their bytes."""
    result, nbytes = torch.zeros_like(columns), 0
    for tier, form in enumerate(forms):
        own = torch.tensor([int(name) for name, its in tier_of.items() if its == tier], dtype=torch.long)
        result[own], size = stored(columns[own], form)
        nbytes += size
    return result, nbytes


# --- signals ---


def recorder(results: Results, variant: str, seed: int) -> TrajectoryRecorder:
    """That of eight control points."""
    return TrajectoryRecorder.load(results.path("recorder-8", variant, seed, "safetensors"))


def named(values: Tensor) -> dict[str, float]:
    """Scores of components, by their number."""
    return {str(number): float(value) for number, value in enumerate(values)}


def component_signals(data: Mnist, results: Results, k: int, seed: int) -> dict[str, dict[str, float]]:
    """Spatial, temporal and optimizer's: variance explained, variance of a column's norm in time, Adam's moment."""
    state = results.tensors("accuracy", f"tokens-{k}", seed)
    return {
        "variance": named(data.pca.explained_variance_[:k]),
        "trajectory": named(recorder(results, f"tokens-{k}", seed).trajectories()["components"].variance()),
        "adam": named(state["adam.columns"]),
    }


def ablation(split: Split, part: Part) -> dict[str, float]:
    """How much the loss rises without each component alone: a reference that no cheap signal has."""
    scores = {}
    for number in range(len(split.columns)):
        columns = split.columns.clone()
        columns[number] = 0
        scores[str(number)] = split.quality(columns, part)[1]
    return scores


def random_scores(names: list[str], draw: int) -> dict[str, float]:
    generator = random.Random(draw)
    return {name: generator.random() for name in names}


# --- components ---


def agreement(data: Mnist, results: Results, k: int, seed: int) -> Outcome:
    """Spearman's correlation of each two signals, and how many components they put into different tiers."""
    signals = component_signals(data, results, k, seed)
    rows = []
    for a, b in itertools.combinations(signals, 2):
        row: Row = {"a": a, "b": b, "spearman": tiers.spearman(signals[a], signals[b])}
        for name, cuts in CUTS.items():
            x, y = tiers.tiers_by_rank(signals[a], cuts), tiers.tiers_by_rank(signals[b], cuts)
            row[f"elsewhere {name}"] = sum(x[unit] != y[unit] for unit in x) / len(x)
        rows.append(row)
    return Outcome(rows, ", ".join(f"{row['a']}/{row['b']} {row['spearman']:.2f}" for row in rows))


def components(data: Mnist, results: Results, k: int, seed: int) -> Outcome:
    """Accuracy and bytes of each order at each cut and scheme; α, β and γ are tuned by the validation part's loss."""
    split, parts = load(results, k, seed), data.tokens(f"pca-{k}")
    signals = component_signals(data, results, k, seed)
    orders: dict[tuple[str, int], Scores] = {(name, 0): scores for name, scores in signals.items()}
    # What a component adds to the layer is its weights times the token: the trajectory of that, by its variance.
    spread = signals["variance"]
    orders["contribution", 0] = {name: score * spread[name] for name, score in signals["trajectory"].items()}
    orders["ablation", 0] = ablation(split, parts["validation"])
    names = list(signals["adam"])
    orders |= {("random", draw): random_scores(names, 100 * seed + draw) for draw in range(RANDOM_DRAWS)}
    # All columns have as many bytes, so size alone ranks none before another: its ties are cut at random.
    accuracy, loss = split.quality(split.columns, parts["test"])
    rest = split.rest_bytes()
    rows: list[Row] = [
        {"order": "whole", "accuracy": accuracy, "loss": loss, "bytes": rest + 4 * split.columns.numel()}
    ]
    for (cut, shares), (scheme, forms) in itertools.product(CUTS.items(), SCHEMES.items()):

        def measured(scores: Scores, part: str, shares=shares, forms=forms) -> tuple[float, float, int]:
            columns, nbytes = in_tiers(split.columns, tiers.tiers_by_rank(scores, shares), forms)
            return *split.quality(columns, parts[part]), rest + nbytes

        sweep = {}
        for alpha, beta in itertools.product(range(STEP + 1), repeat=2):
            if alpha + beta <= STEP:
                weights = alpha / STEP, beta / STEP, (STEP - alpha - beta) / STEP
                combined = tiers.combine(**signals, alpha=weights[0], beta=weights[1], gamma=weights[2])
                sweep[weights] = measured(combined, "validation")[1], combined
        best = min(sweep, key=lambda weights: sweep[weights][0])
        for (order, draw), scores in {**orders, ("combined", 0): sweep[best][1]}.items():
            accuracy, loss, nbytes = measured(scores, "test")
            row = {"cut": cut, "scheme": scheme, "order": order, "draw": draw}
            row |= {"accuracy": accuracy, "loss": loss, "bytes": nbytes}
            if order == "combined":
                row |= dict(zip(("alpha", "beta", "gamma"), best, strict=True))
            rows.append(row)
    return Outcome(rows, f"{len(rows)} plans")


def curve(data: Mnist, results: Results, k: int, seed: int) -> Outcome:
    """Accuracy as more and more components are dropped, or stored in 4 bits; the others stay as they are."""
    split, parts = load(results, k, seed), data.tokens(f"pca-{k}")
    signals: dict[str, Scores] = dict(component_signals(data, results, k, seed))
    signals["combined"] = tiers.combine(**signals)
    signals |= {
        f"random {draw}": random_scores(list(signals["adam"]), 100 * seed + draw) for draw in range(RANDOM_DRAWS)
    }
    rows: list[Row] = []
    for (order, scores), share, below in itertools.product(signals.items(), (1.0, *KEPT), ("nothing", "int4")):
        kept = round(share * len(scores))
        ranked = sorted(scores, key=lambda name: -scores[name])
        tier_of = {name: int(place >= kept) for place, name in enumerate(ranked)}
        columns, nbytes = in_tiers(split.columns, tier_of, ("float32", below))
        accuracy, loss = split.quality(columns, parts["test"])
        row = {"order": order.split()[0], "below": below, "kept": kept, "accuracy": accuracy, "loss": loss}
        held = kept if below == "nothing" else len(scores)
        rows.append({**row, "bytes": split.rest_bytes() + nbytes, "tokenizer_bytes": 4 * 784 * (held + 1)})
    return Outcome(rows, f"{len(rows)} points")


# --- layers ---


def lenet(results: Results, seed: int) -> nn.Sequential:
    """The baseline as it was trained."""
    state = results.tensors("accuracy", "lenet5", seed)
    model = lenet5()
    model.load_state_dict({name[6:]: value for name, value in state.items() if name.startswith("model.")})
    return model.eval()


def layer_signals(results: Results, model: nn.Module, seed: int) -> dict[str, dict[str, float]]:
    """Variance explained is one of components, not of layers: there are two signals here, and size."""
    state = results.tensors("accuracy", "lenet5", seed)
    names = [unit.name for unit in tiers.units(model)]
    return {
        "trajectory": recorder(results, "lenet5", seed).trajectory_variance("weights"),
        "adam": {name: float(state[f"adam.{name}"]) for name in names},
    }


def layers(data: Mnist, results: Results, seed: int) -> Outcome:
    """LeNet-5's five layers in tiers of precision, by `infold.convert`."""
    model, test = lenet(results, seed), as_images(data.images)["test"]
    signals = layer_signals(results, model, seed)
    sizes = {unit.name: unit.nbytes for unit in tiers.units(model)}
    orders: dict[tuple[str, int], Scores] = {(name, 0): scores for name, scores in signals.items()}
    orders["combined", 0] = tiers.combine(trajectory=signals["trajectory"], adam=signals["adam"])
    orders["size", 0] = {name: -size for name, size in sizes.items()}
    orders |= {("random", draw): random_scores(list(sizes), 100 * seed + draw) for draw in range(RANDOM_DRAWS)}
    found: dict[tuple[str, ...], Row] = {}
    rows: list[Row] = []
    for (cut, shares), (scheme, forms) in itertools.product(CUTS.items(), LAYER_SCHEMES.items()):
        for (order, draw), scores in orders.items():
            tier_of = tiers.tiers_by_rank(scores, shares, sizes)
            form_of = {name: forms[tier_of[name]] for name in sizes}
            key = tuple(form_of.values())
            if key not in found:
                packed, nbytes = converted(model, form_of)
                accuracy, loss = evaluate(packed, test)
                found[key] = {"accuracy": accuracy, "loss": loss, "bytes": nbytes}
            tiering = " ".join(f"{name}:{form}" for name, form in form_of.items())
            rows.append({"cut": cut, "scheme": scheme, "order": order, "draw": draw, **found[key], "tiers": tiering})
    accuracy, loss = evaluate(model, test)
    rows.append({"order": "whole", "accuracy": accuracy, "loss": loss, "bytes": sum(sizes.values())})
    return Outcome(rows, f"{len(found)} different plans; Spearman {tiers.spearman(*signals.values()):.2f}")


def converted(model: nn.Module, form_of: Mapping[str, str]) -> tuple[nn.Module, int]:
    """A copy with layers in these forms, and the bytes of the whole."""
    copied = copy.deepcopy(model)
    bits = {"ecsq": 2.0}
    configs = {name: FusedConfig(form, bits=bits.get(form)) for name, form in form_of.items() if form != "float32"}  # type: ignore[arg-type]
    return copied, infold.convert(copied, configs, progress=False).model_bytes_after


# --- latency ---


def latency(data: Mnist, results: Results, seconds: float) -> Outcome:
    """Emulated tiers, and packed layers, against the plain model, in turn: medians."""
    model = lenet(results, 0)
    scores = layer_signals(results, model, 0)["adam"]
    specs = [tiers.TierSpec("RAM", 0, 1000, resident=True), tiers.PRESETS["PCIe4"], tiers.PRESETS["NVMe4"]]
    plan = tiers.plan(model, specs, objective="fractions", scores=scores)
    tiers.save(plan, results.folder / "tier_hints.json")
    sizes = {unit.name: unit.nbytes for unit in tiers.units(model)}
    tier_of = tiers.tiers_by_rank(scores, CUTS["30/50/20"], sizes)
    packed = {
        scheme: converted(model, {name: forms[tier] for name, tier in tier_of.items()})[0]
        for scheme, forms in LAYER_SCHEMES.items()
    }
    test = as_images(data.images)["test"]
    rows: list[Row] = []
    emulated = copy.deepcopy(model)
    with tiers.attach(emulated, plan, mode="emulated"):
        for batch in (1, BATCH):
            x = test.x[:batch]
            models = {"plain": model, "emulated": emulated, **packed}
            times = in_turn({name: lambda each=each, x=x: each(x) for name, each in models.items()}, seconds)
            rows.append({"what": "forward", "batch": batch, **times})
        steps = {"plain": step_of(model, test), "emulated": step_of(emulated, test)}
        rows.append({"what": "training step", "batch": BATCH, **in_turn(steps, seconds, grad=True)})
    held = plan.bytes_by_tier()["RAM"] + plan.buffer_bytes
    total = sum(sizes.values())
    rows.append({"what": "first tier", "held": held, "ring": plan.buffer_bytes, "bytes": total})
    rows += [
        {"what": "tier", "unit": name, "tier": place.tier, "bytes": place.nbytes, "score": scores[name]}
        for name, place in plan.placements.items()
    ]
    return Outcome(rows, ", ".join(f"{r['what']} {r['batch']}: {r['emulated'] / r['plain']:.2f}x" for r in rows[:3]))


def step_of(model: nn.Module, part: Part) -> Callable[[], None]:
    """One step of training on the first batch, of a rate so small that it changes nothing."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-12)
    x, y = part.x[:BATCH], part.y[:BATCH]

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def in_turn(runs: Mapping[str, Callable[[], object]], seconds: float, *, grad: bool = False) -> dict[str, float]:
    """Median milliseconds of each, all of them in turn, after two rounds that are not timed."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    with torch.set_grad_enabled(grad):
        while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(own[2:]) for name, own in times.items()}
