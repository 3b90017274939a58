"""Training a transformer stack with its activations in memory, recomputed (torch.utils.checkpoint), and on disk.

Each way runs in processes of its own, the ways in turn: a step's median time, and the process's peak memory above what
it held when the model, its gradients and the data were there. A row compares a way with keeping everything. bfloat16 is
by autocast. All have MALLOC_MMAP_THRESHOLD_=1000000, with which the C library returns what is freed, unless
--default-malloc is given.

Run: python benchmarks/tier_activations.py [--quick] [--threads N] [--folder F] [--rounds N] [--default-malloc]
    [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Results, parse_arguments
from infold.tiers import offload_activations
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WAYS = ("everything in memory", "checkpoint", "disk", "disk, lossless", "disk, int8")
#: blocks, width, batch, tokens
SHAPE, QUICK = (6, 512, 4, 512), (3, 256, 4, 256)
STEPS = 2
BUFFER = 64 << 20


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.second(x))))


def status(field: str) -> int:
    """Bytes of the process: VmRSS, VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def measure(way: str, shape: tuple[int, ...], folder: str) -> dict[str, Any]:
    """One process's figures."""
    torch.manual_seed(0)
    blocks, width, batch, tokens = shape
    model = nn.ModuleList(Block(width) for _ in range(blocks))
    x = torch.randn(batch, tokens, width)
    dtype = torch.bfloat16
    pack = {"disk, lossless": "lossless", "disk, int8": "int8"}.get(way)
    offload = offload_activations(model, folder=folder, buffer_bytes=BUFFER, pack=pack)  # type: ignore[arg-type]

    def step(x: Tensor) -> Tensor:
        model.zero_grad(set_to_none=False)
        with torch.autocast("cpu", dtype):
            for block in model:
                x = checkpoint(block, x, use_reentrant=False) if way == "checkpoint" else block(x)
        loss = x.float().square().mean()
        loss.backward()
        return loss.detach()

    step(x[:1, :16])  # warms up, and makes the gradients
    begun = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    times = []
    with offload if way.startswith("disk") else nullcontext():
        for _ in range(1 + STEPS):
            start = time.perf_counter()
            step(x)
            times.append(time.perf_counter() - start)
    counters = offload.counters
    norms = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.save(norms, Path(folder) / f"gradients of {way}")
    return {
        "seconds": times[1:],
        "peak_bytes": status("VmHWM") - begun,
        "waited": counters.waited / (1 + STEPS),
        "offloaded": counters.bytes_offloaded // (1 + STEPS),
        "stored": counters.bytes_stored // (1 + STEPS),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the file of the disk tier lies")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each way")
    parser.add_argument("--default-malloc", action="store_true", help="leave freed memory to the C library")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def main() -> None:
    arguments = parse_arguments(__doc__, add_options)
    shape = QUICK if arguments.quick else SHAPE
    if arguments.child:
        print(json.dumps(measure(arguments.child, shape, arguments.folder)))
        return
    environment = {**os.environ, **({} if arguments.default_malloc else {"MALLOC_MMAP_THRESHOLD_": "1000000"})}
    figures: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    differences = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for _ in range(1 if arguments.quick else arguments.rounds):
            for way in WAYS:
                command = [sys.executable, __file__, "--child", way, "--folder", folder]
                command += ["--threads", str(arguments.threads), *(["--quick"] if arguments.quick else [])]
                output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
                figures[way].append(json.loads(output.splitlines()[-1]))
        expected = torch.load(Path(folder) / f"gradients of {WAYS[0]}")
        for way in WAYS:
            gradients = torch.load(Path(folder) / f"gradients of {way}")
            differences[way] = float((gradients - expected).norm() / expected.norm())
    results = Results(arguments)

    def median(way: str, field: str) -> float:
        values = [figure[field] for figure in figures[way]]
        flat = [value for each in values for value in each] if field == "seconds" else values
        return float(statistics.median(flat))

    everything = 1e3 * median(WAYS[0], "seconds")
    for way in WAYS:
        megabytes = {field: median(way, field) / 1e6 for field in ("peak_bytes", "offloaded", "stored")}
        results.add(
            "x".join(map(str, shape)) + ", " + way,
            WAYS[0],
            1e3 * median(way, "seconds"),
            everything,
            note=f"peak {megabytes['peak_bytes']:.0f} MB, waited {1e3 * median(way, 'waited'):.0f} ms a step, "
            f"offloaded {megabytes['offloaded']:.0f} MB, stored {megabytes['stored']:.0f} MB, "
            f"gradients differ by {differences[way]:.2g}",
            peak_mb=megabytes["peak_bytes"],
            waited_ms=1e3 * median(way, "waited"),
            offloaded_mb=megabytes["offloaded"],
            stored_mb=megabytes["stored"],
            relative_gradient_difference=differences[way],
        )
    results.write(buffer_bytes=BUFFER, steps=STEPS, default_malloc=arguments.default_malloc)


if __name__ == "__main__":
    main()
