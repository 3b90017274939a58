"""Everything that only a GPU can say: right first, then under compute-sanitizer, then how fast.

Peers run in the same process: each side is a CUDA graph over copies of its weight that together are several times the
L2 cache, and the graphs take turns. A ratio is that of the medians; above 1, Infold is faster.

Run on a machine with a GPU, nvcc and torch, from the folder that `make gpu-bundle` wrote:
python gpu_check.py [--json FILE]
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if (HERE / "infold").is_dir():
    # The bundle: the library, its tests, and what runs these where the machine has none.
    sys.path.insert(0, str(HERE))
    sys.path.append(str(HERE / "packages"))

import gpu_frequency  # noqa: E402
import gpu_peers  # noqa: E402
import infold  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from infold._library import ops  # noqa: E402
from infold.packed import LAYOUTS, Packed, lay_out, pack  # noqa: E402
from torch import Tensor  # noqa: E402

CUDA = next(folder for folder in (HERE / "cuda", HERE.parent / "cuda") if folder.is_dir())
TESTS = next(folder for folder in (HERE, HERE.parent / "python_tests") if (folder / "test_device.py").is_file())
#: Of each layout: bits of a weight in its tile, and words between head and tiles.
TILES = {
    "window": (12, 0),
    "codes4": (4, 16),
    "codes5": (5, 32),
    "codes8": (8, 256),
    "pairs": (8, 1024),
    "pairs_of_levels": (0, 3072),
}
CONFIGS = {
    "lossless": infold.FusedConfig("lossless"),
    "ecsq 3 bits": infold.FusedConfig("ecsq", bits=3),
    "ecsq 4 bits": infold.FusedConfig("ecsq", bits=4),
    "int8": infold.FusedConfig("int8"),
    "int4 g128": infold.FusedConfig("int4"),
}
#: Those whose weights are coded in pairs too.
PAIRS = ("lossless", "ecsq 3 bits", "ecsq 4 bits", "int4 g128")
#: Each format as it lies on the GPU.
CASES = [(name, form) for form in ("device", "pairs") for name in CONFIGS if form == "device" or name in PAIRS]
#: Of Llama-3-8B and 70B, as (in_features, out_features).
SHAPES = {
    "8B": ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256)),
    "70B": ((8192, 10240), (8192, 57344), (28672, 8192)),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
#: Copies of a weight take at least this together: several times the L2 cache.
COPIES_BYTES = 400e6
#: Times as fast as cuBLAS in bfloat16, geometric mean over the 8B shapes.
GOALS = {
    "lossless": {1: 1.25, 2: 1.15, 4: 1.15, 8: 1.15, 16: 1.15, 64: 0.95, 1024: 0.9, 4096: 0.9},
    "ecsq 4 bits": {1: 2.1, 16: 1.8},
}
#: Of quantised formats, which differ from the lossless one where the product is fused.
FUSED_BATCHES = (1, 4, 16, 64, 256)


def correctness(wanted: str | None) -> None:
    """Runs the tests that need a GPU (those that pytest's -k finds), in several processes if pytest-xdist is there."""
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-n16"] if importlib.util.find_spec("xdist") else []
    command += ["-k", wanted] if wanted else []
    own = importlib.util.find_spec("pytest")
    brought = [str(HERE / "packages")] if own and own.origin and own.origin.startswith(str(HERE)) else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path[:1], *brought])}
    tests = sorted(map(str, TESTS.glob("test_device*.py")))
    subprocess.run([*command, *tests], env=environment, check=True)


