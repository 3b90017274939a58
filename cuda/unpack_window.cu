// The dense weight, or some rows of it, from the window layout: bound by writing it. A lane's registers of a tile are
// sixteen neighbours in each of two rows, which it writes as they are.
#include "params.h"
#include "window_tile.cuh"

namespace {

using namespace infold;
using namespace infold::window;

constexpr int kWarps = 8;
// Columns that a lane holds of each of its rows.
constexpr int kRun = kCols / 4;

// One of a lane's two rows of a tile, in pairs of columns.
struct Run {
  uint32_t pairs[kRun / 2];
};

// `lower` says which of the two.
__device__ inline Run run_of(const Tile& tile, bool lower, uint32_t base) {
  Run run;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const Fragment fragment = tile.step(step, base);
#pragma unroll
    for (int half = 0; half < 2; ++half) run.pairs[2 * step + half] = fragment.registers[2 * half + (lower ? 1 : 0)];
  }
  return run;
}

// Writes the columns from `col` on that are there.
__device__ inline void store(const Run& run, uint16_t* row, int col, int cols) {
  uint16_t* out = row + col;
  if (col + kRun <= cols && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    reinterpret_cast<uint4*>(out)[0] = {run.pairs[0], run.pairs[1], run.pairs[2], run.pairs[3]};
    reinterpret_cast<uint4*>(out)[1] = {run.pairs[4], run.pairs[5], run.pairs[6], run.pairs[7]};
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (col + i < cols) out[i] = static_cast<uint16_t>(run.pairs[i / 2] >> 16 * (i % 2));
  }
}

}  // namespace

// A block for each stripe.
extern "C" __global__ void __launch_bounds__(kWarps* kLanes) infold_unpack_window(InfoldWindowUnpack p) {
  const InfoldWindowWeight& w = p.weight;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, stripe = blockIdx.x;
  const int across = (w.cols + kCols - 1) / kCols;
  const uint32_t base = base_bits(*w.base);
  const size_t first_row = static_cast<size_t>(stripe) * kRows;
  for (int index = warp; index < across; index += kWarps) {
    const Tile tile = load_tile(w.tiles, static_cast<size_t>(stripe) * across + index, lane);
    const int col = index * kCols + lane % 4 * kRun;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const size_t row = first_row + lane / 4 + 8 * half;
      if (row < static_cast<size_t>(w.rows)) store(run_of(tile, half == 1, base), p.out + row * w.cols, col, w.cols);
    }
  }
  // What is listed apart goes over what stands in its place.
  __syncthreads();
  const uint32_t end = w.escape_starts[stripe + 1];
  for (uint32_t i = w.escape_starts[stripe] + threadIdx.x; i < end; i += kWarps * kLanes) {
    const InfoldEscape escape = w.escapes[i];
    p.out[(first_row + escape.row) * w.cols + escape.col] = escape.bits;
  }
}

// A block for each index; an index that no row has ends the kernel.
extern "C" __global__ void __launch_bounds__(kWarps* kLanes) infold_embedding_window(InfoldWindowEmbedding p) {
  const InfoldWindowWeight& w = p.weight;
  const int64_t index = p.indices[blockIdx.x];
  if (index < 0 || index >= w.rows) {
    fail();
    return;
  }
  const int stripe = static_cast<int>(index / kRows), row = static_cast<int>(index % kRows);
  const int across = (w.cols + kCols - 1) / kCols;
  const uint32_t base = base_bits(*w.base);
  uint16_t* out = p.out + static_cast<size_t>(blockIdx.x) * w.cols;
  for (int part = threadIdx.x; part < 4 * across; part += kWarps * kLanes) {
    const Tile tile = load_tile(w.tiles, static_cast<size_t>(stripe) * across + part / 4, row % 8 * 4 + part % 4);
    store(run_of(tile, row >= 8, base), out, part / 4 * kCols + part % 4 * kRun, w.cols);
  }
  __syncthreads();
  const uint32_t end = w.escape_starts[stripe + 1];
  for (uint32_t i = w.escape_starts[stripe] + threadIdx.x; i < end; i += kWarps * kLanes) {
    const InfoldEscape escape = w.escapes[i];
    if (escape.row == row) out[escape.col] = escape.bits;
  }
}
