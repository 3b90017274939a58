"""Plans of one problem by different strategies, in the time model: the learned policy beside the static plan, rankings
and random plans. No clock is read but for the time that planning takes, so the figures are the same anywhere.

A ratio is a strategy's two passes over the learned policy's mean: above 1, the learned policy is faster.

Run: python benchmarks/tier_policy.py --json build/bench/tier_policy.json
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch
from harness import Results, parse_arguments
from infold.tiers import PRESETS, LearnedPolicy, Plan, TierSpec, plan, simulate, units
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

Uses = list[tuple[str, float]]

SEEDS = 5
ITERATIONS = 30


def smollm2() -> nn.Module:
    """SmolLM2-135M's shapes without its values: placement asks for no more."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def mixed(seed: int) -> nn.Module:
    """48 units of 16 KB to 4 MB, in no order."""
    generator = random.Random(seed)
    layers = nn.ModuleList(nn.Module() for _ in range(48))
    for layer in layers:
        layer.register_parameter("weight", nn.Parameter(torch.empty(4096 * generator.choice([1, 16, 64, 256]))))
    return layers


def problems() -> dict[str, tuple[nn.Module, list[TierSpec], tuple[float, ...], Uses]]:
    """Models, tiers, budgets as shares of all bytes, and the seconds that each layer computes."""
    gpu, machine = (
        [PRESETS["H100"], PRESETS["PCIe4"], PRESETS["NVMe4"]],
        [
            TierSpec("RAM", 1, 10, resident=True),
            TierSpec("SSD", 100, 0.9, on_disk=True),
        ],
    )
    language, layers = smollm2(), mixed(0)
    # A layer computes for as long as a link of so many GB/s carries its bytes.
    rate = {"SmolLM2, GPU, computing at 26 GB/s": 26e9, "SmolLM2, RAM and SSD, at 1.8 GB/s": 1.8e9}
    made = {}
    for (name, speed), tiers, shares in zip(rate.items(), (gpu, machine), ((0.35, 0.4), (0.35,)), strict=True):
        made[name] = (language, tiers, shares, [(unit.name, unit.nbytes / speed) for unit in units(language)])
    generator = random.Random(1)
    uses = [(unit.name, generator.uniform(0, 8e-5)) for unit in units(layers)]
    made["48 mixed units, GPU, a quarter used twice"] = (layers, gpu, (0.35, 0.4), uses + uses[12:24])
    return made


def main() -> None:
    arguments = parse_arguments(__doc__)
    results = Results(arguments)
    for case, (model, tiers, shares, uses) in problems().items():
        total = sum(unit.nbytes for unit in units(model))
        budgets = {tier.name: int(total * share) for tier, share in zip(tiers, shares, strict=False)}

        def cost(made: Plan, uses: Uses = uses) -> float:
            return 1e3 * simulate(made.accesses(uses) * 2, made.specs, buffer_bytes=made.buffer_bytes).seconds

        learned, spent = [], []
        for seed in range(2 if arguments.quick else SEEDS):
            start = time.perf_counter()
            policy = LearnedPolicy(model, tiers, budgets, compute_seconds=uses, seed=seed)
            policy.train(5 if arguments.quick else ITERATIONS)
            learned.append(cost(policy.plan()))
            spent.append(time.perf_counter() - start)

        def timed(make: Callable[[], Plan], cost: Callable[[Plan], float] = cost) -> tuple[float, float]:
            start = time.perf_counter()
            made = make()
            return cost(made), time.perf_counter() - start

        rows = {"traffic": [timed(lambda: plan(model, tiers, budgets, "traffic", compute_seconds=uses))]}  # noqa: B023
        for kept, label in ((0, ""), (1, ", largest kept")):
            for objective in ("size", "layer-order"):
                rows[objective + label] = [
                    timed(lambda o=objective, k=kept: plan(model, tiers, budgets, o, keep_largest=k))  # noqa: B023
                ]
            rows["random" + label] = [
                timed(lambda s=seed, k=kept: plan(model, tiers, budgets, "random", seed=s, keep_largest=k))  # noqa: B023
                for seed in range(SEEDS)
            ]
        computing = 2e3 * sum(seconds for _, seconds in uses)
        for name, values in rows.items():
            mean = statistics.fmean(value for value, _ in values)
            results.add(
                case,
                name,
                statistics.fmean(learned),
                mean,
                floor_ms=computing,
                note=f"learned {min(learned):.2f}-{max(learned):.2f}, trained {statistics.fmean(spent):.1f} s; "
                f"{name} {min(v for v, _ in values):.2f}-{max(v for v, _ in values):.2f}, "
                f"{statistics.fmean(s for _, s in values):.2f} s",
                learned_ms=learned,
                others_ms=[value for value, _ in values],
            )
    results.write(seeds=SEEDS, iterations=ITERATIONS)


if __name__ == "__main__":
    main()
