"""``infold tiers``: calibrate, plan, predict, analyze, bench."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from infold import tiers
from infold.checked_files import destination, replacing
from infold.report import format_bytes
from infold.tiers.calibrate import SIZES
from infold.tiers.hints import load, parse_object, parse_specs, read, save
from infold.tiers.models import Loaded, load_model
from infold.tiers.plan import Objective, Plan
from infold.tiers.presets import PRESETS
from infold.tiers.spec import TierSpec

_TIERS = "H100,PCIe4,NVMe4"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_commands(parser: argparse.ArgumentParser) -> None:
    """The commands of ``infold tiers``."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], help_text: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(name, help=help_text, description=help_text)
        made.add_argument("--json", action="store_true", help="print JSON")
        made.set_defaults(run=run)
        return made

    made = command("calibrate", _calibrate, "measure this machine's tiers")
    made.add_argument("folder", type=Path, help="a folder on the disk to measure")
    made.add_argument(
        "--file-bytes",
        type=parse_bytes,
        default="256MiB",
        metavar="SIZE",
        help=f"of the file that is read, {max(SIZES) >> 20}MiB or more (default: %(default)s)",
    )
    made.add_argument("--out", type=Path, metavar="FILE", help="write the specs, for plan --specs")
    _add_force(made)

    made = command("plan", _plan, "place a model's weights, and write the plan into a file")
    _add_model(made)
    made.add_argument(
        "--tiers",
        metavar="NAMES",
        help=f"fastest first, with commas: of {', '.join(PRESETS)} (default: {_TIERS}); or of --specs (default: all)",
    )
    made.add_argument("--specs", type=Path, metavar="FILE", help="tiers of a file of calibrate --out")
    made.add_argument(
        "--budget", action="append", default=[], metavar="TIER=SIZE", help="bytes of a tier: HBM=6GB; may be repeated"
    )
    made.add_argument("--objective", default="traffic", choices=get_args(Objective))
    made.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="for importance, inverse and fractions: a JSON object, a number for each unit",
    )
    made.add_argument(
        "--fractions",
        type=float,
        nargs="+",
        default=[0.3, 0.5, 0.2],
        help="of bytes, one a tier (default: %(default)s)",
    )
    made.add_argument("--buffers", type=int, default=2, help="weights that the ring holds (default: %(default)s)")
    made.add_argument("--keep-largest", type=int, default=0, metavar="COUNT", help="largest weights to rank first")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=Path("tier_hints.json"), metavar="FILE", help="default: %(default)s")
    _add_force(made)

    made = command("predict", _predict, "time per forward under a plan, or per token of a streamed model")
    made.add_argument("hints", type=Path, nargs="?", help="a file of plan")
    _add_model(made, required=False)
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw the timeline")
    made.add_argument(
        "--stream", type=float, metavar="PARAMETERS", help="a dense model of so many, streamed for each token: 120e9"
    )
    made.add_argument("--device-memory", type=parse_bytes, default=6 * 10**9, metavar="SIZE", help="for --stream")

    made = command("analyze", _analyze, "what a plan holds")
    made.add_argument("hints", type=Path)
    made.add_argument("--model", help="check the plan against this model")

    made = command("bench", _bench, "latency with and without tiers")
    _add_model(made)
    made.add_argument("--tier-hints", type=Path, required=True, metavar="FILE")
    made.add_argument("--mode", choices=("emulated", "real"), default="emulated")
    made.add_argument("--baseline", action="store_true", help="time the resident model too")
    made.add_argument("--num-iterations", type=int, default=100)
    made.add_argument(
        "--folder",
        type=Path,
        help=f"where a tier on disk keeps its file in real mode (default: {tempfile.gettempdir()})",
    )


def parse_bytes(text: str) -> int:
    """Bytes from ``6GB``, ``512MiB`` or a number; raises ValueError for anything else."""
    digits = text.rstrip("BbIiKkMmGgTt ")
    unit = text[len(digits) :].strip().upper()
    try:
        count = float(digits) * _UNITS[unit]
    except (KeyError, ValueError):
        raise ValueError(f"expected a size as 6GB or 512MiB, got {text!r}") from None
    if not 0 <= count < 2**63:
        raise ValueError(f"expected a size of zero or more bytes, got {text!r}")
    return int(count)


