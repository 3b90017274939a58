"""ResNet-20 on CIFAR-10: PCA of its inputs, trajectories of its training, tiers for its weights.

1. The baseline (He et al. 2016, §4.2: SGD, momentum 0.9, weight decay 1e-4, rate 0.1 divided by 10 at 1/2 and 3/4).
2. The same network on images that are stored as PCA's tokens, and decoded when they are used: whole images to k
   numbers, or patches of 4 × 4 pixels to k numbers each.
3. Trajectories: the weights and gradient norms of the baseline's training as splines.
4. Tiers by rule: layers late to early, and by trajectory, gradients and both, at 15 / 60 / 25% of all bytes. Where a
   weight lies changes no output, so what is compared is the order, and the time that the time model predicts.

Run: python examples/resnet/resnet20.py --data FOLDER [--epochs N] [--seed N] [--out FOLDER] | --smoke
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path
from typing import NamedTuple

import cifar
import infold.tiers as tiers
import torch
import torch.nn.functional as F
from infold.tokenizers import PCA, TrajectoryRecorder, from_patches, to_patches
from resnets import resnet20
from torch import Tensor, nn

#: Of CIFAR-10's training images, by channel.
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PATCH = 4
SHARES = (0.15, 0.6, 0.25)


class Tokens(NamedTuple):
    """Images as PCA's tokens (count, patches, k), float32; ``pca`` None: as they are, bytes."""

    data: Tensor
    labels: Tensor
    pca: PCA | None = None

    def images(self, index: Tensor) -> Tensor:
        """(index, 3, 32, 32) from 0 to 255, decoded."""
        chosen = self.data[index]
        if self.pca is None:
            return chosen.float()
        patches = self.pca.inverse_transform(chosen.flatten(0, 1)).unflatten(0, chosen.shape[:2])
        return from_patches(patches, 3, 32, PATCH if patches.shape[1] > 1 else 32)


def tokenize(split: cifar.Split, pca: PCA, size: int) -> Tokens:
    parts = [to_patches(images, size) for images in split.images.split(1000)]
    tokens = [pca.transform(part.flatten(0, 1)).unflatten(0, part.shape[:2]) for part in parts]
    return Tokens(torch.cat(tokens), split.labels, pca)


