"""What comes next in a training run: a spline's end and slope against the last value, on LeNet-5 and MNIST.

LeNet-5 trains on the first 20,000 images with batches of 64. `TrajectoryRecorder` follows 300 weights of each parameter
and the gradient's norm of each layer from the first step on. At steps 100, 200, …, 500 it predicts the values 1, 10 and
50 steps on, by `predict`'s methods:

- linear: the spline's value and slope at its end;
- level: its value at its end;
- hold: the last sample.

The table gives root-mean-square errors over all series, the five places and the seeds together.

Run: python benchmarks/trajectory_prediction.py [--data FOLDER] [--seeds N] [--threads N] [--json FILE]
FOLDER holds MNIST as its authors publish it; examples/data/mnist, its first 1,000 images, without it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from harness import commit, parse_arguments
from infold.tiers.models import lenet5
from infold.tokenizers import TrajectoryRecorder
from infold.tokenizers.trajectories import Method
from torch import Tensor, nn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import mnist  # noqa: E402 (beside the examples that use it)

PLACES = (100, 200, 300, 400, 500)
AHEAD = (1, 10, 50)
METHODS: tuple[Method, ...] = ("linear", "level", "hold")
CONTROL_POINTS = (4, 8, 16)
#: (what is followed, optimizer, control points, method, steps ahead) → mean squares
Squares = dict[tuple[str, str, int, str, int], list[float]]


def flat(values: dict[str, Tensor]) -> Tensor:
    """(numbers, steps) of every series below another."""
    return torch.cat([value.reshape(-1, value.shape[-1]) for value in values.values()])


def follow(data: mnist.Split, optimizer_name: str, seed: int, squares: Squares) -> None:
    torch.manual_seed(seed)
    model = lenet5()
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    if optimizer_name == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    recorders = {}
    for n in CONTROL_POINTS:
        recorders["weights", n] = TrajectoryRecorder.of_weights(model, n=n, elements=300)
        recorders["gradient norms", n] = TrajectoryRecorder.of_gradient_norms(model, n=n)
    for recorder in recorders.values():
        recorder.attach(optimizer)
    images, ahead = data.images.reshape(-1, 1, 28, 28), torch.tensor(AHEAD)
    waiting: dict[int, list[tuple[tuple[str, str, int, str, int], Tensor]]] = defaultdict(list)
    for step in range(1, PLACES[-1] + AHEAD[-1] + 1):
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), data.labels[batch]).backward()
        optimizer.step()
        for key, predicted in waiting.pop(step, ()):
            # The last sample is what `hold` gives.
            now = flat(recorders[key[0], key[2]].predict(1, method="hold"))[:, 0]
            squares[key].append(float((predicted - now).square().mean()))
        if step in PLACES:
            for (what, n), recorder in recorders.items():
                for method in METHODS:
                    predicted = flat(recorder.predict(step + ahead, method=method))
                    for index, distance in enumerate(AHEAD):
                        key = (what, optimizer_name, n, method, distance)
                        waiting[step + distance].append((key, predicted[:, index]))


def main() -> None:
    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", type=Path, default=EXAMPLES / "data" / "mnist", help="folder of MNIST")
        parser.add_argument("--seeds", type=int, default=3, help="runs of each optimizer")

    arguments = parse_arguments(__doc__, options)
    data = mnist.load(arguments.data, "train")
    data = mnist.Split(data.images[:20_000], data.labels[:20_000])
    squares: Squares = defaultdict(list)
    for optimizer_name in ("adam", "sgd"):
        for seed in range(1 if arguments.quick else arguments.seeds):
            follow(data, optimizer_name, seed, squares)
    rows = []
    print(f"{'followed':<15} {'optimizer':<10} {'n':>3} {'ahead':>6}" + "".join(f"{m:>11}" for m in METHODS))
    for what, optimizer_name, n, distance in dict.fromkeys((a, b, c, e) for a, b, c, _, e in squares):
        keys = {method: squares[what, optimizer_name, n, method, distance] for method in METHODS}
        errors = {method: (sum(values) / len(values)) ** 0.5 for method, values in keys.items()}
        rows.append({"followed": what, "optimizer": optimizer_name, "n": n, "ahead": distance, **errors})
        shown = "".join(f"{error:>11.2e}" for error in errors.values())
        print(f"{what:<15} {optimizer_name:<10} {n:>3} {distance:>6}{shown}")
    if arguments.json is not None:
        result = {"commit": commit(), "images": len(data.images), "torch": torch.__version__, "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