def _add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--model", required=required, help="lenet5, mlp, a folder or name for transformers, a GGUF file"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="safetensors, or a state dict of tensors alone")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-length", type=int, default=128)


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="overwrite the file if it is there")


def _refuse_overwriting(options: argparse.Namespace) -> None:
    """Before anything is measured: a command that cannot write its file has taken no time."""
    if destination(options.out).exists() and not options.force:
        raise ValueError(f"out: {options.out}: expected a file that is not there yet, or --force to overwrite it")


def _model(options: argparse.Namespace) -> Loaded:
    return load_model(options.model, options.checkpoint, batch_size=options.batch_size, seq_length=options.seq_length)


def _print(options: argparse.Namespace, content: Mapping[str, Any], text: str) -> None:
    print(json.dumps(content, indent=2) if options.json else text)


def _calibrate(options: argparse.Namespace) -> None:
    def say(line: str) -> None:
        print(line, file=sys.stderr)

    if options.out is not None:
        _refuse_overwriting(options)
    specs = tiers.calibrate(options.folder, file_bytes=options.file_bytes, progress=say)
    content = {"tiers": [asdict(spec) for spec in specs.values()]}
    if options.out is not None:
        with replacing(destination(options.out)) as file:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    rows = [f"{'tier':<14} {'GB/s':>9} {'setup us':>9}"]
    rows += [f"{spec.name:<14} {spec.bandwidth_gb_s:>9.2f} {spec.setup_us:>9.1f}" for spec in specs.values()]
    _print(options, content, "\n".join(rows))


def _specs(options: argparse.Namespace) -> list[TierSpec]:
    known: Mapping[str, TierSpec] = PRESETS
    names = (options.tiers or _TIERS).split(",")
    if options.specs is not None:
        known = read(options.specs, parse_specs)
        names = options.tiers.split(",") if options.tiers else list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"tiers: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return [known[name] for name in names]


def _scores(path: Path | None) -> dict[str, float] | None:
    if path is None:
        return None
    scores = read(path, parse_object)
    if wrong := [name for name, score in scores.items() if not isinstance(score, int | float)]:
        raise ValueError(f"{path}: expected a number for each unit, got something else for {wrong[0]!r}")
    return scores


def _plan(options: argparse.Namespace) -> None:
    _refuse_overwriting(options)
    specs, scores = _specs(options), _scores(options.scores)
    budgets: dict[str, int | None] = {}
    for text in options.budget:
        name, equals, size = text.rpartition("=")
        if not equals:
            raise ValueError(f"budget: expected TIER=SIZE, got {text!r}")
        budgets[name] = parse_bytes(size)
    loaded = _model(options)
    by_time = options.objective == "traffic"
    compute = tiers.measure_compute(loaded.model, loaded.batch) if by_time else None
    made = tiers.plan(
        loaded.model,
        specs,
        budgets,
        options.objective,
        scores=scores,
        compute_seconds=compute,
        overhead=tiers.measure_overhead() if by_time else tiers.Overhead(),
        buffers=options.buffers,
        keep_largest=options.keep_largest,
        fractions=options.fractions,
        seed=options.seed,
    )
    save(made, options.out)
    _print(options, _summary(made), f"{made}\nwritten to {options.out}")


def _summary(plan: Plan) -> dict[str, Any]:
    return {
        "objective": plan.objective,
        "fingerprint": plan.fingerprint,
        "buffer_bytes": plan.buffer_bytes,
        "budgets": plan.budgets,
        "bytes": plan.bytes_by_tier(),
        "tiers": [asdict(tier) for tier in plan.tiers],
        "units": {name: placement._asdict() for name, placement in plan.placements.items()},
    }


def _analyze(options: argparse.Namespace) -> None:
    made = load(options.hints, load_model(options.model).model if options.model else None)
    width = max([len(name) for name in made.placements], default=4)
    rows = [f"{'unit':<{width}}  {'tier':<10} {'stored':>10} {'codec':<10} {'score':>10}"]
    for name, placement in made.placements.items():
        score = "" if placement.score is None else f"{placement.score:.4g}"
        stored = format_bytes(placement.nbytes)
        rows.append(f"{name:<{width}}  {placement.tier:<10} {stored:>10} {placement.codec:<10} {score:>10}")
    total = sum(made.bytes_by_tier().values())
    kept = sum(count for name, count in made.bytes_by_tier().items() if made.specs[name].resident)
    rows += ["", str(made), f"{kept / max(total, 1):.1%} of the weights stay resident"]
    _print(options, _summary(made), "\n".join(rows))


