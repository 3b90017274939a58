"""Networks, and how all of them are trained."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from data import Part
from infold.tokenizers import TrajectoryRecorder
from torch import nn
from tqdm import trange

BATCH = 128
RATE = 2e-3
#: About how many points of a trajectory are recorded.
POINTS = 400
#: LeNet-5's.
PARAMETERS = 61_706


class Trained(NamedTuple):
    """A trained model, the optimizer that trained it, and what recorded it."""

    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    recorders: list[TrajectoryRecorder]
    seconds: float


def perceptron(inputs: int) -> nn.Sequential:
    """One hidden layer, as wide as LeNet-5's number of parameters allows."""
    width = (PARAMETERS - 10) // (inputs + 11)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 10))


def train(
    make: Callable[[], nn.Sequential],
    part: Part,
    epochs: int,
    seed: int,
    recorded: Callable[[nn.Sequential], list[TrajectoryRecorder]] | None = None,
) -> Trained:
    """Adam with a cosine schedule to zero.

    recorded: makes recorders of a model; they see evenly spaced steps, about `POINTS` of them. The seed decides on the
    first weights and on the order of the images.
    """
    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    steps = epochs * -(-len(part.y) // BATCH)
    every = max(1, steps // POINTS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    recorders = [recorder.attach(optimizer, every=every) for recorder in (recorded(model) if recorded else [])]
    start = time.perf_counter()
    for _ in trange(epochs, desc="epochs", leave=False, disable=None):
        for index in torch.randperm(len(part.y)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(part.x[index]), part.y[index]).backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - start
    for recorder in recorders:
        recorder.close()
    return Trained(model.eval(), optimizer, recorders, seconds)


@torch.inference_mode()
def evaluate(model: nn.Module, part: Part) -> tuple[float, float]:
    """Accuracy and mean cross-entropy."""
    logits = torch.cat([model(x) for x in part.x.split(2000)])
    return float((logits.argmax(1) == part.y).float().mean()), float(F.cross_entropy(logits, part.y))
