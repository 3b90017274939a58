// y = x Wᵀ + b for at most sixteen rows of x: bound by reading W once. A block takes stripes of sixteen rows of W and
// divides a stripe's tiles among its warps; each decodes to the registers of an mma, whose eight columns are rows of x.
// The partial sums are added in the order of the warps, so results do not change from run to run.
#include "pairs_layout.cuh"

namespace {

using namespace infold;

constexpr int kWarps = 8;
// Rows of x that an mma takes.
constexpr int kGroup = 8;
// Tiles of a warp that are on their way from memory while one is decoded.
constexpr int kAhead = 2;

// Sixteen neighbours in a row of x, in pairs: operand B of a tile's steps.
struct Inputs {
  uint32_t pairs[8];
};

// Of what is beyond x, zero.
__device__ Inputs load_inputs(const InfoldLinear& p, int row, int col) {
  Inputs result = {};
  const int cols = p.weight.cols;
  if (row >= p.batch || col >= cols) return result;
  const uint16_t* x = p.x + static_cast<size_t>(row) * cols + col;
  if (col + 16 <= cols && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    const uint4 low = load_quad(x), high = load_quad(x + 8);
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (col + i < cols) result.pairs[i / 2] |= static_cast<uint32_t>(load_half(x + i)) << 16 * (i % 2);
  }
  return result;
}

// What the sum of one row of W and one of x lacks because of values that have no code.
__device__ float listed_apart(const InfoldLinear& p, float filler, int row, int batch_row) {
  const InfoldWeight& w = p.weight;
  const uint16_t* x = p.x + static_cast<size_t>(batch_row) * w.cols;
  float sum = 0;
  for (uint32_t i = w.escape_starts[row]; i < w.escape_starts[row + 1]; ++i) {
    const InfoldEscape escape = w.escapes[i];
    sum += (escape.value - filler) * from_bf16(x[escape.col]) * scale_of(w, row, escape.col);
  }
  return sum;
}

// Adds what the tiles from `begin` on, each kStride from the next, give a stripe's sums of kGroups groups of rows of x.
// Where scales change along a row, `mine` has the sums of a lane, else `sums` before their scale.
template <class Layout, int kStride, int kGroups>
__device__ void multiply_tiles(const InfoldLinear& p, Layout& layout, int stripe, int begin, int end,
                               float (&sums)[kGroups][4], float (&mine)[kGroups][4]) {
  const InfoldWeight& w = p.weight;
  const int lane = threadIdx.x % kLanes;
  const int across = (w.cols + kCols - 1) / kCols;
  const size_t first = static_cast<size_t>(stripe) * across;
  const bool grouped = static_cast<int>(w.head->group_cols) < w.cols;

  typename Layout::Tile ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int tile = begin + i * kStride;
    if (tile < end) ahead[i] = Layout::load(w.tiles, first + tile, lane);
  }
  if constexpr (Layout::kInRuns) layout.begin_run();
  for (int start = begin; start < end; start += kAhead * kStride) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int tile = start + i * kStride;
      if (tile >= end) break;
      const typename Layout::Tile current = ahead[i];
      const int next = tile + kAhead * kStride;
      if (next < end) ahead[i] = Layout::load(w.tiles, first + next, lane);
      if constexpr (Layout::kInRuns) layout.begin_tile();
      Inputs x[kGroups];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        x[group] = load_inputs(p, group * kGroup + lane / 4, tile * kCols + lane % 4 * 16);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const Fragment a = layout.step(current, step);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          multiply_add(sums[group], a.registers, x[group].pairs[2 * step], x[group].pairs[2 * step + 1]);
        }
      }
      if (!grouped) continue;
      // The scales change with the columns.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = stripe * kRows + lane / 4 + 8 * half;
        const float scale = row < w.rows ? scale_of(w, row, tile * kCols) : 0;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            mine[group][i] += sums[group][i] * scale;
            sums[group][i] = 0;
          }
        }
      }
    }
  }
}

