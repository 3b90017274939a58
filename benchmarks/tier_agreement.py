"""Adam's second moment against the Fisher diagonal by example: do they rank a model's units alike?

The tiering document leaves three things to validate: that exp_avg_sq, as training leaves it, correlates with the Fisher
trace after training; that they rank layers alike; that decisions by either turn out alike. At several points of
training, each signal is compared with the Fisher diagonal at the same point and with the one after training:

- Spearman over units, and over the single weights of the whole model;
- the bytes that both rank above each of the cuts at 30 and 80% of bytes, and the share of units that get the same tier.

Signals: exp_avg_sq, exp_avg (squared), a moving average of squared gradients (decay 0.99), and the units' mean squared
weight, which has seen no gradient, as a control. The Fisher is empirical, of 512 training examples.

LeNet-5 on MNIST has five units only, so its ranks are coarse. The transformer is of characters: four layers of 64.
For it, every weight is then packed into the bytes of ECSQ at 3 and 4 bits, each layer's precision chosen by either
signal at the end of training, by none, or the same for all; the row is the loss on text that was not trained on.

Run: python benchmarks/tier_agreement.py --mnist FOLDER --text FOLDER [--seeds N] [--only lenet|transformer]
    [--threads N] [--json FILE]
The folders hold MNIST's four IDX files and tinyshakespeare.txt.gz.
"""

from __future__ import annotations

import argparse
import gzip
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Results, parse_arguments
from infold.tiers import (
    AdamStateAnalyzer,
    FisherAnalyzer,
    GradientEma,
    agreement,
    measure_precision,
    plan_precision,
    units,
)
from infold.tiers.importance import adam_state, by_unit
from infold.tiers.ranking import rank_correlation
from tier_quality import Requantizer, uniform
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import mnist

EXAMPLES = 512
Batch = tuple[Tensor, Tensor]


