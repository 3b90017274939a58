"""Plants faults in the device code, one at a time, and checks that the tests of the emulated kernels see each.

Run: python rust_tests/plant_faults.py [WORD] (or `make fault-test`): faults whose name has the word, or all.
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

WINDOW, CODES, LAYOUTS = "cuda/window.cuh", "cuda/codes.cuh", "cuda/layouts.cuh"
LINEAR, UNPACK = "cuda/linear.cu", "cuda/unpack.cu"
LAUNCH, WEIGHT = "src/cuda/launch.rs", "src/cuda/weight.rs"
PAIRS, PAIRS_LAYOUT, PAIRS_HOST = "cuda/pairs.cuh", "cuda/pairs_layout.cuh", "cuda/host_pairs.cpp"
PAIRS_RUST, PREFIX = "src/cuda/weight/pairs.rs", "src/cuda/prefix.rs"
LOAD_CODES = "words + codes::place<kBits>(lane, 4 * quad)"
#: (what, file, code, code with the fault).
FAULTS = (
    ("word order of a window's tile", LAYOUTS, "word_index(lane, 4 * quad)", "word_index(lane ^ 1, 4 * quad)"),
    ("a window's words", LAYOUTS, "tile.word(2 * step + 1), tile", "tile.word(2 * step), tile"),
    ("mask of signs and mantissas", WINDOW, "kRestMask = 0x807f807f", "kRestMask = 0x807f803f"),
    ("exponent of the second register", WINDOW, "exponents << 3 & kExponentMask", "exponents << 4 & kExponentMask"),
    ("exponent of the fourth register", WINDOW, "exponents >> 5 & kExponentMask", "exponents >> 5 & 0x07800700"),
    ("base in the upper half", WINDOW, "base * 0x00800080u", "base * 0x00000080u"),
    ("end of the window", WINDOW, "if (exponent >= kWindow)", "if (exponent > kWindow)"),
    ("filler of the window", LAYOUTS, "return from_bf16(base & 0xffff)", "return from_bf16(base & 0x7fff) * 2"),
    ("word order of codes", LAYOUTS, LOAD_CODES, LOAD_CODES.replace("(lane,", "(lane ^ 1,")),
    ("the fifths' word", LAYOUTS, "kBits == 5 ? words[codes::place<kBits>(lane, 4)] : 0", "0"),
    (
        "pair of fifths",
        CODES,
        "(fifths >> high_shift(step, reg, 0) & 3) << 8",
        "(fifths >> high_shift(step, reg, 0) & 1) << 8",
    ),
    ("half of a pair", CODES, "(pair >> (8 + half) & 1) << 4", "(pair >> 8 & 1) << 4"),
    (
        "halves of eight bits",
        LAYOUTS,
        "(first & 0xffff) | (second & 0xffff0000)",
        "(second & 0xffff) | (first & 0xffff0000)",
    ),
    ("copies of the table", LAYOUTS, "shared + threadIdx.x % kCopies", "shared + threadIdx.x % kCopies * 2"),
    ("entries of the table", LAYOUTS, "const uint32_t entry = i / kCopies;", "const uint32_t entry = i % kEntries;"),
    ("the barrier after the table", LAYOUTS, "__syncthreads();\n  }", "}"),
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
    ("tiles of a warp", LINEAR, "start += kAhead * kStride", "start += kStride"),
    (
        "prefetch of the next tile",
        LINEAR,
        "const int next = tile + kAhead * kStride;",
        "const int next = tile + kStride;",
    ),
    (
        "rows' scales",
        LINEAR,
        "const int row = stripe * kRows + lane / 4 + i / 2 * 8;",
        "const int row = stripe * kRows + lane / 4;",
    ),
    ("groups' scales", LINEAR, "scale_of(w, row, tile * kCols)", "scale_of(w, row, 0)"),
    ("sums of the next group", LINEAR, "            sums[group][i] = 0;\n", ""),
    ("place of a sum", LINEAR, "parts[warp][lane / 4 + i / 2 * 8]", "parts[warp][lane / 4 + i / 2 * 4]"),
    ("one warp's part", LINEAR, "for (int part = 0; part < kWarps", "for (int part = 1; part < kWarps"),
    ("the barrier before the sum", LINEAR, "__syncthreads();\n    const int out_row", "const int out_row"),
    ("the barrier after the sum", LINEAR, "    __syncthreads();\n  }\n}", "  }\n}"),
    ("what stands in for an escape", LINEAR, "(escape.value - filler)", "escape.value"),
    ("an escape's x", LINEAR, "from_bf16(x[escape.col])", "from_bf16(x[0])"),
    ("the bias", LINEAR, "from_bf16(p.bias[row])", "from_bf16(p.bias[out_row])"),
    ("rows beyond the weight", LINEAR, "out_row < kRows && row < w.rows && batch", "out_row < kRows && batch"),
    ("half of a run", UNPACK, "2 * pair + (lower ? 1 : 0)", "2 * pair + (lower ? 0 : 1)"),
    ("last columns of a run", UNPACK, "col + kRun <= w.cols", "col + kRun - 1 <= w.cols"),
    (
        "rows' escapes when unpacked",
        UNPACK,
        "put_apart<Layout>(p, static_cast<int>(row)",
        "put_apart<Layout>(p, static_cast<int>(first_row)",
    ),
    ("lane of an embedding's row", UNPACK, "row % 8 * 4 + part % 4)", "row % 8 * 4 + part % 2)"),
    (
        "an embedding's escapes",
        UNPACK,
        "put_apart<Layout>(p, static_cast<int>(index), out)",
        "put_apart<Layout>(p, row, out)",
    ),
    ("blocks of a launch", LAUNCH, "div_ceil(STRIPE as u32)", "div_ceil(2 * STRIPE as u32)"),
    ("kernel for a batch", LAUNCH, "parameters.batch <= 8", "parameters.batch <= 9"),
    ("order of escapes", WEIGHT, "start - escapes.len() as u32", "start"),
    ("pairs: a second register's rest", PAIRS, "window::rotate_right_8(rest), entries[1]", "rest, entries[1]"),
    ("pairs: bytes of two levels", PAIRS, "0x7362", "0x7263"),
    (
        "pairs: upper bytes",
        PAIRS,
        "pick_bytes(low_uppers, high_uppers, entry)",
        "pick_bytes(low_uppers, low_uppers, entry)",
    ),
    ("pairs: where a stream begins", PAIRS, "+ 32 - kShift;", "+ 31 - kShift;"),
    ("pairs: the next word", PAIRS, "    current = next;\n    next = ahead;\n", "    current = next;\n"),
    ("pairs: words of a stream", PAIRS, "    place += sizeof(uint32_t);\n", ""),
    (
        "pairs: a stream's end",
        PAIRS,
        "place = place < last ? place : last;",
        "place = place < last - 3200 ? place : last - 3200;",
    ),
    (
        "pairs: a lane's copy",
        PAIRS_LAYOUT,
        "copy = threadIdx.x % kCopies * sizeof(uint32_t);",
        "copy = (threadIdx.x % kCopies + 1) * sizeof(uint32_t);",
    ),
    ("pairs: entries of the copies", PAIRS_LAYOUT, "entries[i / kCopies]", "entries[i % pairs::kEntries]"),
    ("pairs: the barrier after the table", PAIRS_LAYOUT, "    }\n    __syncthreads();\n  }", "    }\n  }"),
    (
        "pairs: waiting for a run's words",
        PAIRS_LAYOUT,
        "wait_for_copies();\n    stream.begin",
        "sync_warp();\n    stream.begin",
    ),
    (
        "pairs: a run's words",
        PAIRS_LAYOUT,
        "place[2] < quads ? place[2] : quads",
        "place[0] < quads ? place[0] : quads",
    ),
    ("pairs: words beyond the payload", PAIRS_LAYOUT, "place[2] < quads ? place[2] : quads", "place[2]"),
    ("pairs: what stands in", PAIRS_LAYOUT, "return from_bf16(stand_in);", "return 2 * from_bf16(stand_in);"),
    ("pairs: an embedding's row", UNPACK, "row < first_row || row >= end_row", "row >= end_row"),
    ("pairs: first bits of the streams", PAIRS_HOST, "bit << 16 * (lane % 2)", "bit << 16 * (lane / 2 % 2)"),
    ("pairs: a code across two words", PAIRS_HOST, "if (bits >> 32 != 0) at[1]", "if (bits >> 33 != 0) at[1]"),
    ("pairs: order of a code's bits", PREFIX, "next.reverse_bits() >> (32 - length)", "next"),
    ("pairs: packages taken", PREFIX, "taken = 2 * (taken - leaves);", "taken = 2 * taken - leaves;"),
    ("pairs: rest of what is listed apart", PAIRS_RUST, "} else if is_bf16 {", "}\n                if is_bf16 {"),
    ("pairs: stripes' runs", PAIRS_RUST, "[first + place[0], place[1]]", "[place[0], place[1]]"),
    ("pairs: shared memory", LAUNCH, "8 * 832 * 4 + 16 * 4096", "8 * 832 * 4 + 15 * 4096"),
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
    faults = [fault for fault in FAULTS if all(word in fault[0] for word in sys.argv[1:])]
    for what, file, code, fault in faults:
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
    print(f"{len(faults) - len(missed)} of {len(faults)} faults seen")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
