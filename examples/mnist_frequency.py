"""Dense, block-circulant and low-rank networks on MNIST: accuracy against parameters, and the time of an epoch.

Two hidden layers of 1,024 and a dense head. A low-rank network has as many parameters as the circulant one whose block
it is named after. Without --data a small subset is used, which shows that it runs and nothing else.

Run: python examples/mnist_frequency.py [--data FOLDER] [--epochs N] [--seeds N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import mnist
import torch
import torch.nn.functional as F
from infold.nn import FrequencyLinear
from torch import nn

WIDTH = 1024
BLOCKS = (8, 16, 32)
BATCH = 128
Layer = Callable[[int, int], nn.Module]


class Run(NamedTuple):
    """One network trained from one seed; times are seconds an epoch."""

    network: str
    seed: int
    parameters: int
    accuracy: float
    seconds: float


def low_rank(inputs: int, outputs: int, block: int) -> nn.Module:
    """Two dense layers with no more parameters than a circulant one of ``block``, but for the bias."""
    rank = inputs * outputs // block // (inputs + outputs)
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs))


def layers() -> dict[str, Layer]:
    """How each network makes its hidden layers."""
    kinds: dict[str, Layer] = {"dense": nn.Linear}
    for block in BLOCKS:
        kinds[f"circulant {block}"] = lambda inputs, outputs, block=block: FrequencyLinear(inputs, outputs, block)
    for block in BLOCKS:
        kinds[f"low rank {block}"] = lambda inputs, outputs, block=block: low_rank(inputs, outputs, block)
    return kinds


def train(name: str, layer: Layer, seed: int, epochs: int, data: mnist.Split, test: mnist.Split) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(layer(784, WIDTH), nn.ReLU(), layer(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        for index in torch.randperm(len(data.labels)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(data.images[index]), data.labels[index]).backward()
            optimizer.step()
        seconds.append(time.perf_counter() - start)
        schedule.step()
    with torch.inference_mode():
        accuracy = float((model(test.images).argmax(-1) == test.labels).float().mean())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Run(name, seed, parameters, accuracy, statistics.median(seconds))


def table(runs: list[Run]) -> str:
    """A row for each network: means over seeds."""
    lines = [f"{'network':<14} {'parameters':>10} {'fewer':>6} {'accuracy %':>11} {'+-':>5} {'s an epoch':>11}"]
    most = max(run.parameters for run in runs)
    for name in dict.fromkeys(run.network for run in runs):
        own = [run for run in runs if run.network == name]
        accuracies = [100 * run.accuracy for run in own]
        seconds = statistics.median(run.seconds for run in own)
        parameters = own[0].parameters
        lines.append(
            f"{name:<14} {parameters:>10,} {most / parameters:>5.1f}x {statistics.mean(accuracies):>11.2f} "
            f"{statistics.pstdev(accuracies):>5.2f} {seconds:>11.2f}"
        )
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    """Accuracy against parameters, each run a point."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for kind in ("dense", "circulant", "low rank"):
        own = [run for run in runs if run.network.startswith(kind)]
        axes.semilogx([run.parameters for run in own], [100 * run.accuracy for run in own], "o", label=kind)
    axes.set(xlabel="parameters", ylabel="test accuracy, %", title="MNIST, two hidden layers of 1,024")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=mnist.SUBSET, help="a folder with MNIST's four IDX files")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/mnist_frequency"), help="where CSV and PNG go")
    arguments = parser.parse_args()
    data, test = mnist.load(arguments.data, "train"), mnist.load(arguments.data, "test")
    print(f"{len(data.labels):,} training and {len(test.labels):,} test images, {torch.get_num_threads()} threads")
    kinds = layers()
    runs: list[Run] = []
    # Seeds outermost: what else the machine does meanwhile falls on all networks.
    for seed in range(arguments.seeds):
        for name, layer in kinds.items():
            runs.append(train(name, layer, seed, arguments.epochs, data, test))
            print(f"seed {seed}, {name}: {100 * runs[-1].accuracy:.2f}%", flush=True)
    print(table(runs))
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([Run._fields, *runs])
    plot(runs, arguments.out / "accuracy.png")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