def synthetic(count: int, seed: int) -> cifar.Split:
    """Ten classes: gratings of ten directions in noise."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=random)
    y, x = torch.meshgrid(*[torch.arange(32.0)] * 2, indexing="ij")
    angle = (labels * (math.pi / 10))[:, None, None]
    phase = 6.28 * torch.rand(count, 1, 1, generator=random)
    waves = (0.8 * (angle.cos() * x + angle.sin() * y) + phase).cos()[:, None]
    images = 128 + 50 * waves + 30 * torch.randn(count, 3, 32, 32, generator=random)
    return cifar.Split(images.clamp(0, 255).to(torch.uint8), labels)


def normalised(images: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    return (images / 255 - mean) / deviation


def augmented(images: Tensor, random: torch.Generator) -> Tensor:
    """Each moved by up to 4 pixels, half of them mirrored."""
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, len(images), 1), generator=random)
    rows, columns = top + torch.arange(32), left + torch.arange(32)
    mirrored = torch.rand(len(images), 1, generator=random) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    number = torch.arange(len(images))[:, None, None]
    return padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def train(train_: Tokens, arguments: argparse.Namespace, recorders: list[TrajectoryRecorder] | None = None):
    """The network, and its gradients' moving averages of squares by unit."""
    torch.manual_seed(arguments.seed)
    random = torch.Generator().manual_seed(arguments.seed)
    model = resnet20()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    total = arguments.epochs * (len(train_.labels) // arguments.batch)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [total // 2, total * 3 // 4])
    if recorders is not None:
        for n in (4, 8, 16):
            recorder = TrajectoryRecorder(n)
            recorder.add_weights(model, elements=64)
            recorder.add_gradient_norms(model)
            recorders.append(recorder.attach(optimizer, every=max(1, total // 1000)))
    with tiers.GradientEma(model) as gradients:
        for epoch in range(arguments.epochs):
            begun, losses = time.perf_counter(), []
            order = torch.randperm(len(train_.labels), generator=random)
            for index in order.split(arguments.batch)[: len(order) // arguments.batch]:
                images = augmented(normalised(train_.images(index)), random)
                loss = F.cross_entropy(model(images), train_.labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
            mean = sum(losses) / len(losses)
            print(f"  epoch {epoch + 1}: loss {mean:.3f}, {time.perf_counter() - begun:.1f} s", flush=True)
    for recorder in recorders or []:
        recorder.close()
    return model.eval(), gradients.scores()


@torch.inference_mode()
def accuracy(model: nn.Module, test: Tokens) -> float:
    right = 0
    for index in torch.arange(len(test.labels)).split(500):
        right += int((model(normalised(test.images(index))).argmax(1) == test.labels[index]).sum())
    return right / len(test.labels)


def place(model: nn.Module, gradients: dict[str, float], trajectory: dict[str, float]) -> None:
    names = [unit.name for unit in tiers.units(model)]
    scores = {
        "late first": {name: float(n) for n, name in enumerate(names)},
        "trajectory": {name: trajectory[name] for name in names},
        "gradients": {name: gradients[name] for name in names},
    }
    scores["combined"] = tiers.combine(trajectory=scores["trajectory"], adam=scores["gradients"])
    specs = [tiers.PRESETS["H100"], tiers.PRESETS["PCIe4"], tiers.PRESETS["NVMe4"]]
    uses = tiers.measure_compute(model, torch.zeros(1, 3, 32, 32))
    print(
        "| order | fast tier + ring, KB | predicted ms, exposed | rank correlation with late first | with gradients |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, score in scores.items():
        plan = tiers.plan(model, specs, None, "fractions", scores=score, fractions=SHARES)
        predicted = tiers.predict(model, plan, compute_seconds=uses)
        held = plan.bytes_by_tier()[specs[0].name]
        cells = [f"{tiers.spearman(score, scores[other]):+.2f}" for other in ("late first", "gradients")]
        print(f"| {name} | {held / 1e3:.0f} + {plan.buffer_bytes / 1e3:.0f}", end=" ")
        print(f"| {1e3 * predicted.seconds:.2f}, {1e3 * predicted.exposed_seconds:.2f} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with cifar-10-batches-py")
    parser.add_argument("--smoke", action="store_true", help="few generated images, one epoch")
    parser.add_argument("--epochs", type=int, default=164)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", type=int, nargs="*", default=[64, 256, 1024], help="components of whole images")
    parser.add_argument("--patches", type=int, nargs="*", default=[4, 12], help="components of each patch")
    parser.add_argument("--out", type=Path, help="folder for runs.csv and trajectories.png")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.epochs, arguments.batch, arguments.whole, arguments.patches = 1, 8, [64], [12]
        splits = [synthetic(160, 0), synthetic(100, 1)]
    elif arguments.data:
        splits = [cifar.load(arguments.data, split) for split in ("train", "test")]
    else:
        parser.error("expected --data or --smoke")

    print("baseline")
    plain = [Tokens(split.images, split.labels) for split in splits]
    recorders: list[TrajectoryRecorder] = []
    model, gradients = train(plain[0], arguments, recorders)
    rows = [("baseline", 3072, 1.0, accuracy(model, plain[1]))]
    for kind, size, k in [("whole", 32, k) for k in arguments.whole] + [
        ("patches", PATCH, k) for k in arguments.patches
    ]:
        print(f"{kind}, {k} components")
        seen = to_patches(splits[0].images, size).flatten(0, 1)
        pca = PCA(k, method="exact" if len(seen) < seen.shape[1] else "auto").fit(seen)
        tokens = [tokenize(split, pca, size) for split in splits]
        numbers = tokens[0].data[0].numel()
        rows.append((f"{kind} {k}", numbers, float(pca.explained_variance_ratio_.sum()), 0.0))
        rows[-1] = (*rows[-1][:3], accuracy(train(tokens[0], arguments)[0], tokens[1]))
    print("| inputs | numbers an image | explained variance | accuracy |")
    print("| --- | --- | --- | --- |")
    for name, numbers, explained, right in rows:
        print(f"| {name} | {numbers:,} | {explained:.1%} | {right:.2%} |")

    print("| control points | error to deviation: weights | gradient norms | compression |")
    print("| --- | --- | --- | --- |")
    for recorder in recorders:
        errors: dict[str, list[float]] = {"weights": [], "gradient_norms": []}
        for trajectory in recorder.trajectories().values():
            errors[trajectory.signal].append(float(trajectory.error.total().to_deviation))
        cells = [f"{sum(e) / len(e):.1%}" for e in errors.values()]
        print(f"| {recorder.n} | {' | '.join(cells)} | {recorder.compression_ratio():.1f}x |")
    place(model, gradients, recorders[1].trajectory_variance("weights"))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with open(arguments.out / "runs.csv", "w", newline="") as file:
            csv.writer(file).writerows([("inputs", "numbers", "explained", "accuracy"), *rows])
        recorders[1].plot(arguments.out / "trajectories.png")


if __name__ == "__main__":
    main()
