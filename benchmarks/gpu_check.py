"""The GPU kernels on a GPU: right first, then under compute-sanitizer, then how fast. Builds them with nvcc there.

Weights are bfloat16, laid out on the host by the functions that the host tests check. Peers run in the same process:
each side is a CUDA graph over copies of its weight that together are several times the L2 cache, and the graphs take
turns.

Run on a machine with a GPU, nvcc and torch: python gpu_check.py [--json FILE] [--small]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
CUDA = next(folder for folder in (HERE / "cuda", HERE.parent / "cuda") if folder.is_dir())
ROWS, COLS, TILE_WORDS, BASE = 16, 64, 384, 112
#: Of Llama-3-8B, as (in_features, out_features).
SHAPES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256))
BATCHES = (1, 2, 4, 8)
#: Copies of a weight take at least this together: several times the L2 cache.
COPIES_BYTES = 400e6


class WindowLinear(ctypes.Structure):
    """`InfoldWindowLinear` of cuda/params.h."""

    _fields_ = (
        ("tiles", ctypes.c_void_p),
        ("escape_starts", ctypes.c_void_p),
        ("escapes", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("base", ctypes.c_uint32),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("batch", ctypes.c_int32),
    )


def build() -> ctypes.CDLL:
    """The kernels and their launches as a library."""
    capability = "{}{}".format(*torch.cuda.get_device_capability())
    arch = "90a" if capability == "90" else capability
    target = Path(tempfile.mkdtemp()) / "kernels.so"
    command = ["nvcc", "-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", "-Xptxas=-v", f"-I{CUDA}", "-o", str(target)]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(HERE / "gpu_launch.cu"), str(CUDA / "simulate.cpp")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    print(result.stderr)
    result.check_returncode()
    library = ctypes.CDLL(str(target))
    library.infold_simulate_window_encode.restype = ctypes.c_size_t
    return library


@dataclass
class Window:
    """A weight in the window layout, on the GPU."""

    shape: tuple[int, int]
    tiles: Tensor
    starts: Tensor
    escapes: Tensor

    @classmethod
    def of(cls, library: ctypes.CDLL, weight: Tensor) -> Window:
        """Lays out a (rows, cols) bfloat16 weight of the host."""
        rows, cols = weight.shape
        stripes, across = -(-rows // ROWS), -(-cols // COLS)
        tiles = torch.empty(stripes * across * TILE_WORDS, dtype=torch.int32)
        starts, escapes = torch.empty(stripes + 1, dtype=torch.int32), torch.empty(weight.numel(), 2, dtype=torch.int32)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, tiles, starts, escapes)]
        count = library.infold_simulate_window_encode(pointers[0], rows, cols, ctypes.c_uint32(BASE), *pointers[1:])
        # At least one, so that there is an address.
        return cls((rows, cols), tiles.cuda(), starts.cuda(), escapes[: max(count, 1)].cuda())

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes + self.starts.nbytes + self.escapes.nbytes

    def copy(self) -> Window:
        return Window(self.shape, self.tiles.clone(), self.starts.clone(), self.escapes.clone())

    def linear(self, library: ctypes.CDLL, x: Tensor, y: Tensor) -> None:
        """Launches y = x Wᵀ on the current stream."""
        rows, cols = self.shape
        pointers = [tensor.data_ptr() for tensor in (self.tiles, self.starts, self.escapes, x, y)]
        arguments = WindowLinear(*pointers, BASE, rows, cols, x.shape[0])
        check(library.infold_launch_linear_window(ctypes.byref(arguments), stream()))


def stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def check(status: int) -> None:
    if status:
        raise RuntimeError(f"a launch failed with status {status}")


def gaussian(rows: int, cols: int, scale: float) -> Tensor:
    return (torch.randn(rows, cols) * scale).bfloat16()


def correctness(library: ctypes.CDLL, small: bool) -> int:
    """Compares with float64; returns how many cases there were."""
    shapes = [(1, 1), (16, 64), (17, 65), (33, 200), (100, 4096), (4096, 100), (64, 8200)]
    shapes += [] if small else [(4096, 4096), (1000, 28672)]
    cases = 0
    for rows, cols in shapes:
        weight = gaussian(rows, cols, 0.05)
        weight[0, 0], weight[-1, -1] = 0.0, -1e20
        window = Window.of(library, weight)
        for batch in (1, 3, 8):
            x = gaussian(batch, cols, 1.0)
            y = torch.empty(batch, rows, dtype=torch.bfloat16, device="cuda")
            again = torch.empty_like(y)
            window.linear(library, x.cuda(), y)
            window.linear(library, x.cuda(), again)
            exact = x.double() @ weight.double().T
            # Of a bfloat16's rounding, and of sums in float32.
            allowed = exact.abs() / 256 + 1e-5 * (x.double().abs() @ weight.double().abs().T)
            error = (y.cpu().double() - exact).abs()
            if not bool((error <= allowed).all()) or not torch.equal(y, again):
                raise AssertionError(
                    f"{rows} x {cols}, batch {batch}: error {float((error / allowed).max()):.3g} of the allowed"
                )
            cases += 1
    return cases


def graph_of(runs: list[Callable[[], None]]) -> torch.cuda.CUDAGraph:
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def interleaved(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], repeats: int = 30) -> dict[str, float]:
    """Median microseconds of one run of each graph's, the graphs in turn."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(repeats + 3):
        for name, (graph, runs) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 3:
                times[name].append(1e3 * start.elapsed_time(end) / runs)
    return {name: statistics.median(values) for name, values in times.items()}


