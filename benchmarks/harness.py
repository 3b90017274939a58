"""What every benchmark shares: interleaved timing, the table, the JSON.

Absolute times mean nothing on a noisy machine, so a row is a ratio: ours and the peer run in turn in one process, warm,
and the ratio is that of the medians. Above 1, Infold is faster.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], object]


def parse_arguments(
    description: str | None, add_options: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """The options of every benchmark, and those that ``add_options`` adds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, under a minute")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="PyTorch's intra-op threads")
    parser.add_argument("--isa", help="an instruction set to hold everything to: avx2")
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on each run of a case")
    if add_options:
        add_options(parser)
    arguments = parser.parse_args()
    if arguments.isa and os.environ.get("INFOLD_ISA") != arguments.isa:
        # The libraries read it when they are loaded: start again.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_isa_environment(arguments.isa)})
    torch.set_num_threads(arguments.threads)
    return arguments


def _isa_environment(isa: str) -> dict[str, str]:
    """What holds Infold and its peers (ATen, oneDNN, MKL) to an instruction set."""
    peers = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    return {"INFOLD_ISA": isa, **(peers if isa == "avx2" else {})}


def interleaved_medians(runs: Mapping[str, Run], seconds: float) -> dict[str, float]:
    """Median milliseconds of each run, all of them in turn, after two warm-up rounds."""
    for _ in range(2):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def rotate(make: Callable[[int], Run], copies: int) -> Run:
    """A run that uses another copy of its data each time, so that caches hold none of it."""
    runs = [make(index) for index in range(copies)]
    turn = 0

    def run() -> object:
        nonlocal turn
        turn = (turn + 1) % copies
        return runs[turn]()

    return run


def machine_rates(dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """(multiply-adds in a dtype, bytes read) a millisecond that this machine shows: the terms of a floor."""
    a, b = torch.randn(1024, 2048).to(dtype), torch.randn(2048, 1024).to(dtype)
    data = torch.ones(1 << 26)
    medians = interleaved_medians({"product": lambda: a @ b, "read": lambda: data.sum()}, 0.5)
    return 1024 * 2048 * 1024 / medians["product"], data.numel() * 4 / medians["read"]


class Results:
    """Rows of one benchmark."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        case: str,
        peer: str,
        ours_ms: float,
        peer_ms: float | None,
        goal: float | None = None,
        floor_ms: float | None = None,
        note: str = "",
        **extra: object,
    ) -> None:
        """Adds and prints a row; a peer that could not run has no time and a note that says why.

        ``extra`` goes into the JSON only.
        """
        ratio = None if peer_ms is None else peer_ms / ours_ms
        row = {
            "case": case,
            "peer": peer,
            "ours_ms": ours_ms,
            "peer_ms": peer_ms,
            "ratio": ratio,
            "goal": goal,
            "floor_ms": floor_ms,
            "note": note,
            **extra,
        }
        if not self.rows:
            print(f"{'case':<50} {'peer':<22} {'ours ms':>9} {'peer ms':>9} {'ratio':>7} {'goal':>6} {'floor ms':>9}")
        self.rows.append(row)

        def show(value: float | None, digits: int) -> str:
            return "-" if value is None else f"{value:.{digits}f}"

        print(
            f"{case:<50} {peer:<22} {show(ours_ms, 3):>9} {show(peer_ms, 3):>9} {show(ratio, 2):>7} "
            f"{show(goal, 2):>6} {show(floor_ms, 3):>9}  {note}",
            flush=True,
        )

    def write(self, **extra: object) -> None:
        """Writes the JSON, if a file was asked for."""
        if self.arguments.json is None:
            return
        result = {
            "machine": machine(),
            "threads": self.arguments.threads,
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "torch": torch.__version__,
            **extra,
            "rows": self.rows,
        }
        self.arguments.json.parent.mkdir(parents=True, exist_ok=True)
        self.arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def machine() -> str:
    """The processor's name and instruction set."""
    import infold

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {infold.build_info()['cpu']}"


def commit() -> str:
    """The commit that is measured."""
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"