def small() -> None:
    """A case of each kernel, for the sanitizer."""
    for name, form in CASES:
        config = CONFIGS[name]
        for rows, cols in ((16, 128), (33, 200), (70, 1000)):
            linear = torch.nn.Linear(cols, rows, dtype=torch.bfloat16)
            linear.weight.data[0, 0] = 1.5
            pack(linear.weight.data.cuda(), config)
            packed = infold.nn.FusedDecompressLinear.from_linear(linear, config).cuda()
            packed.lay_out(form)
            for batch, dtype in itertools.product((1, 8, 9, 16, 17, 65, 129), (torch.bfloat16, torch.float16)):
                x = torch.randn(batch, cols, dtype=dtype, device="cuda", requires_grad=True)
                packed(x).sum().backward()
            embedding = torch.nn.Embedding(rows, cols, dtype=torch.bfloat16)
            rows_of = infold.nn.FusedDecompressEmbedding.from_embedding(embedding, config).cuda()
            rows_of.lay_out(form)
            rows_of(torch.arange(rows).cuda())
    for block, batch in itertools.product((16, 32, 64, 128, 256), (1, 5, 70)):
        layer = infold.nn.FrequencyLinear(200, 330, block).cuda()
        layer(torch.randn(batch, 200, dtype=torch.bfloat16, device="cuda", requires_grad=True)).sum().backward()
    torch.cuda.synchronize()


#: compute-sanitizer's, and the seconds that each may take: racecheck has never been seen to end.
CHECKERS = {"memcheck": 600, "racecheck": 300}


def sanitize(tools: list[str]) -> dict[str, str]:
    """Runs the small cases under compute-sanitizer's checkers; what each said last."""
    said: dict[str, str] = {}
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the PATH")
        return {}
    # Each tensor in memory of its own, so that what reads beyond one is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in tools:
        command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", "--kernel-regex=kns=infold_"]
        # PyTorch asks the driver for what may not be there, on purpose.
        command += ["--report-api-errors=no"] if tool == "memcheck" else []
        command += [sys.executable, __file__, "--only=small"]
        # With all that it started, which would go on on the GPU.
        command = ["timeout", "--kill-after=10", str(CHECKERS[tool]), *command]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = result.stdout.strip().splitlines()
        status = f"stopped after {CHECKERS[tool]} s" if result.returncode == 124 else f"status {result.returncode}"
        said[tool] = f"{status}; {lines[-1] if lines else ''}"
        print(f"{tool}: {said[tool]}")
        if result.returncode:
            print("\n".join(lines[:40]), result.stderr[-2000:])
        # What racecheck makes of bulk copies and warpgroups is to be read.
        if tool == "memcheck":
            result.check_returncode()
    return said


#: What Nsight Compute is asked for: how long, and shares of the peaks of memory, issue slots and the integer pipe.
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of memory",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "% of issue slots",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": "% of integers",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank conflicts",
}


def profiled() -> None:
    """Each product once, for the profiler."""
    for name, form in CASES:
        linear = torch.nn.Linear(4096, 14336, dtype=torch.bfloat16, device="cuda")
        packed = infold.nn.FusedDecompressLinear.from_linear(linear.cpu(), CONFIGS[name]).cuda()
        packed.lay_out(form)
        for batch in (1, 16, 64, 256):
            x = torch.randn(batch, 4096, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            packed(x).sum().backward()
    torch.cuda.synchronize()


def profile(rows_out: list[dict[str, Any]]) -> None:
    """Where each kernel's time goes, by Nsight Compute."""
    if shutil.which("ncu") is None:
        print("ncu is not on the PATH")
        return
    command = ["ncu", "--csv", "--metrics", ",".join(METRICS), "--kernel-name", "regex:infold_"]
    command += [sys.executable, __file__, "--only=profiled"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), None)
    if result.returncode or start is None:
        # Counters may be for administrators alone.
        print(f"ncu ended with status {result.returncode}:", *lines[-3:], sep="\n")
        return
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[start:]):
        kernel = kernels.setdefault(row["ID"], {"case": f"profile, {row['Kernel Name']}"})
        kernel[METRICS[row["Metric Name"]]] = row["Metric Value"]
    for kernel in kernels.values():
        print(", ".join(f"{name} {value}" for name, value in kernel.items()), flush=True)
        rows_out.append(kernel)


def gaussian(rows: int, cols: int) -> Tensor:
    return (torch.randn(rows, cols, device="cuda") * 0.02).bfloat16()