def linear_rates(library: ctypes.CDLL, rows_out: list[dict[str, Any]]) -> None:
    """Each shape and batch against cuBLAS."""
    for cols, rows in SHAPES:
        weight = gaussian(rows, cols, 0.02)
        window = Window.of(library, weight)
        count = max(2, int(COPIES_BYTES / window.nbytes) + 1)
        windows = [window.copy() for _ in range(count)]
        denses = [weight.cuda() for _ in range(count)]
        for batch in BATCHES:
            x = gaussian(batch, cols, 1.0).cuda()
            y = torch.empty(batch, rows, dtype=torch.bfloat16, device="cuda")
            ours = [lambda w=w, x=x, y=y: w.linear(library, x, y) for w in windows]  # type: ignore[misc]
            theirs = [lambda w=w, x=x: F.linear(x, w) for w in denses]  # type: ignore[misc]
            medians = interleaved({"ours": (graph_of(ours), count), "cuBLAS": (graph_of(theirs), count)})
            ratio = medians["cuBLAS"] / medians["ours"]
            rate = window.nbytes / medians["ours"] / 1e3
            print(
                f"{cols:6} -> {rows:6}, batch {batch}: {medians['ours']:8.2f} us, cuBLAS {medians['cuBLAS']:8.2f} us, "
                f"{ratio:5.2f}x, {rate:6.0f} GB/s"
            )
            rows_out.append(
                {
                    "case": f"linear {cols}->{rows}, batch {batch}",
                    "microseconds": medians,
                    "ratio": ratio,
                    "gb_per_s": rate,
                }
            )


def decoder_rate(library: ctypes.CDLL, rows_out: list[dict[str, Any]]) -> None:
    """The decoder alone, on a grid that fills the GPU, against a copy of as many bytes."""
    window = Window.of(library, gaussian(8192, 28672, 0.02))
    blocks = 8 * torch.cuda.get_device_properties(0).multi_processor_count
    digests = torch.empty(blocks * 256, dtype=torch.int32, device="cuda")
    count = window.tiles.numel() // TILE_WORDS
    arguments = (ctypes.c_void_p(window.tiles.data_ptr()), ctypes.c_uint32(count), ctypes.c_uint32(BASE))
    target = torch.empty_like(window.tiles)

    def decode() -> None:
        check(library.infold_launch_window_rate(*arguments, ctypes.c_void_p(digests.data_ptr()), blocks, stream()))

    def copy() -> None:
        target.copy_(window.tiles)

    medians = interleaved({"decode": (graph_of([decode] * 4), 4), "copy": (graph_of([copy] * 4), 4)})
    weights, read = count * ROWS * COLS / medians["decode"] / 1e6, window.tiles.nbytes / medians["decode"] / 1e3
    copied = 2 * window.tiles.nbytes / medians["copy"] / 1e3
    print(f"decoder alone: {weights:.2f} T weights/s, {read:.0f} GB/s read; a copy moves {copied:.0f} GB/s")
    rows_out.append({"case": "decoder alone", "t_weights_per_s": weights, "gb_per_s": read, "copy_gb_per_s": copied})


def sanitize() -> None:
    """Runs the small cases under compute-sanitizer's checkers."""
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", sys.executable, __file__, "--small"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        print(f"{tool}: status {result.returncode}; {result.stdout.strip().splitlines()[-1:]}")
        result.check_returncode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--small", action="store_true", help="small cases for correctness, and nothing else")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    library = build()
    print(f"correct: {correctness(library, arguments.small)} cases")
    if arguments.small:
        return
    sanitize()
    rows: list[dict[str, Any]] = []
    decoder_rate(library, rows)
    linear_rates(library, rows)
    if arguments.json:
        result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
