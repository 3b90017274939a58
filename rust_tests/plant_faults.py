"""Plants faults in the device code, one at a time, and checks that the tests of the emulated kernels see each.

Run: python rust_tests/plant_faults.py (or `make fault-test`)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "faults"
PARTS = ("src", "cuda", "rust_tests", "benchmarks", "build.rs", "Cargo.toml", "Cargo.lock")

WINDOW, TILE = "cuda/window.cuh", "cuda/window_tile.cuh"
LINEAR, UNPACK = "cuda/linear_window.cu", "cuda/unpack_window.cu"
LAUNCH, WEIGHT = "src/cuda/launch.rs", "src/cuda/weight.rs"
#: (what, file, code, code with the fault).
FAULTS = (
    ("word order of a tile", TILE, "word_index(lane, 4 * quad)", "word_index(lane ^ 1, 4 * quad)"),
    ("a step's words", TILE, "word(2 * step + 1), word(kRestWords", "word(2 * step), word(kRestWords"),
    ("mask of signs and mantissas", WINDOW, "kRestMask = 0x807f807f", "kRestMask = 0x807f803f"),
    ("exponent of the second register", WINDOW, "exponents << 3 & kExponentMask", "exponents << 4 & kExponentMask"),
    ("exponent of the fourth register", WINDOW, "exponents >> 5 & kExponentMask", "exponents >> 5 & 0x07800700"),
    ("base in the upper half", WINDOW, "base * 0x00800080u", "base * 0x00000080u"),
    ("end of the window", WINDOW, "if (exponent >= kWindow)", "if (exponent > kWindow)"),
    ("order of columns", LINEAR, "lane % 4 * 16);", "lane % 4 * 8);"),
    ("pair of x in a step", LINEAR, "x[group].pairs[2 * step + 1]);", "x[group].pairs[2 * step]);"),
    ("rows of x beyond the batch", LINEAR, "if (row >= p.batch || col >= cols)", "if (row > p.batch || col >= cols)"),
    ("columns beyond x", LINEAR, "if (col + i < cols) result.pairs", "if (col + i <= cols) result.pairs"),
    (
        "aligned loads of x",
        LINEAR,
        "reinterpret_cast<uintptr_t>(x) % 16 == 0",
        "reinterpret_cast<uintptr_t>(x) % 8 == 0",
    ),
    ("second group's rows", LINEAR, "group * kGroup + lane / 4,", "group * 4 + lane / 4,"),
    ("tiles of a warp", LINEAR, "start += kAhead * kWarps", "start += kWarps"),
    (
        "prefetch of the next tile",
        LINEAR,
        "const int next = tile + kAhead * kWarps;",
        "const int next = tile + kWarps;",
    ),
    ("place of a sum", LINEAR, "parts[warp][row + i / 2 * 8]", "parts[warp][row + i / 2 * 4]"),
    ("one warp's part", LINEAR, "for (int part = 0; part < kWarps", "for (int part = 1; part < kWarps"),
    ("the barrier before the sum", LINEAR, "__syncthreads();\n  const int out_row", "const int out_row"),
    ("what stands in for an escape", LINEAR, "(from_bf16(escape.bits) - filler_value)", "from_bf16(escape.bits)"),
    ("escapes of the stripe", LINEAR, "if (escape.row == row) sum +=", "if (escape.row >= row) sum +="),
    ("the bias", LINEAR, "from_bf16(p.bias[global_row])", "from_bf16(p.bias[out_row])"),
    ("rows beyond the weight", LINEAR, "global_row >= w.rows ||", ""),
    ("half of a run", UNPACK, "2 * half + (lower ? 1 : 0)", "2 * half + (lower ? 0 : 1)"),
    ("last columns of a run", UNPACK, "col + kRun <= cols", "col + kRun - 1 <= cols"),
    (
        "stripes' escapes when unpacked",
        UNPACK,
        "(first_row + escape.row) * w.cols",
        "(first_row + escape.row + 1) * w.cols",
    ),
    ("lane of an embedding's row", UNPACK, "row % 8 * 4 + part % 4)", "row % 8 * 4 + part % 2)"),
    ("an embedding's escapes", UNPACK, "if (escape.row == row) out", "if (escape.row != row) out"),
    ("blocks of a launch", LAUNCH, "div_ceil(STRIPE as u32)", "div_ceil(2 * STRIPE as u32)"),
    ("kernel for a batch", LAUNCH, "batch <= 8", "batch <= 9"),
    ("where escapes begin", WEIGHT, "self.starts().end.next_multiple_of(HEAD_BYTES)", "self.starts().end"),
)


def test_fails() -> bool:
    environment = {**os.environ, "CARGO_TARGET_DIR": str(COPY / "target")}
    command = ["cargo", "test", "--release", "--no-default-features", "--locked", "--quiet", "--test", "device"]
    return subprocess.run(command, cwd=COPY, env=environment, capture_output=True, check=False).returncode != 0


def main() -> int:
    COPY.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        shutil.rmtree(COPY / part, ignore_errors=True)
        copy(ROOT / part, COPY / part)
    if test_fails():
        print("the tests fail without a fault")
        return 1
    missed = []
    for what, file, code, fault in FAULTS:
        path = COPY / file
        text = path.read_text(encoding="utf-8")
        if text.count(code) != 1:
            print(f"{what}: expected the code once in {file}, found it {text.count(code)} times")
            return 1
        path.write_text(text.replace(code, fault), encoding="utf-8")
        seen = test_fails()
        path.write_text(text, encoding="utf-8")
        print(f"{'seen  ' if seen else 'MISSED'}  {what}", flush=True)
        missed += [] if seen else [what]
    print(f"{len(FAULTS) - len(missed)} of {len(FAULTS)} faults seen")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
