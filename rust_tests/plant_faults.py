"""Plants faults in the device code, one at a time, and checks that the tests of the emulated kernels see each.

Run: python rust_tests/plant_faults.py [WORD] (or `make fault-test`): faults whose name or file has the word, or all.
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
LINEAR, NARROW, UNPACK = "cuda/linear.cu", "cuda/narrow.cuh", "cuda/unpack.cu"
WIDE, MANY, BACKWARD = "cuda/wide.cu", "cuda/wide.cuh", "cuda/backward.cu"
INPUTS, INPUT_TILES, INTRINSICS = "cuda/inputs.cu", "cuda/inputs.cuh", "cuda/intrinsics.cuh"
LAUNCH = "src/cuda/launch.rs"
PAIRS, PAIRS_LAYOUT, PAIRS_HOST = "cuda/pairs.cuh", "cuda/pairs_layout.cuh", "cuda/host_pairs.cpp"
PAIRS_RUST, FIXED, PREFIX = "src/cuda/weight/pairs.rs", "src/cuda/weight/fixed.rs", "src/cuda/prefix.rs"
CANONICAL, DECODE, LAY_OUT, QUANTISE = "cuda/decode.cuh", "cuda/decode.cu", "cuda/lay_out.cu", "cuda/quantise.cu"
DEVICE, PACK = "src/cuda/lay_out.rs", "src/cuda/pack.rs"
FOURIER, FEW, MANY_ROWS = "cuda/fourier.cuh", "cuda/circulant_few.cu", "cuda/circulant_many.cu"
MANY_SHAPE, LOG8, FREQUENCY = "cuda/circulant_many.cuh", "cuda/log8.cuh", "src/cuda/frequency.rs"
LOAD_CODES = "words + codes::place<kBits>(lane, 4 * quad)"
#: (what, file, code, code with the fault).
FAULTS = (
    (
        "word order of a window's tile",
        LAYOUTS,
        "words + word_index(lane, 4 * quad)",
        "words + word_index(lane ^ 1, 4 * quad)",
    ),
    ("a window's words", LAYOUTS, "tile.word(2 * step + 1), tile", "tile.word(2 * step), tile"),
    ("mask of signs and mantissas", WINDOW, "kRestMask = 0x807f807f", "kRestMask = 0x807f803f"),
    ("exponent of the second register", WINDOW, "exponents << 3 & kExponentMask", "exponents << 4 & kExponentMask"),
    ("exponent of the fourth register", WINDOW, "exponents >> 5 & kExponentMask", "exponents >> 5 & 0x07800700"),
    ("base in the upper half", WINDOW, "base * 0x00800080u", "base * 0x00000080u"),
    ("end of the window", WINDOW, "if (exponent >= kWindow)", "if (exponent > kWindow)"),
    ("filler of the window", LAYOUTS, "window::filler(w.head->base))", "window::filler(w.head->base)) * 2"),
    ("word order of codes", LAYOUTS, LOAD_CODES, LOAD_CODES.replace("(lane,", "(lane ^ 1,")),
    (
        "the fifths' word",
        LAYOUTS,
        "result.fifths = kBits == 5 ? words[codes::place<kBits>(lane, 4)] : 0",
        "result.fifths = 0",
    ),
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
    ("order of columns", NARROW, "lane % 4 * 16);", "lane % 4 * 8);"),
    ("pair of x in a step", NARROW, "x[i].pairs[2 * step + 1]);", "x[i].pairs[2 * step]);"),
    ("rows of x beyond the batch", NARROW, "column >= p.batch * p.parts", "column > p.batch * p.parts"),
    ("columns beyond x", NARROW, "if (col + i < cols) result.pairs", "if (col + i <= cols) result.pairs"),
    (
        "aligned loads of x",
        NARROW,
        "reinterpret_cast<uintptr_t>(x) % 16 == 0",
        "reinterpret_cast<uintptr_t>(x) % 8 == 0",
    ),
    ("second group's rows", NARROW, "(part + i) * kGroup + lane / 4,", "(part + i) * 4 + lane / 4,"),
    ("tiles of a warp", LINEAR, "start += kAhead * kStride", "start += kStride"),
    (
        "prefetch of the next tile",
        LINEAR,
        "const int next = tile + kAhead * kStride;",
        "const int next = tile + kStride;",
    ),
    (
        "rows' scales",
        NARROW,
        "const int row = stripe * kRows + lane / 4 + 8 * half;",
        "const int row = stripe * kRows + lane / 4;",
    ),
    ("groups' scales", NARROW, "scale(p.weight, stripe, tile * kCols)", "scale(p.weight, stripe, 0)"),
    ("sums of the next group", NARROW, "          own[group][i] = 0;\n", ""),
    ("place of a sum", NARROW, "lane / 4 + i / 2 * 8, column", "lane / 4 + i / 2 * 4, column"),
    ("one warp's part", NARROW, "for (int share = 0; share < kWarps", "for (int share = 1; share < kWarps"),
    ("the barrier before the sum", NARROW, "__syncthreads();\n    // A row", "// A row"),
    ("the barrier after the sum", NARROW, "    __syncthreads();\n  }\n}", "  }\n}"),
    ("what stands in for an escape", NARROW, "(escape.value - filler)", "escape.value"),
    ("an escape's x", NARROW, "from_bf16(x[escape.col])", "from_bf16(x[0])"),
    ("the bias", NARROW, "load_value(p.bias, row,", "load_value(p.bias, out_row,"),
    ("rows beyond the weight", NARROW, "out_row < kRows && row < w.rows && batch", "out_row < kRows && batch"),
    ("a value's parts in a row of x", NARROW, "out * p.parts + part;", "out * p.parts;"),
    ("a value's parts", INPUTS, "for (int i = 0; i < part; ++i) value", "for (int i = 1; i < part; ++i) value"),
    ("a column's row of x", INPUTS, "const int row = column / p.parts;", "const int row = column;"),
    ("x beyond the batch", INPUTS, "if (row >= p.batch ||", "if (row > p.batch ||"),
    ("swizzle of x", INPUT_TILES, "chunk ^ column % 8", "chunk ^ column % 4"),
    ("order of x in a step", INPUT_TILES, "2 * (chunk % 2), element", "chunk % 2, element"),
    ("place of an escape's x", INPUT_TILES, "within / 16 * 2 + within % 2", "within / 16 * 2"),
    ("stride of the descriptor", INTRINSICS, "kEightColumns = 1024", "kEightColumns = 512"),
    ("address of the descriptor", INTRINSICS, "(address >> 4 & 0x3fff)", "(address >> 4 & 0xfff)"),
    ("steps of the descriptor", MANY, "step * kStepBytes;", "step * kStepBytes / 2;"),
    ("groups of the descriptor", MANY, "group * kGroup * kColumnBytes", "0 * kColumnBytes"),
    ("wait for a tile in time", MANY, "wait_for(full[i % kStages], i / kStages);", "wait_for(full[i % kStages], 0);"),
    ("wait for a place in time", MANY, "        wait_for(empty[left % kStages], left / kStages);\n", ""),
    ("wait for products in time", MANY, "      wait_for_products(sums);\n", ""),
    ("bytes of tiles in time", MANY, "present * sizeof to.tiles[0])", "kWarps * sizeof to.tiles[0])"),
    ("a stripe's tiles in shared memory", WIDE, "(tiles[warp], lane)", "(tiles[warp / 2], lane)"),
    ("scales of groups in many columns", WIDE, "at * kCols);", "0);"),
    (
        "scales of rows in many columns",
        WIDE,
        "grouped ? 1 : row_scales",
        "grouped ? row_scales.scales[half] : row_scales",
    ),
    (
        "rows' escapes in many columns",
        WIDE,
        "Layout::filler(w), p.first_row + row, column)",
        "Layout::filler(w), row, column)",
    ),
    ("end of a split", MANY, "(split + 1) * terms / p.splits)", "(split + 1) * terms / p.splits - split)"),
    ("one split's sums", MANY, "for (int split = 0; split < p.splits", "for (int split = 1; split < p.splits"),
    ("a value's parts in many columns", MANY, "batch_row * p.parts + part]", "batch_row * p.parts]"),
    ("the barrier before results of many columns", WIDE, "__syncthreads();\n  wide::put", "wide::put"),
    ("fillers of scaled weights", MANY, "from_bf16(to_bf16(filler * scale))", "filler * scale"),
    ("order of a gradient's rows", INPUT_TILES, "order == kPlain) return", "order != kPlain) return"),
    ("place of a gradient's row", INPUT_TILES, "order == kPlain ? within % kChunk", "order == kPlain ? 0"),
    ("registers of a transposed step", BACKWARD, "reg % 2 * 2 + reg / 2", "reg"),
    ("a register transposed", BACKWARD, "transposed(weights.registers[reg])", "weights.registers[reg]"),
    ("tile of a transposed step", BACKWARD, "i * kAcross + group", "i * kAcross"),
    ("step of a transposed tile", BACKWARD, "lane}, step);", "lane}, 0);"),
    ("stripes that are not there", BACKWARD, "if (has(at, tile)) {", "{"),
    ("column of a transposed sum", BACKWARD, "col_of(row / 2, step, 2 * half, row % 2)", "16 * step + row + 8 * half"),
    ("first escape of sixteen columns", BACKWARD, "low = middle + 1", "low = middle + 2"),
    ("rows of escapes by warp", BACKWARD, "part * kLanes + first_bit(left)", "first_bit(left)"),
    ("the barrier before escapes", BACKWARD, "__syncthreads();\n    // A thread", "// A thread"),
    ("escapes beyond the payload", LAYOUTS, "end < room ? end : static_cast<uint32_t>(room)", "end"),
    ("escapes beyond the columns", LAYOUTS, "escape.col < static_cast<uint32_t>(w.cols)", "true"),
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
    ("kernel for a batch", LAUNCH, "size < columns", "size + 1 < columns"),
    ("rows of one launch", LAUNCH, "first_row: first as i32", "first_row: 0"),
    ("shared memory of many columns", LAUNCH, "(WIDE_STAGES * stage)", "(WIDE_STAGES * stage / 2)"),
    (
        "order of escapes",
        FIXED,
        "bytes.extend(u32::to_le_bytes(start));\n        start += count;",
        "start += count;\n        bytes.extend(u32::to_le_bytes(start));",
    ),
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
    ("pairs: what stands in", PAIRS_LAYOUT, "return from_bf16(w.head->base);", "return 2 * from_bf16(w.head->base);"),
    ("pairs: an embedding's row", UNPACK, "row < first_row || row >= end_row", "row >= end_row"),
    ("pairs: first bits of the streams", PAIRS_HOST, "bit << 16 * (lane % 2)", "bit << 16 * (lane / 2 % 2)"),
    ("pairs: a code across two words", PAIRS_HOST, "if (bits >> 32 != 0) at[1]", "if (bits >> 33 != 0) at[1]"),
    ("pairs: order of a code's bits", PREFIX, "next.reverse_bits() >> (32 - length)", "next"),
    ("pairs: packages taken", PREFIX, "taken = 2 * (taken - leaves);", "taken = 2 * taken - leaves;"),
    ("pairs: rest of what is listed apart", PAIRS_RUST, "} else if is_bf16 {", "}\n                if is_bf16 {"),
    ("pairs: stripes' runs", PAIRS_RUST, "[first + place[0], place[1]]", "[place[0], place[1]]"),
    ("pairs: shared memory", LAUNCH, "8 * 832 * 4 + 16 * 4096", "8 * 832 * 4 + 15 * 4096"),
    ("decode: bytes beyond the payload", CANONICAL, "at < size ? bytes[at] : 0", "at <= size ? bytes[at] : 0"),
    ("decode: blocks of a tile", CANONICAL, "index % groups() * kGroup, col", "index % 1 * kGroup, col"),
    ("decode: rows of the last tile", DECODE, "rows < p.tile_rows ? rows : p.tile_rows", "p.tile_rows"),
    (
        "decode: where plain bits of the second rows begin",
        CANONICAL,
        "groups_before * block.cols",
        "groups_before * 64",
    ),
    ("decode: end of the last tile", CANONICAL, ": payload.size;\n  const bool fits", ": start;\n  const bool fits"),
    ("decode: what does not fit in its tile", CANONICAL, "fits &= size <= left", "fits &= size <= left + 3"),
    ("decode: states of a stream", CANONICAL, "states + static_cast<uint64_t>(stream) *", "states + 0 *"),
    ("decode: words of a stream", CANONICAL, "if (i == stream) result.words", "if (i == 0) result.words"),
    ("decode: the flag of escapes", CANONICAL, "payload.word<4>(heads) & kHasEscapes", "payload.word<4>(heads) & 0"),
    ("decode: offset of a slot", CANONICAL, "(entry >> 8 & 0xfff)", "(entry >> 8 & 0x7f)"),
    ("decode: order of the lanes' words", DECODE, "takers & ((1u << lane) - 1)", "takers & ((2u << lane) - 1)"),
    ("decode: words that were taken", DECODE, "at += count_bits(takers) * Lane::kWord", "at += count_bits(takers)"),
    ("decode: lanes without a row", DECODE, "is_there && coder.step", "coder.step"),
    ("decode: escapes that come too late", DECODE, "is_lost = block < before;", "is_lost = false;"),
    (
        "decode: escapes of no place",
        CANONICAL,
        "constexpr uint32_t kNoBlock = ~0u;",
        "constexpr uint32_t kNoBlock = 0;",
    ),
    ("decode: escapes that were passed", DECODE, "next += count_bits(passed);", "next += 1;"),
    ("decode: a level's escape", CANONICAL, "return is_any ? value", "return !is_any ? value"),
    ("decode: the second plane", DECODE, "p.plane == 0 ? code : out[col] | code", "code"),
    (
        "decode: the barrier before a block is stored",
        DECODE,
        "    sync_warp();\n    const bool is_any",
        "    const bool is_any",
    ),
    (
        "decode: the barrier after a block is stored",
        DECODE,
        "lane, values);\n    sync_warp();\n  }\n}",
        "lane, values);\n  }\n}",
    ),
    ("decode: the plane before", DEVICE, "before = parameters.own;", ""),
    (
        "laying out: places of levels",
        LAY_OUT,
        "const uint32_t place = level + kFarthest;",
        "const uint32_t place = level + kFarthest - 1;",
    ),
    (
        "laying out: levels that are far out",
        LAY_OUT,
        "place < kCounted ? place : kCounted",
        "place <= kCounted - 2 ? place : kCounted",
    ),
    ("laying out: the barrier before counting", LAY_OUT, "counts[i] = 0;\n  __syncthreads();", "counts[i] = 0;"),
    (
        "laying out: the barrier after counting",
        LAY_OUT,
        "  }\n  __syncthreads();\n  unsigned long long",
        "  }\n  unsigned long long",
    ),
    ("laying out: columns beyond the weight", LAY_OUT, "|| col >= p.cols) continue;", "|| col > p.cols) continue;"),
    ("laying out: levels without a code", LAY_OUT, "if (index < 1u << kBits) codes::encode", "codes::encode"),
    ("laying out: the fifths' word", LAY_OUT, "if (To::kWords % 4 != 0) tile", "if (To::kWords % 4 == 3) tile"),
    ("laying out: order of a row's escapes", LAY_OUT, "apart & ((1u << lane) - 1)", "apart & ((2u << lane) - 1)"),
    ("laying out: escapes of the columns before", LAY_OUT, "next += count_bits(apart);", "next = count_bits(apart);"),
    ("laying out: room for a row's escapes", LAY_OUT, "if (index < p.escape_starts[row + 1]) ", ""),
    (
        "laying out: the value of an escape",
        LAY_OUT,
        "return p.centroids[index];",
        "return static_cast<float>(static_cast<int32_t>(code));",
    ),
    ("laying out: the window's width", DEVICE, "{ WINDOW } else", "{ WINDOW + 1 } else"),
    ("circulant: roots of unity", FOURIER, "{cosine_of_turns(turns), -sine", "{cosine_of_turns(turns), sine"),
    ("circulant: roots beyond a quarter", FOURIER, ": Complex{-kCosines[8 - k]", ": Complex{kCosines[8 - k]"),
    ("circulant: a transform's columns", FOURIER, "lane + j * kFirst] = rows", "lane + j * kLanes] = rows"),
    ("circulant: the second block of a pair", FEW, "(b.re - a.re) / 2", "(a.re - b.re) / 2"),
    ("circulant: what is alone", FEW, "slot == 0 ? Complex{w.re", "slot == 1 ? Complex{w.re"),
    ("circulant: conjugates of few rows", FEW, "(p.conjugate ? conjugate(w) : w) * x", "w * x"),
    (
        "circulant: inputs after those ahead",
        FEW,
        "int input = part + kAhead * kParts;",
        "int input = part + 9 * kParts;",
    ),
    ("circulant: blocks after the first transforms", FEW, "if (first > 0) bits = load_column(pair);", ""),
    (
        "circulant: the barrier before parts are added",
        FEW,
        "shares[threadIdx.x] = sum;\n    __syncthreads();",
        "shares[threadIdx.x] = sum;",
    ),
    ("circulant: what is alone of many rows", MANY_ROWS, "slot == 0 ? imaginary[i] : mixed[i]", "mixed[i]"),
    ("circulant: conjugates of many rows", MANY_ROWS, "p.conjugate && slot != 0", "p.conjugate"),
    (
        "circulant: the barrier before regions are used again",
        MANY_ROWS,
        "finish(first_row, first, count);\n      // Before the regions are used again.\n      __syncthreads();",
        "finish(first_row, first, count);",
    ),
    ("circulant: rows beyond the batch", MANY_ROWS, "row < p.batch ? p.in_features : 0", "p.in_features"),
    (
        "circulant: weights on their way",
        MANY_ROWS,
        "tile * kInputSteps + step + kAhead;",
        "tile * kInputSteps + step + 1;",
    ),
    ("circulant: where inputs lie", MANY_SHAPE, "within / 4 * 2;", "within / 4;"),
    ("circulant: the order of inputs", MANY_SHAPE, "16 * step + 8 * high", "16 * step + 4 * high"),
    ("circulant: room for spectra", FREQUENCY, "inputs.next_multiple_of(2) * n / 2", "inputs * n / 2"),
    ("log8: the largest scale", LOG8, "bits < kInfinity ? bits : kLargest", "bits"),
    ("log8: the curve", LOG8, "(word >> kScaleBits) * 256", "(word >> kScaleBits) * 128"),
    ("quantise: columns under one scale", QUANTISE, "part % groups * p.group_cols", "part % groups * kLanes"),
    ("quantise: the sign of a magnitude", QUANTISE, "& 0x7fffffff;", "& 0xffffffff;"),
    ("quantise: lanes of a maximum", QUANTISE, "step > 0; step /= 2", "step > 1; step /= 2"),
    ("quantise: rounding of ties", QUANTISE, "rintf(steps)", "roundf(steps)"),
    ("quantise: the scale of a part", QUANTISE, "p.scales[part]", "p.scales[0]"),
    (
        "measure: order of a row's lanes",
        QUANTISE,
        "for (int lane = 0; lane < kLanes; ++lane) sum",
        "for (int lane = kLanes; lane-- > 0;) sum",
    ),
    (
        "measure: waiting for a row's lanes",
        QUANTISE,
        "= own;\n  sync_warp();\n",
        "= own;\n",
    ),
    ("measure: rows that are left out", QUANTISE, "row = index * p.every", "row = index"),
    ("measure: the farthest level", QUANTISE, "constexpr int kFarthest = 4096", "constexpr int kFarthest = 4095"),
    ("measure: levels that are counted together", QUANTISE, "++outside;", ""),
    ("measure: exact products", QUANTISE, "static_cast<double>(error) * error", "error * error"),
    ("measure: errors in steps", QUANTISE, "level_of(error * kStep,", "level_of(error,"),
    ("measure: the square of a scale", QUANTISE, "weight = p.squares[row]", "weight = p.squares[0]"),
    (
        "measure: the barrier before summing",
        QUANTISE,
        "near_moments[i] = 0;\n  __syncthreads();",
        "near_moments[i] = 0;",
    ),
    (
        "measure: the barrier after summing",
        QUANTISE,
        "outside);\n  __syncthreads();\n",
        "outside);\n",
    ),
    ("measure: places of a block's sums", QUANTISE, "all.add(i - kNear,", "all.add(i - kNear + 1,"),
    ("measure: where moments lie", PACK, "wrapping_add(2 * LEVELS + 1)", "wrapping_add(2 * LEVELS)"),
    ("ecsq: scales of rows", PACK, "of_scales[grid.index(row, 0, geometry)]", "of_scales[0]"),
    ("ecsq: the largest level", PACK, "dense.cols, &scales, MAX_LEVEL)", "dense.cols, &scales, 127.0)"),
    ("pack: low bits of levels", PACK, "((1 << low_bits) - 1)] += count", "((1 << low_bits) - 1) / 2] += count"),
    ("pack: tiles that are asked for", PACK, "if asked.is_empty()", "if asked.len() < 1 << 20"),
)


def test_fails() -> bool:
    # No kernel is compiled for a GPU, and the emulated ones sooner than they run fast.
    environment = {**os.environ, "CARGO_TARGET_DIR": str(COPY / "target"), "LIBTORCH": "", "CXXFLAGS": "-O1"}
    command = ["cargo", "test", "--release", "--no-default-features", "--locked", "--quiet"]
    command += ["--test", "device_frequency", "--test", "device", "--test", "device_lay_out", "--test", "device_pack"]
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
    faults = [fault for fault in FAULTS if all(word in f"{fault[0]} {fault[1]}" for word in sys.argv[1:])]
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