def copies_of(weight: Tensor, name: str, form: str) -> tuple[list[Packed], str, tuple[object, ...]]:
    """Copies of a weight on the GPU, the name of their layout, and the integers that operators take."""
    packed = lay_out(pack(weight, CONFIGS[name]), form)
    number = ops.inspect_packed(*(tensor.cpu() for tensor in packed[:3]))[2]
    count = max(2, int(COPIES_BYTES / packed.nbytes) + 1)
    copies = [Packed(packed.payload.clone(), *packed[1:]) for _ in range(count)]
    return copies, LAYOUTS[number], (0, number, *weight.shape, torch.bfloat16)


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


def copies_of_dense(weight: Tensor) -> list[Tensor]:
    return [weight.clone() for _ in range(max(2, int(COPIES_BYTES / weight.nbytes) + 1))]


def product_row(
    name: str, weight: Tensor, form: str, batches: tuple[int, ...], with_peers: bool = False
) -> Iterator[dict[str, Any]]:
    """One format of one weight by batches against cuBLAS, and against unpacking before it."""
    rows, cols = weight.shape
    copies, layout, numbers = copies_of(weight, name, form)
    scales = copies[0].scales if copies[0].scales.numel() else None
    denses = copies_of_dense(weight)
    peers = gpu_peers.products_of(name, weight, COPIES_BYTES) if with_peers else {}
    for batch in batches:
        x = torch.randn(batch, cols, device="cuda").bfloat16()

        def ours(w: Packed, exact: bool, x: Tensor = x) -> Tensor:
            return ops.fused_linear(x, *w[:3], scales, None, *numbers, exact)  # type: ignore[no-any-return]

        medians = interleaved(
            {
                "ours": [lambda w=w: ours(w, False) for w in copies],  # type: ignore[misc]
                "unpack, cuBLAS": [lambda w=w: ours(w, True) for w in copies[:8]],  # type: ignore[misc]
                "cuBLAS": [lambda w=w, x=x: F.linear(x, w) for w in denses],  # type: ignore[misc]
                **gpu_peers.runs_of(peers, x),
            }
        )
        ratio, rate = medians["cuBLAS"] / medians["ours"], copies[0].nbytes / medians["ours"] / 1e3
        case = f"{name} ({layout}), {cols} -> {rows}, batch {batch}"
        times = ", ".join(f"{side} {microseconds:.2f}" for side, microseconds in medians.items())
        print(f"{case:48} us: {times}; {ratio:5.2f}x, {rate:6.0f} GB/s", flush=True)
        yield {"case": case, "batch": batch, "microseconds": medians, "ratio": ratio, "gb_per_s": rate}


def linear_rates(rows_out: list[dict[str, Any]]) -> None:
    """Each format, shape and batch."""
    for name, form in CASES:
        ratios: dict[int, list[float]] = {}
        for cols, rows in SHAPES["8B"]:
            for row in product_row(name, gaussian(rows, cols), form, BATCHES if name == "lossless" else FUSED_BATCHES):
                ratios.setdefault(row["batch"], []).append(row["ratio"])
                rows_out.append(row)
            torch.cuda.empty_cache()
        for batch, values in ratios.items():
            mean, goal = statistics.geometric_mean(values), GOALS.get(name, {}).get(batch)
            case = f"8B, {name} ({'pairs' if form == 'pairs' else 'fixed width'}), batch {batch}"
            print(f"{case}: {mean:5.2f}x cuBLAS, geometric mean; goal {goal}", flush=True)
            rows_out.append({"case": case, "ratio": mean, "goal": goal})
    for cols, rows in SHAPES["70B"]:
        for form in ("device", "pairs"):
            for row in product_row("lossless", gaussian(rows, cols), form, BATCHES):
                rows_out.append(row)
            torch.cuda.empty_cache()


def peer_rates(rows_out: list[dict[str, Any]]) -> None:
    """Other libraries' products of the same formats, on two shapes."""
    for name in gpu_peers.FORMATS:
        for cols, rows in ((4096, 4096), (4096, 28672)):
            for row in product_row(name, gaussian(rows, cols), "device", (1, 16, 64), with_peers=True):
                rows_out.append(row)
            torch.cuda.empty_cache()


