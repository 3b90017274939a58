// y = x Wᵀ + b for up to 128 columns on Hopper: a block takes 128 rows of W, a warp a stripe of them.
#include "wide.cuh"

namespace {

using namespace infold;

// A stage is a tile of each stripe of a block. Where scales change along a row weights are scaled, else sums.
struct Forward {
  const InfoldWeight& w;
  int first_stripe, across;
  bool grouped;

  __device__ bool has(int, int tile) const { return (first_stripe + tile) * kRows < w.rows; }
  __device__ size_t tile(int at, int tile) const { return static_cast<size_t>(first_stripe + tile) * across + at; }

  template <class Layout>
  __device__ void decode(const Layout& layout, const uint32_t (*tiles)[Layout::kTileWords], int at,
                         Fragment (&a)[kSteps]) const {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const auto tile = Layout::template read<FromShared>(tiles[warp], lane);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) a[step] = layout.step(tile, step);
    if (!grouped) return;
    const wide::RowScales scales(w, first_stripe + warp, at * kCols);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) scales.apply(a[step]);
  }
};

template <class Layout, int kColumns>
__device__ void forward(const InfoldWide& p) {
  __shared__ uint32_t table[Layout::kSharedWords];
  const InfoldWeight& w = p.weight;
  const Layout layout(w, table);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, across = (w.cols + kCols - 1) / kCols;
  const wide::Share share(p, across);
  const bool grouped = is_grouped(w);
  const int first_row = p.first_row + share.block * wide::kBlockSums;
  float sums[kColumns / wide::kGroup][32] = {};
  wide::multiply<Forward, Layout, kColumns>(p, {w, first_row / kRows, across, grouped}, layout, share, sums);
  const wide::RowScales row_scales(w, first_row / kRows + warp, 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + warp * kRows + lane / 4 + 8 * half - p.first_row;
    const float scale = grouped ? 1 : row_scales.scales[half];
    if (row < p.row_count) wide::put_sums<kColumns>(p, sums, half, share.split, row, scale);
  }
}

// What the sum of one row of W and one column lacks because of values that have no code.
__device__ float listed_apart(const InfoldWide& p, float filler, int row, int column) {
  const InfoldWeight& w = p.weight;
  float sum = 0;
  for_escapes(w, row, 0, 1, [&](const InfoldEscape& escape) {
    const float x = from_bf16(p.x[inputs::place(p.columns, column, static_cast<int>(escape.col))]);
    sum += wide::correction(escape.value, filler, scale_of(w, row, escape.col), is_grouped(w)) * x;
  });
  return sum;
}

// A block for each stripe.
template <class Layout>
__device__ void finish(const InfoldWide& p) {
  __shared__ wide::Outputs outputs;
  const InfoldWeight& w = p.weight;
  const int first = blockIdx.x * kRows;
  for (int i = threadIdx.x; i < kRows * p.columns; i += blockDim.x) {
    const int row = first + i / p.columns, column = i % p.columns;
    if (row >= p.row_count) break;
    outputs[i / p.columns][column] =
        wide::sum_of_splits(p, row, column) + listed_apart(p, Layout::filler(w), p.first_row + row, column);
  }
  __syncthreads();
  wide::put_results(p, outputs, p.first_row + first, w.rows);
}

}  // namespace

#define INFOLD_KERNEL(name, layout, columns)                                                                  \
  extern "C" __global__ void __launch_bounds__(wide::kThreads) infold_wide_##name##_##columns(InfoldWide p) { \
    INFOLD_HOPPER(forward<layout, columns>(p));                                                               \
  }
#define INFOLD_KERNELS(name, layout)                                                                   \
  INFOLD_KERNEL(name, layout, 64)                                                                      \
  INFOLD_KERNEL(name, layout, 128)                                                                     \
  extern "C" __global__ void __launch_bounds__(wide::kThreads, 4) infold_finish_##name(InfoldWide p) { \
    finish<layout>(p);                                                                                 \
  }
INFOLD_FOR_LAYOUTS(INFOLD_KERNELS)
#undef INFOLD_KERNELS
#undef INFOLD_KERNEL