class LeNet5(nn.Sequential):
    """Two convolutions and three dense layers."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 28)),
            *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
        )


class Block(nn.Module):
    """Causal attention and a feed-forward part, each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(-3, -2) for f in (self.query, self.key, self.value))
        # Written out, so that vmap has all the rules.
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1)
        attended = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + self.out(attended.transpose(-3, -2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Of characters."""

    def __init__(self, vocabulary: int, context: int, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.tokens(indices) + self.places(torch.arange(indices.shape[-1]))
        return self.head(self.norm(self.blocks(x)))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def observe(
    results: Results, case: str, seed: int, model: nn.Module, batches: Iterator[Batch], points: list[int], probe: Batch
) -> dict[str, dict[str, float]]:
    """Trains up to the last of the points, a row for each signal at each; the scores at the end."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    fisher = FisherAnalyzer(loss_of, method="vmap", chunk=64)
    signals: dict[int, dict[str, dict[str, float]]] = {}
    diagonals: dict[int, Tensor] = {}
    moments: dict[int, Tensor] = {}
    with GradientEma(model) as ema:
        for step in range(1, max(points) + 1):
            optimizer.zero_grad()
            loss_of(model, next(batches)).backward()
            optimizer.step()
            if step in points:
                diagonal = fisher.diagonal(model, [probe])
                state = adam_state(optimizer, "exp_avg_sq")
                diagonals[step] = torch.cat([diagonal[p].flatten() for p in model.parameters()])
                moments[step] = torch.cat([state[p].flatten().double() for p in model.parameters()])
                signals[step] = {
                    "fisher": by_unit(model, {p: (float(f.sum()), f.numel()) for p, f in diagonal.items()})[0],
                    "exp_avg_sq": AdamStateAnalyzer()(model, optimizer),
                    "exp_avg": AdamStateAnalyzer("exp_avg")(model, optimizer),
                    "ema": ema.scores(),
                    "weight²": mean_squares(model),
                }
    sizes = {unit.name: unit.nbytes for unit in units(model)}
    last = max(points)
    for step in points:
        both = {"fisher at the end": signals[last]["fisher"], **signals[step]}
        report = agreement(both, sizes=sizes)
        for pair in report.pairs:
            if "fisher" not in pair.first or (step == last and "fisher" in (pair.first, pair.second)):
                continue
            target = last if pair.first == "fisher at the end" else step
            weights = {"exp_avg_sq": moments[step], "fisher": diagonals[step]}.get(pair.second)
            row = {
                "case": case,
                "seed": seed,
                "step": step,
                "signal": pair.second,
                "against": pair.first,
                "units": report.units,
                "spearman": pair.spearman,
                "overlaps": pair.overlaps,
                "same_decision": pair.same_decision,
                "same_bytes": pair.same_bytes,
                "spearman_of_weights": None if weights is None else rank_correlation(weights, diagonals[target]),
            }
            results.rows.append(row)
    return signals[last]


def mean_squares(model: nn.Module) -> dict[str, float]:
    """Σ w² over a unit's elements, by their number."""
    result = {}
    for unit in units(model):
        own = list(unit.parameters.values())
        result[unit.name] = sum(float(p.detach().square().sum()) for p in own) / sum(p.numel() for p in own)
    return result


def lenet(results: Results, folder: Path, seeds: int, steps: list[int]) -> None:
    """LeNet-5 on MNIST."""
    data, test = mnist.load(folder, "train"), mnist.load(folder, "test")
    images, labels = data.images.view(-1, 28, 28), data.labels

    def batches() -> Iterator[Batch]:
        while True:
            for index in torch.randperm(len(labels)).split(128):
                yield images[index], labels[index]

    for seed in range(seeds):
        torch.manual_seed(seed)
        model = LeNet5()
        probe = torch.randperm(len(labels))[:EXAMPLES]
        observe(results, "LeNet-5", seed, model, batches(), steps, (images[probe], labels[probe]))
        with torch.inference_mode():
            right = (model(test.images.view(-1, 28, 28)).argmax(-1) == test.labels).double().mean()
        print(f"LeNet-5, seed {seed}: {100 * float(right):.2f}% right", flush=True)


def transformer(results: Results, folder: Path, seeds: int, steps: list[int]) -> None:
    """Characters of tinyshakespeare; the last tenth is not trained on."""
    text = gzip.decompress((folder / "tinyshakespeare.txt.gz").read_bytes()).decode("utf-8")
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    everything = torch.tensor([alphabet[character] for character in text])
    data, held_out = everything[: len(text) * 9 // 10], everything[len(text) * 9 // 10 :]
    context = 64

    def draw(source: Tensor, count: int) -> Batch:
        starts = torch.randint(len(source) - context, (count, 1)) + torch.arange(context)
        return source[starts], source[starts + 1]

    def batches() -> Iterator[Batch]:
        while True:
            yield draw(data, 32)

    for seed in range(seeds):
        torch.manual_seed(seed)
        model = Transformer(len(alphabet), context)
        scores = observe(results, "transformer", seed, model, batches(), steps, draw(data, EXAMPLES))
        decisions(results, seed, model.eval(), scores, draw(held_out, 512))


def decisions(
    results: Results, seed: int, model: nn.Module, scores: Mapping[str, Mapping[str, float]], held_out: Batch
) -> None:
    """Losses with precision chosen by each signal."""

    def loss() -> float:
        with torch.inference_mode():
            return float(loss_of(model, held_out))

    dense = loss()
    curves, requantizer = measure_precision(model, progress=False), Requantizer(model)
    for bits in (3, 4):
        at_rate = uniform(curves, bits)
        choices = {"uniform": at_rate, "plain": plan_precision(curves, at_rate.nbytes)}
        choices |= {name: plan_precision(curves, at_rate.nbytes, own) for name, own in scores.items()}
        for name, plan in choices.items():
            requantizer.apply(plan)
            same = statistics.mean(float(plan[c.names[0]] == choices["fisher"][c.names[0]]) for c in curves)
            row = {"case": "transformer, precision", "seed": seed, "bits": bits, "signal": name, "dense": dense}
            results.rows.append({**row, "loss": loss(), "same_precision_as_fisher": same})


def tables(results: Results) -> None:
    """Means over seeds, and the lowest and highest of them."""

    def over_seeds(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> str:
        own = [value(row) for row in rows]
        return f"{statistics.mean(own):>6.2f} ({min(own):>5.2f} to {max(own):>5.2f})"

    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results.rows:
        keys = ("case", "against", "step", "signal") if "step" in row else ("case", "bits", "signal")
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    title = ""
    # Stable: what is alike stays in the order in which it came.
    for key, rows in sorted(groups.items(), key=lambda group: group[0][:2] if len(group[0]) == 4 else ("~",)):
        if (heading := f"{key[0]}, against {key[1]}" if "step" in rows[0] else key[0]) != title:
            title = heading
            print(f"\n{title}; means over {len(rows)} seeds (lowest to highest)")
        if "step" not in rows[0]:
            rise = over_seeds(rows, lambda row: 1000 * (row["loss"] - row["dense"]))
            same = over_seeds(rows, lambda row: row["same_precision_as_fisher"])
            print(f"  {key[1]} bits, {key[2]:<11} loss rises by {rise} thousandths, same precision as by fisher {same}")
            continue
        columns = [over_seeds(rows, lambda row: row["spearman"])]
        columns += [over_seeds(rows, lambda row, cut=cut: row["overlaps"][cut]) for cut in range(2)]
        columns.append(over_seeds(rows, lambda row: row["same_decision"]))
        if rows[0]["spearman_of_weights"] is not None:
            columns.append(over_seeds(rows, lambda row: row["spearman_of_weights"]))
        names = ("Spearman", "top 30%", "top 80%", "same tier", "weights")
        shown = "  ".join(f"{name} {column}" for name, column in zip(names, columns, strict=False))
        print(f"  step {key[2]:>4}, {key[3]:<11} {shown}")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mnist", type=Path, default=mnist.SUBSET, help="a folder with MNIST's four IDX files")
    parser.add_argument("--text", type=Path, required=True, help="a folder with tinyshakespeare.txt.gz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=("lenet", "transformer"), help="one model")


def main() -> None:
    arguments: Any = parse_arguments(__doc__, options)
    results = Results(arguments)
    seeds = 1 if arguments.quick else arguments.seeds
    if arguments.only != "transformer":
        lenet(results, arguments.mnist, seeds, [20, 40] if arguments.quick else [50, 200, 469, 938])
    if arguments.only != "lenet":
        transformer(results, arguments.text, seeds, [20, 40] if arguments.quick else [50, 100, 200, 400])
    tables(results)
    results.write()


if __name__ == "__main__":
    main()
