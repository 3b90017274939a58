"""Everything that only a GPU can say: right first, then under compute-sanitizer, then how fast.

Peers run in the same process: each side is a CUDA graph over copies of its weight that together are several times the
L2 cache, and the graphs take turns. A ratio is that of the medians; above 1, Infold is faster.

Run on a machine with a GPU, nvcc and torch, from the folder that `make gpu-bundle` wrote:
python gpu_check.py [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if (HERE / "infold").is_dir():
    # The bundle: the library, its tests, and what runs these.
    sys.path[:0] = [str(HERE), str(HERE / "packages")]

import infold  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from infold._library import ops  # noqa: E402
from infold.packed import Packed, lay_out, pack  # noqa: E402
from torch import Tensor  # noqa: E402

CUDA = next(folder for folder in (HERE / "cuda", HERE.parent / "cuda") if folder.is_dir())
TESTS = next(path for folder in (HERE, HERE.parent / "python_tests") if (path := folder / "test_device.py").is_file())
#: Of the window layout, in bytes.
HEAD, TILE = 16, 1536
#: Of Llama-3-8B and 70B, as (in_features, out_features).
SHAPES = {
    "8B": ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256)),
    "70B": ((8192, 10240), (8192, 57344), (28672, 8192)),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
#: Copies of a weight take at least this together: several times the L2 cache.
COPIES_BYTES = 400e6
#: Goals of lossless bfloat16 against cuBLAS, geometric mean over the 8B shapes.
GOALS = {1: 1.25, 2: 1.15, 4: 1.15, 8: 1.15, 16: 1.15, 64: 0.95, 1024: 0.9, 4096: 0.9}


def correctness() -> None:
    """Runs the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "-p", "no:cacheprovider", str(TESTS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print("\n".join(result.stdout.strip().splitlines()[-30:]))
    result.check_returncode()


def small() -> None:
    """A case of each kernel, for the sanitizer."""
    for rows, cols in ((16, 64), (33, 200), (70, 1000)):
        linear = torch.nn.Linear(cols, rows, dtype=torch.bfloat16)
        linear.weight.data[0, 0] = 1e20
        packed = infold.nn.FusedDecompressLinear.from_linear(linear, infold.FusedConfig("lossless")).cuda()
        for batch in (1, 8, 9, 16, 17):
            packed(torch.randn(batch, cols, dtype=torch.bfloat16, device="cuda"))
        embedding = torch.nn.Embedding(rows, cols, dtype=torch.bfloat16)
        table = infold.nn.FusedDecompressEmbedding.from_embedding(embedding, infold.FusedConfig("lossless")).cuda()
        table(torch.arange(rows, device="cuda"))
    torch.cuda.synchronize()


def sanitize() -> dict[str, str]:
    """Runs the small cases under compute-sanitizer's checkers; what each said last."""
    said = {}
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", sys.executable, __file__, "--small"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = result.stdout.strip().splitlines()
        said[tool] = f"status {result.returncode}; {lines[-1] if lines else ''}"
        print(f"{tool}: {said[tool]}")
        if result.returncode:
            print("\n".join(lines[:40]), result.stderr[-2000:])
        result.check_returncode()
    return said


def gaussian(rows: int, cols: int) -> Tensor:
    return (torch.randn(rows, cols) * 0.02).bfloat16()


def windows_of(weight: Tensor) -> tuple[list[Packed], tuple[object, ...]]:
    """Copies of a weight on the GPU, and the integers that operators take."""
    packed = lay_out(pack(weight, infold.FusedConfig("lossless")), "window")
    count = max(2, int(COPIES_BYTES / packed.nbytes) + 1)
    on_device = [tensor.cuda() for tensor in packed]
    copies = [Packed(on_device[0].clone(), *on_device[1:]) for _ in range(count)]
    return copies, (0, 2, *weight.shape, torch.bfloat16)


def graph_of(runs: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def interleaved(sides: dict[str, list[Callable[[], object]]], repeats: int = 30) -> dict[str, float]:
    """Median microseconds of one run of each side, the sides' graphs in turn."""
    graphs = {name: (graph_of(runs), len(runs)) for name, runs in sides.items()}
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


def linear_rates(rows_out: list[dict[str, Any]]) -> None:
    """Each shape and batch against cuBLAS, and against unpacking before it."""
    ratios: dict[int, list[float]] = {}
    for model, shapes in SHAPES.items():
        for cols, rows in shapes:
            weight = gaussian(rows, cols)
            windows, layout = windows_of(weight)
            denses = [weight.cuda() for _ in windows]
            for batch in BATCHES:
                x = torch.randn(batch, cols, device="cuda").bfloat16()

                def ours(w: Packed, exact: bool, x: Tensor = x, layout: tuple[object, ...] = layout) -> Tensor:
                    return ops.fused_linear(x, *w[:3], None, None, *layout, exact)  # type: ignore[no-any-return]

                medians = interleaved(
                    {
                        "ours": [lambda w=w: ours(w, False) for w in windows],  # type: ignore[misc]
                        "unpack, cuBLAS": [lambda w=w: ours(w, True) for w in windows],  # type: ignore[misc]
                        "cuBLAS": [lambda w=w, x=x: F.linear(x, w) for w in denses],  # type: ignore[misc]
                    }
                )
                ratio = medians["cuBLAS"] / medians["ours"]
                rate = windows[0].nbytes / medians["ours"] / 1e3
                if model == "8B":
                    ratios.setdefault(batch, []).append(ratio)
                print(
                    f"{cols:6} -> {rows:6}, batch {batch:4}: {medians['ours']:8.2f} us, "
                    f"cuBLAS {medians['cuBLAS']:8.2f}, "
                    f"unpacked {medians['unpack, cuBLAS']:8.2f}; {ratio:5.2f}x, {rate:6.0f} GB/s"
                )
                case = f"linear {cols}->{rows}, batch {batch}"
                rows_out.append({"case": case, "microseconds": medians, "ratio": ratio, "gb_per_s": rate})
            del windows, denses
            torch.cuda.empty_cache()
    for batch, values in ratios.items():
        mean = statistics.geometric_mean(values)
        print(f"8B, batch {batch:4}: {mean:5.2f}x cuBLAS, geometric mean; goal {GOALS.get(batch, '-')}")
        rows_out.append({"case": f"8B, batch {batch}", "ratio": mean, "goal": GOALS.get(batch)})


def decoder_rate(rows_out: list[dict[str, Any]]) -> None:
    """The decoder alone, on a grid that fills the GPU, and unpacking, against a copy of as many bytes."""
    rows, cols = 28672, 8192
    windows, layout = windows_of(gaussian(rows, cols))
    payload = windows[0].payload
    tiles = payload[HEAD : HEAD + rows * cols * 12 // 8]
    base = int(payload[:4].cpu().view(torch.int32))
    launch = build()
    blocks = 8 * torch.cuda.get_device_properties(0).multi_processor_count
    digests = torch.empty(blocks * 256, dtype=torch.int32, device="cuda")
    count = tiles.numel() // TILE
    target = torch.empty_like(tiles)

    def decode() -> None:
        arguments = (ctypes.c_void_p(tiles.data_ptr()), ctypes.c_uint32(count), ctypes.c_uint32(base))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = launch.infold_launch_window_rate(*arguments, ctypes.c_void_p(digests.data_ptr()), blocks, stream)
        if status:
            raise RuntimeError(f"a launch failed with status {status}")

    def unpack() -> Tensor:
        return ops.unpack(*windows[0][:3], None, *layout)  # type: ignore[no-any-return]

    medians = interleaved({"decode": [decode] * 4, "unpack": [unpack] * 2, "copy": [lambda: target.copy_(tiles)] * 4})
    weights, read = count * 1024 / medians["decode"] / 1e6, tiles.nbytes / medians["decode"] / 1e3
    written, copied = 2 * rows * cols / medians["unpack"] / 1e3, 2 * tiles.nbytes / medians["copy"] / 1e3
    print(
        f"decoder alone: {weights:.2f} T weights/s, {read:.0f} GB/s read; "
        f"unpacking writes {written:.0f} GB/s (goal 1500); a copy moves {copied:.0f} GB/s"
    )
    rows_out.append({"case": "decoder alone", "t_weights_per_s": weights, "gb_per_s": read, "copy_gb_per_s": copied})
    rows_out.append({"case": "unpack", "gb_per_s": written, "goal": 1500})


def build() -> ctypes.CDLL:
    """The kernel that decodes and nothing more, which the library has no operator for."""
    capability = "{}{}".format(*torch.cuda.get_device_capability())
    arch = "90a" if capability == "90" else capability
    target = Path(tempfile.mkdtemp()) / "kernels.so"
    command = ["nvcc", "-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", f"-I{CUDA}", "-o", str(target)]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(HERE / "gpu_launch.cu")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--small", action="store_true", help="a small case of each kernel, and nothing else")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.small:
        small()
        return
    correctness()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": []}
    result["sanitizer"] = sanitize()
    try:
        decoder_rate(result["rows"])
        linear_rates(result["rows"])
    finally:
        # What was measured before an error is not lost.
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
