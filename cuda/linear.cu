// y = x Wᵀ + b for few columns (rows of x, or parts of them): bound by reading W once. A block takes stripes of sixteen
// rows of W and divides a stripe's tiles among its warps; each decodes to the registers of mmas of eight columns each.
// The partial sums are added in the order of the warps, so results do not change from run to run.
#include "pairs_layout.cuh"
#include "values.cuh"

namespace {

using namespace infold;

constexpr int kWarps = 8;
// Columns that an mma takes.
constexpr int kGroup = 8;
// Tiles of a warp that are on their way from memory while one is decoded.
constexpr int kAhead = 2;

// Sixteen neighbours in a column's x, in pairs: operand B of a tile's steps.
struct Inputs {
  uint32_t pairs[8];
};

// Of what is beyond x, zero.
__device__ Inputs load_inputs(const InfoldLinear& p, int column, int col) {
  Inputs result = {};
  const int cols = p.weight.cols;
  if (column >= p.batch * p.parts || col >= cols) return result;
  const uint16_t* x = p.x + static_cast<size_t>(column) * cols + col;
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

// What the sum of one row of W and one column lacks because of values that have no code.
__device__ float listed_apart(const InfoldLinear& p, float filler, int row, int column) {
  const InfoldWeight& w = p.weight;
  const uint16_t* x = p.x + static_cast<size_t>(column) * w.cols;
  float sum = 0;
  for_escapes(w, row, 0, 1, [&](const InfoldEscape& escape) {
    sum += (escape.value - filler) * from_bf16(x[escape.col]) * scale_of(w, row, escape.col);
  });
  return sum;
}

// Adds what the tiles from `begin` on, each kStride from the next, give a stripe's sums of kGroups groups of columns.
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
    for (int ahead_by = 0; ahead_by < kAhead; ++ahead_by) {
      const int tile = start + ahead_by * kStride;
      if (tile >= end) break;
      const typename Layout::Tile current = ahead[ahead_by];
      const int next = tile + kAhead * kStride;
      if (next < end) ahead[ahead_by] = Layout::load(w.tiles, first + next, lane);
      if constexpr (Layout::kInRuns) layout.begin_tile();
      // All inputs of a tile are on their way at once where registers hold them; many groups' come one after another.
      constexpr int kTogether = kGroups < 2 ? 1 : 2;
      Fragment a[kSteps];
#pragma unroll
      for (int part = 0; part < kGroups; part += kTogether) {
        Inputs x[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          x[i] = load_inputs(p, (part + i) * kGroup + lane / 4, tile * kCols + lane % 4 * 16);
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          if (part == 0) a[step] = layout.step(current, step);
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            multiply_add(sums[part + i], a[step].registers, x[i].pairs[2 * step], x[i].pairs[2 * step + 1]);
          }
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
  // Groups whose sums the warps exchange at a time.
  constexpr int kTogether = kGroups < 2 ? 1 : 2;
  constexpr int kColumns = kTogether * kGroup;
  __shared__ uint32_t table[Layout::kSharedWords];
  __shared__ float shares[kWarps][kRows][kColumns];
  const InfoldWeight& w = p.weight;
  Layout layout(w, Layout::kInRuns ? reinterpret_cast<uint32_t*>(dynamic_shared()) : table);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  for (int stripe = blockIdx.x; stripe * kRows < w.rows; stripe += gridDim.x) {
    float sums[kGroups][4] = {};
    multiply<Layout, kGroups>(p, layout, stripe, sums);
#pragma unroll
    for (int first = 0; first < kGroups; first += kTogether) {
#pragma unroll
      for (int group = 0; group < kTogether; ++group) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          shares[warp][lane / 4 + i / 2 * 8][group * kGroup + lane % 4 * 2 + i % 2] = sums[first + group][i];
        }
      }
      __syncthreads();
      // A row of x has several parts only where there are at most sixteen columns.
      const int out_row = threadIdx.x / kColumns, out = threadIdx.x % kColumns;
      const int row = stripe * kRows + out_row, batch_row = first * kGroup + out;
      if (out_row < kRows && row < w.rows && batch_row < p.batch) {
        float sum = 0;
        for (int part = 0; part < p.parts; ++part) {
          const int column = out * p.parts + part;
          for (int share = 0; share < kWarps; ++share) sum += shares[share][out_row][column];
          sum += listed_apart(p, Layout::filler(w), row, first * kGroup + column);
        }
        if (p.bias != nullptr) sum += load_value(p.bias, row, p.dtype);
        store_value(p.y, static_cast<size_t>(batch_row) * w.rows + row, p.dtype, sum);
      }
      // Before the next shares.
      __syncthreads();
    }
  }
}

using Pairs = PairsLayout<false, pairs::kCopies>;
using PairsOfLevels = PairsLayout<true, pairs::kCopies>;

}  // namespace

#define INFOLD_KERNEL(name, layout, groups)                                        \
  extern "C" __global__ void __launch_bounds__(kWarps* kLanes, groups > 4 ? 1 : 2) \
      infold_linear_##name(InfoldLinear p) {                                       \
    linear<layout, groups>(p);                                                     \
  }
#define INFOLD_KERNELS(name, layout)  \
  INFOLD_KERNEL(name##_8, layout, 1)  \
  INFOLD_KERNEL(name##_16, layout, 2) \
  INFOLD_KERNEL(name##_32, layout, 4) \
  INFOLD_KERNEL(name##_64, layout, 8)
INFOLD_KERNELS(window, WindowLayout)
INFOLD_KERNELS(codes4, CodesLayout<4>)
INFOLD_KERNELS(codes5, CodesLayout<5>)
INFOLD_KERNELS(codes8, CodesLayout<8>)
INFOLD_KERNEL(pairs_8, Pairs, 1)
INFOLD_KERNEL(pairs_16, Pairs, 2)
INFOLD_KERNEL(pairs_of_levels_8, PairsOfLevels, 1)
INFOLD_KERNEL(pairs_of_levels_16, PairsOfLevels, 2)
#undef INFOLD_KERNELS
#undef INFOLD_KERNEL