// A stripe's sums, of which `mine` are a lane's: of every eighth tile, or of every eighth run of tiles.
template <class Layout, int kGroups>
__device__ void multiply(const InfoldLinear& p, Layout& layout, int stripe, float (&mine)[kGroups][4]) {
  const InfoldWeight& w = p.weight;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int across = (w.cols + kCols - 1) / kCols;
  float sums[kGroups][4] = {};
  if constexpr (Layout::kInRuns) {
    for (int run = uniform(warp); run < pairs::most_runs(across); run += kWarps) {
      const pairs::Run tiles = layout.enter(w, stripe, run, across);
      // A stripe has seldom as many as it has room for.
      if (tiles.begin == tiles.end) break;
      multiply_tiles<Layout, 1>(p, layout, stripe, tiles.begin, tiles.end, sums, mine);
    }
  } else {
    multiply_tiles<Layout, kWarps>(p, layout, stripe, warp, across, sums, mine);
  }
  if (static_cast<int>(w.head->group_cols) < w.cols) return;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = stripe * kRows + lane / 4 + i / 2 * 8;
      mine[group][i] = sums[group][i] * (row < w.rows ? scale_of(w, row, 0) : 0);
    }
  }
}

template <class Layout, int kGroups>
__device__ void linear(const InfoldLinear& p) {
  __shared__ uint32_t table[Layout::kSharedWords];
  __shared__ float parts[kWarps][kRows][kGroups * kGroup];
  const InfoldWeight& w = p.weight;
  Layout layout(w, Layout::kInRuns ? reinterpret_cast<uint32_t*>(dynamic_shared()) : table);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  for (int stripe = blockIdx.x; stripe * kRows < w.rows; stripe += gridDim.x) {
    float sums[kGroups][4] = {};
    multiply<Layout, kGroups>(p, layout, stripe, sums);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        parts[warp][lane / 4 + i / 2 * 8][group * kGroup + lane % 4 * 2 + i % 2] = sums[group][i];
      }
    }
    __syncthreads();
    const int out_row = threadIdx.x / (kGroups * kGroup), batch_row = threadIdx.x % (kGroups * kGroup);
    const int row = stripe * kRows + out_row;
    if (out_row < kRows && row < w.rows && batch_row < p.batch) {
      float sum = 0;
      for (int part = 0; part < kWarps; ++part) sum += parts[part][out_row][batch_row];
      sum += listed_apart(p, layout.filler(), row, batch_row);
      if (p.bias != nullptr) sum += from_bf16(p.bias[row]);
      p.y[static_cast<size_t>(batch_row) * w.rows + row] = to_bf16(sum);
    }
    // Before the next stripe's parts.
    __syncthreads();
  }
}

using Pairs = PairsLayout<false, pairs::kCopies>;
using PairsOfLevels = PairsLayout<true, pairs::kCopies>;

}  // namespace

#define INFOLD_KERNEL(name, layout, groups)                                                           \
  extern "C" __global__ void __launch_bounds__(kWarps* kLanes) infold_linear_##name(InfoldLinear p) { \
    linear<layout, groups>(p);                                                                        \
  }
INFOLD_KERNEL(window_8, WindowLayout, 1)
INFOLD_KERNEL(window_16, WindowLayout, 2)
INFOLD_KERNEL(codes4_8, CodesLayout<4>, 1)
INFOLD_KERNEL(codes4_16, CodesLayout<4>, 2)
INFOLD_KERNEL(codes5_8, CodesLayout<5>, 1)
INFOLD_KERNEL(codes5_16, CodesLayout<5>, 2)
INFOLD_KERNEL(codes8_8, CodesLayout<8>, 1)
INFOLD_KERNEL(codes8_16, CodesLayout<8>, 2)
INFOLD_KERNEL(pairs_8, Pairs, 1)
INFOLD_KERNEL(pairs_16, Pairs, 2)
INFOLD_KERNEL(pairs_of_levels_8, PairsOfLevels, 1)
INFOLD_KERNEL(pairs_of_levels_16, PairsOfLevels, 2)
#undef INFOLD_KERNEL
