// y = x Wᵀ + b for few columns (rows of x, or parts of them): bound by reading W once. A block takes stripes of sixteen
// rows of W and divides a stripe's tiles among its warps; each decodes to the registers of mmas of eight columns each.
// The partial sums are added in the order of the warps, so results do not change from run to run.
#include "narrow.cuh"
#include "pairs_layout.cuh"

namespace {

using namespace infold;
using narrow::kWarps;

// Tiles of a warp that are on their way from memory while one is decoded.
constexpr int kAhead = 2;

// Adds the products of the tiles from `begin` on, each kStride from the next.
template <class Layout, int kStride, int kGroups>
__device__ void multiply_tiles(const InfoldLinear& p, Layout& layout, int stripe, int begin, int end,
                               narrow::Sums<kGroups>& sums) {
  const InfoldWeight& w = p.weight;
  const int lane = threadIdx.x % kLanes;
  const int across = (w.cols + kCols - 1) / kCols;
  const size_t first = static_cast<size_t>(stripe) * across;
  const bool grouped = is_grouped(w);

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
      sums.add(p, layout, current, stripe, tile, grouped);
    }
  }
}

// A warp takes every eighth tile of a stripe, or every eighth run of tiles.
template <class Layout, int kGroups>
__device__ void multiply(const InfoldLinear& p, Layout& layout, int stripe, narrow::Sums<kGroups>& sums) {
  const InfoldWeight& w = p.weight;
  const int warp = threadIdx.x / kLanes;
  const int across = (w.cols + kCols - 1) / kCols;
  if constexpr (Layout::kInRuns) {
    for (int run = uniform(warp); run < pairs::most_runs(across); run += kWarps) {
      const pairs::Run tiles = layout.enter(w, stripe, run, across);
      // A stripe has seldom as many as it has room for.
      if (tiles.begin == tiles.end) break;
      multiply_tiles<Layout, 1>(p, layout, stripe, tiles.begin, tiles.end, sums);
    }
  } else {
    multiply_tiles<Layout, kWarps>(p, layout, stripe, warp, across, sums);
  }
  if (!is_grouped(w)) sums.scale(sums.load_scales(w, stripe, 0));
}

template <class Layout, int kGroups>
__device__ void linear(const InfoldLinear& p) {
  __shared__ uint32_t table[Layout::kSharedWords];
  Layout layout(p.weight, Layout::kInRuns ? reinterpret_cast<uint32_t*>(dynamic_shared()) : table);
  for (int stripe = blockIdx.x; stripe * kRows < p.weight.rows; stripe += gridDim.x) {
    narrow::Sums<kGroups> sums;
    multiply(p, layout, stripe, sums);
    narrow::finish<Layout>(p, sums, stripe);
  }
}

using Pairs = PairsLayout<false, pairs::kCopies>;
using PairsOfLevels = PairsLayout<true, pairs::kCopies>;

}  // namespace

// As many blocks on a multiprocessor as leave a thread the registers that it needs: src/cuda/launch.rs has the same.
#define INFOLD_KERNEL(name, layout, groups, blocks)                                                           \
  extern "C" __global__ void __launch_bounds__(kWarps* kLanes, blocks) infold_linear_##name(InfoldLinear p) { \
    linear<layout, groups>(p);                                                                                \
  }
#define INFOLD_KERNELS(name, layout, blocks_of_8, blocks_of_16) \
  INFOLD_KERNEL(name##_8, layout, 1, blocks_of_8)               \
  INFOLD_KERNEL(name##_16, layout, 2, blocks_of_16)             \
  INFOLD_KERNEL(name##_32, layout, 4, 2)                        \
  INFOLD_KERNEL(name##_64, layout, 8, 1)
INFOLD_KERNELS(window, WindowLayout, 3, 2)
INFOLD_KERNELS(codes4, CodesLayout<4>, 4, 3)
INFOLD_KERNELS(codes5, CodesLayout<5>, 4, 3)
INFOLD_KERNELS(codes8, CodesLayout<8>, 3, 2)
INFOLD_KERNEL(pairs_8, Pairs, 1, 2)
INFOLD_KERNEL(pairs_16, Pairs, 2, 2)
INFOLD_KERNEL(pairs_of_levels_8, PairsOfLevels, 1, 2)
INFOLD_KERNEL(pairs_of_levels_16, PairsOfLevels, 2, 2)
#undef INFOLD_KERNELS
#undef INFOLD_KERNEL