class Weight(ctypes.Structure):
    """`InfoldWeight` of cuda/params.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("head", "values", "tiles", "escape_starts", "escapes", "scales")),
        *((name, ctypes.c_int32) for name in ("scales_are_bf16", "scale_stride", "rows", "cols")),
        ("payload_bytes", ctypes.c_uint64),
    )


def view_of(payload: Tensor, layout: str, rows: int, cols: int) -> Weight:
    """The kernels' view of a payload without scales, of whole tiles."""
    bits, words = TILES[layout]
    values = payload.data_ptr() + 16
    tiles = values + 4 * words
    starts = tiles + rows * cols * bits // 8
    # A stripe has so many runs of pairs at most, and their end.
    directory = 8 * (rows // 16) * (-(-cols // 64 // 5) + 1) if layout.startswith("pairs") else 0
    escapes = starts + -(-(4 * (rows + 1) + directory) // 16) * 16
    # Escapes lie at multiples of 16 bytes of the payload, which begins at one.
    return Weight(payload.data_ptr(), values, tiles, starts, escapes, None, 0, 0, rows, cols, payload.nbytes)


def decoder_rates(rows_out: list[dict[str, Any]]) -> None:
    """The decoders alone, on a grid that fills the GPU, and unpacking, against a copy of as many bytes."""
    rows, cols = 28672, 8192
    library = build()
    blocks = 4 * torch.cuda.get_device_properties(0).multi_processor_count
    digests = torch.empty(blocks * 256, dtype=torch.int32, device="cuda")
    weight = gaussian(rows, cols)
    dfloat11, unpacked = gpu_peers.dfloat11_of(weight), torch.empty_like(weight)
    for name, form in CASES:
        copies, layout, numbers = copies_of(weight, name, form)
        payload, scales = copies[0].payload, copies[0].scales if copies[0].scales.numel() else None
        view, size = view_of(payload, layout, rows, cols), payload.nbytes
        target, source = torch.empty_like(payload), payload

        def decode(number: object = numbers[1], view: Weight = view) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            pointers = ctypes.c_uint32(rows * cols // 1024), ctypes.c_void_p(digests.data_ptr()), blocks, stream
            status = library.infold_launch_rate(number, ctypes.byref(view), *pointers)
            if status:
                raise RuntimeError(f"a launch failed with status {status}")

        def unpack(w: Packed = copies[0], scales: Tensor | None = scales, numbers: Any = numbers) -> Tensor:
            return ops.unpack(*w[:3], scales, *numbers)  # type: ignore[no-any-return]

        def copy(target: Tensor = target, source: Tensor = source) -> Tensor:
            return target.copy_(source)

        sides: dict[str, list[Callable[[], object]]]
        sides = {"decode": [decode] * 4, "unpack": [unpack] * 2, "copy": [copy] * 4}
        if name == "lossless" and dfloat11:
            sides["DFloat11"] = [lambda: gpu_peers.decode(dfloat11, unpacked)] * 2
        medians = interleaved(sides)
        weights, read = rows * cols / medians["decode"] / 1e6, size / medians["decode"] / 1e3
        written, copied = 2 * rows * cols / medians["unpack"] / 1e3, 2 * size / medians["copy"] / 1e3
        print(
            f"{name} ({layout}): decoding {weights:.2f} T weights/s, {read:.0f} GB/s read; "
            f"unpacking writes {written:.0f} GB/s (goal 1500); a copy moves {copied:.0f} GB/s",
            flush=True,
        )
        rates = {"t_weights_per_s": weights, "gb_per_s": read, "copy_gb_per_s": copied, "unpacked_gb_per_s": written}
        if dfloat11 and "DFloat11" in medians:
            theirs = 2 * rows * cols / medians["DFloat11"] / 1e3
            print(f"DFloat11 writes {theirs:.0f} GB/s; {size} bytes packed here, {dfloat11.nbytes} there", flush=True)
            rates |= {"dfloat11_gb_per_s": theirs, "bytes": size, "dfloat11_bytes": dfloat11.nbytes}
        rows_out.append({"case": f"decoder alone, {name} ({layout})", **rates})
        del copies, payload, source, target


def seconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Median seconds of what waits for the device itself."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def layout_rates(rows_out: list[dict[str, Any]]) -> None:
    """Laying out from the canonical form, and packing."""
    rows, cols = 14336, 4096
    there = gaussian(rows, cols)
    weight = there.cpu()
    for name, config in CONFIGS.items():
        packed = Packed(*(tensor.cuda() for tensor in pack(weight, config)))
        rates = {"laid_out": rows * cols / seconds(lambda packed=packed: lay_out(packed, "device"))}  # type: ignore[misc]
        rates["packed"] = rows * cols / seconds(lambda config=config: pack(there, config))  # type: ignore[misc]
        print(
            f"{name}: " + ", ".join(f"{what} {rate / 1e9:.2f} G weights/s" for what, rate in rates.items()), flush=True
        )
        rows_out.append({"case": f"laying out, {name}, {cols} -> {rows}", "weights_per_s": rates})


def find_nvcc() -> Path:
    """Where nvcc may be, as build.rs looks for it."""
    beside_torch = Path(torch.__file__).parent.parent / "nvidia/cu13/bin/nvcc"
    named = (os.environ.get("NVCC"), os.path.join(os.environ.get("CUDA_HOME", ""), "bin/nvcc"), str(beside_torch))
    found = next((path for path in (*named, shutil.which("nvcc")) if path and Path(path).is_file()), None)
    if found is None:
        raise SystemExit("nvcc: expected it named by NVCC, under CUDA_HOME, beside torch or on the PATH")
    return Path(found)


def build() -> ctypes.CDLL:
    """The kernels that decode and do nothing more, which the library has no operators for."""
    capability = "{}{}".format(*torch.cuda.get_device_capability())
    arch = "90a" if capability == "90" else capability
    target = Path(tempfile.mkdtemp()) / "kernels.so"
    command = [str(find_nvcc()), "-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", f"-I{CUDA}", "-o", str(target)]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(HERE / "gpu_rate.cu")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


class Rows(list[dict[str, Any]]):
    """What was measured, written to a file row by row: a run that is cut short loses none."""

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self.path = path
        self.sanitizer: dict[str, str] = {}

    def append(self, row: dict[str, Any]) -> None:
        super().append(row)
        if self.path:
            about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "sanitizer": self.sanitizer}
            about |= {"peers": gpu_peers.versions(), "left_out": gpu_peers.left_out}
            self.path.write_text(json.dumps({**about, "rows": list(self)}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parts = (
        "tests",
        "sanitizer",
        "decoders",
        "layouts",
        "frequency",
        "linear",
        "peers",
        "profile",
        "memcheck",
        "racecheck",
        "small",
        "profiled",
    )
    parser.add_argument(
        "--only", nargs="+", choices=parts, help="these parts; small, profiled: what sanitizer and profiler run"
    )
    parser.add_argument("--tests", metavar="EXPRESSION", help="of the tests only these, as pytest's -k names them")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = Rows(arguments.json)
    wanted = arguments.only or parts[:8]
    checkers = [tool for tool in CHECKERS if tool in wanted or "sanitizer" in wanted]
    if "small" in wanted:
        small()
    if "tests" in wanted:
        correctness(arguments.tests)
    if checkers:
        rows.sanitizer = sanitize(checkers)
    if "decoders" in wanted:
        decoder_rates(rows)
    if "layouts" in wanted:
        layout_rates(rows)
    if "frequency" in wanted:
        gpu_frequency.rates(rows, interleaved, COPIES_BYTES)
    if "linear" in wanted:
        linear_rates(rows)
    if "peers" in wanted:
        peer_rates(rows)
    if "profile" in wanted:
        profile(rows)
    if "profiled" in wanted:
        profiled()


if __name__ == "__main__":
    main()