def _predict(options: argparse.Namespace) -> None:
    if options.stream is not None:
        results = [
            tiers.stream(options.stream, bits, PRESETS[name], device_bytes=options.device_memory)
            for bits in (4, 16)
            for name in ("PCIe4", "PCIe5", "NVMe4")
        ]
        head = f"{'from':<10} {'GB/s':>6} {'bits':>5} {'weights':>10} {'resident':>10} {'s/token':>9} {'tokens/s':>9}"
        rows = [head, "-" * len(head)]
        content = []
        for name, each in zip(("PCIe4", "PCIe5", "NVMe4") * 2, results, strict=True):
            rows.append(
                f"{name:<10} {each.tier.bandwidth_gb_s:>6.1f} {each.bits:>5.0f} {format_bytes(each.weight_bytes):>10} "
                f"{format_bytes(each.resident_bytes):>10} {each.seconds_per_token:>9.3f} {each.tokens_per_second:>9.4f}"
            )
            content.append({"from": name, **asdict(each), "tokens_per_second": each.tokens_per_second})
        rows.append("every weight is read for every token; computing, activations and the KV cache are free: a bound")
        _print(options, {"stream": content}, "\n".join(rows))
        return
    if options.hints is None or options.model is None:
        raise ValueError("predict: expected a hints file and --model, or --stream")
    loaded = _model(options)
    made = load(options.hints, loaded.model)
    prediction = tiers.predict(loaded.model, made, loaded.batch)
    if options.plot is not None:
        prediction.plot(options.plot)
    _print(options, prediction.as_dict(), str(prediction))


def _bench(options: argparse.Namespace) -> None:
    if options.num_iterations < 1:
        raise ValueError(f"num iterations: expected one or more, got {options.num_iterations}")
    loaded = _model(options)
    made = load(options.tier_hints, loaded.model)
    results: dict[str, dict[str, float]] = {}
    if options.baseline:
        results["baseline"] = _timed(loaded, options, "baseline")
    with tiers.attach(loaded.model, made, mode=options.mode, folder=options.folder):
        results["tiered"] = _timed(loaded, options, options.mode)
    rows = []
    for title, name in (("Baseline Results", "baseline"), ("Tiered Results", "tiered")):
        if name in results:
            rows += [
                f"{title}:",
                f"  Mean latency: {results[name]['mean_ms']:.2f} ms",
                f"  Median latency: {results[name]['median_ms']:.2f} ms",
                f"  Throughput: {results[name]['throughput']:.0f} {loaded.unit}/s",
                "",
            ]
    if options.baseline:
        before, after = results["baseline"], results["tiered"]
        results["impact"] = {
            "latency_overhead_percent": 100 * (after["mean_ms"] / before["mean_ms"] - 1),
            "throughput_degradation_percent": 100 * (after["throughput"] / before["throughput"] - 1),
        }
        rows += [
            "Impact:",
            f"  Latency overhead: {results['impact']['latency_overhead_percent']:+.1f}%",
            f"  Throughput degradation: {results['impact']['throughput_degradation_percent']:+.1f}%",
        ]
    _print(options, {"mode": options.mode, "throughput_unit": f"{loaded.unit}/s", **results}, "\n".join(rows).rstrip())


def _timed(loaded: Loaded, options: argparse.Namespace, label: str) -> dict[str, float]:
    """Latencies of a forward, after two that warm up: the first teaches the order of the layers."""
    seconds = []
    for turn in tqdm(range(options.num_iterations + 2), desc=label, disable=options.json or None, leave=False):
        start = time.perf_counter()
        with torch.inference_mode():
            loaded.forward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if turn >= 2:
            seconds.append(time.perf_counter() - start)
    mean = statistics.fmean(seconds)
    return {"mean_ms": 1e3 * mean, "median_ms": 1e3 * statistics.median(seconds), "throughput": loaded.items / mean}
