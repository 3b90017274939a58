// dx = g W for up to 128 columns on Hopper: the forward's tiles, read the other way. A block takes 128 columns of W, a
// warpgroup 64 of them, whose tiles' steps are its warps'; registers of a fragment are transposed one by one.
#include "wide.cuh"

namespace {

using namespace infold;

// Stripes of a stage, whose rows are the 64 of a tile of g; and tiles of each.
constexpr int kStripes = kCols / kRows;
constexpr int kAcross = wide::kWarps / kStripes;

struct Backward {
  const InfoldWeight& w;
  int first_col, across;

  __device__ int stripe(int at, int tile) const { return at * kStripes + tile / kAcross; }
  __device__ int col_tile(int tile) const { return first_col / kCols + tile % kAcross; }
  __device__ bool has(int at, int tile) const { return stripe(at, tile) * kRows < w.rows && col_tile(tile) < across; }
  __device__ size_t tile(int at, int tile) const {
    return static_cast<size_t>(stripe(at, tile)) * across + col_tile(tile);
  }

  // An mma's step for each stripe.
  template <class Layout>
  __device__ void decode(const Layout& layout, const uint32_t (*tiles)[Layout::kTileWords], int at,
                         Fragment (&a)[kSteps]) const {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int group = warp / wide::kGroupWarps, step = warp % wide::kGroupWarps;
#pragma unroll
    for (int i = 0; i < kStripes; ++i) {
      const int tile = i * kAcross + group;
      Fragment weights = {};
      // What no tile was copied to may hold anything, and 0 · ∞ is no number.
      if (has(at, tile)) {
        weights = layout.step(typename Layout::SharedTile{tiles[tile], lane}, step);
        if (w.scales != nullptr) wide::RowScales(w, stripe(at, tile), col_tile(tile) * kCols).apply(weights);
      }
#pragma unroll
      for (int reg = 0; reg < kRegisters; ++reg) {
        // Rows and columns change places: within a register, and between registers.
        a[i].registers[reg % 2 * 2 + reg / 2] = transposed(weights.registers[reg]);
      }
    }
  }
};

template <class Layout, int kColumns>
__device__ void backward(const InfoldWide& p) {
  __shared__ uint32_t table[Layout::kSharedWords];
  const InfoldWeight& w = p.weight;
  const Layout layout(w, table);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, across = (w.cols + kCols - 1) / kCols;
  const wide::Share share(p, (w.rows + kCols - 1) / kCols);
  const int first_col = p.first_row + share.block * wide::kBlockSums;
  float sums[kColumns / wide::kGroup][32] = {};
  wide::multiply<Backward, Layout, kColumns>(p, {w, first_col, across}, layout, share, sums);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // A row of operand A is an element of the step's k in the forward direction.
    const int row = lane / 4, step = warp % wide::kGroupWarps;
    const int within = col_of(row / 2, step, 2 * half, row % 2);
    const int col = first_col + warp / wide::kGroupWarps * kCols + within - p.first_row;
    if (col < p.row_count) wide::put_sums<kColumns>(p, sums, half, share.split, col, 1);
  }
}

// The first of a row's escapes that is not before a column.
__device__ uint32_t first_escape(const InfoldWeight& w, const EscapeRange& range, int col) {
  uint32_t low = range.begin, high = range.end;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (static_cast<int>(w.escapes[middle].col) < col) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Rows that a thread looks through at a time, so that their loads are on their way together.
constexpr int kTogether = 4;

// A block for sixteen columns of W: looks through all rows for what is listed apart there, many at a time, and adds it
// row by row.
template <class Layout>
__device__ void finish(const InfoldWide& p) {
  __shared__ wide::Outputs outputs;
  __shared__ EscapeRange ranges[kTogether * wide::kThreads];
  __shared__ uint32_t votes[kTogether * wide::kWarps];
  const InfoldWeight& w = p.weight;
  const int first = p.first_row + blockIdx.x * kRows, lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  for (int i = threadIdx.x; i < kRows * p.columns; i += blockDim.x) {
    const int col = blockIdx.x * kRows + i / p.columns;
    if (col < p.row_count) outputs[i / p.columns][i % p.columns] = wide::sum_of_splits(p, col, i % p.columns);
  }
  for (int first_row = 0; first_row < w.rows; first_row += kTogether * wide::kThreads) {
    EscapeRange here[kTogether] = {};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int row = first_row + i * wide::kThreads + static_cast<int>(threadIdx.x);
      if (row >= w.rows) continue;
      const EscapeRange all = escapes_of(w, row);
      here[i] = {first_escape(w, all, first), first_escape(w, all, first + kRows)};
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      ranges[i * wide::kThreads + threadIdx.x] = here[i];
      const uint32_t vote = warp_ballot(here[i].begin < here[i].end);
      if (lane == 0) votes[i * wide::kWarps + warp] = vote;
    }
    __syncthreads();
    // A thread has its column, and takes all rows in order.
    for (int column = threadIdx.x; column < p.columns; column += blockDim.x) {
      for (int part = 0; part < kTogether * wide::kWarps; ++part) {
        for (uint32_t left = votes[part]; left != 0; left &= left - 1) {
          const int place = part * kLanes + first_bit(left), row = first_row + place;
          const float g = from_bf16(p.x[inputs::place(p.columns, column, row, inputs::kPlain)]);
          for (uint32_t i = ranges[place].begin; i < ranges[place].end; ++i) {
            const InfoldEscape escape = w.escapes[i];
            // Of a damaged list, whose columns are in no order, not all are here.
            const uint32_t within = escape.col - static_cast<uint32_t>(first);
            if (within >= kRows || escape.col >= static_cast<uint32_t>(w.cols)) continue;
            const float scale = scale_of(w, row, escape.col);
            outputs[within][column] +=
                wide::correction(escape.value, Layout::filler(w), scale, w.scales != nullptr) * g;
          }
        }
      }
    }
    __syncthreads();
  }
  wide::put_results(p, outputs, first, w.cols);
}

}  // namespace

#define INFOLD_KERNEL(name, layout, columns)                                                                      \
  extern "C" __global__ void __launch_bounds__(wide::kThreads) infold_backward_##name##_##columns(InfoldWide p) { \
    INFOLD_HOPPER(backward<layout, columns>(p));                                                                  \
  }
#define INFOLD_KERNELS(name, layout)                                                                            \
  INFOLD_KERNEL(name, layout, 64)                                                                               \
  INFOLD_KERNEL(name, layout, 128)                                                                              \
  extern "C" __global__ void __launch_bounds__(wide::kThreads, 4) infold_backward_finish_##name(InfoldWide p) { \
    finish<layout>(p);                                                                                          \
  }
INFOLD_FOR_LAYOUTS(INFOLD_KERNELS)
#undef INFOLD_KERNELS
#undef INFOLD_KERNEL
