// The dense weight, or some rows of it: bound by writing it. A lane's registers of a tile are sixteen neighbours in
// each of two rows, which it writes one beside the other.
#include "pairs_layout.cuh"
#include "values.cuh"

namespace {

using namespace infold;

constexpr int kWarps = 8;
// Columns that a lane holds of each of its rows.
constexpr int kRun = kCols / 4;

// Where a value goes: to a row of `out`.
template <class Layout>
__device__ void put(const InfoldUnpack& p, size_t at, float value) {
  if (p.dtype == INFOLD_BF16) {
    static_cast<uint16_t*>(p.out)[at] = Layout::to_bf16(value);
  } else {
    store_value(p.out, at, p.dtype, value);
  }
}

// Writes a lane's run of one of its two rows of a tile, of which the columns from `col` on may be there, to `out` from
// `at` on.
template <class Layout, class Tile>
__device__ void put_run(const InfoldUnpack& p, const Layout& layout, const Tile& tile, bool lower, int row, int col,
                        size_t at) {
  const InfoldWeight& w = p.weight;
  if (col >= w.cols) return;
  const float scale = scale_of(w, row, col);
  float run[kRun];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float values[2];
      layout.values(tile, w, step, 2 * pair + (lower ? 1 : 0), values);
      run[4 * step + 2 * pair] = w.scales == nullptr ? values[0] : values[0] * scale;
      run[4 * step + 2 * pair + 1] = w.scales == nullptr ? values[1] : values[1] * scale;
    }
  }
  uint16_t* halves = static_cast<uint16_t*>(p.out) + at;
  if (p.dtype == INFOLD_BF16 && col + kRun <= w.cols && reinterpret_cast<uintptr_t>(halves) % 16 == 0) {
    uint32_t words[kRun / 2];
#pragma unroll
    for (int i = 0; i < kRun / 2; ++i) {
      words[i] = Layout::to_bf16(run[2 * i]) | static_cast<uint32_t>(Layout::to_bf16(run[2 * i + 1])) << 16;
    }
    reinterpret_cast<uint4*>(halves)[0] = {words[0], words[1], words[2], words[3]};
    reinterpret_cast<uint4*>(halves)[1] = {words[4], words[5], words[6], words[7]};
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (col + i < w.cols) put<Layout>(p, at + i, run[i]);
  }
}

// Writes what is listed apart in a row, which begins at `at`, over what stands in its place.
template <class Layout>
__device__ void put_apart(const InfoldUnpack& p, int row, size_t at) {
  const InfoldWeight& w = p.weight;
  for_escapes(w, row, threadIdx.x, blockDim.x, [&](const InfoldEscape& escape) {
    const float scale = scale_of(w, row, escape.col);
    put<Layout>(p, at + escape.col, w.scales == nullptr ? escape.value : escape.value * scale);
  });
}

template <class Layout>
__device__ void unpack(const InfoldUnpack& p) {
  // No table: values come exact from memory, and are few.
  const InfoldWeight& w = p.weight;
  const Layout layout = Layout::without_table(w);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int across = (w.cols + kCols - 1) / kCols;
  if (p.indices == nullptr) {
    const int stripe = blockIdx.x;
    const size_t first_row = static_cast<size_t>(stripe) * kRows;
    for (int index = warp; index < across; index += kWarps) {
      const typename Layout::Tile tile = Layout::load(w.tiles, static_cast<size_t>(stripe) * across + index, lane);
      const int col = index * kCols + lane % 4 * kRun;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const size_t row = first_row + lane / 4 + 8 * half;
        if (row >= static_cast<size_t>(w.rows)) continue;
        put_run(p, layout, tile, half == 1, static_cast<int>(row), col, row * w.cols + col);
      }
    }
    __syncthreads();
    for (size_t row = first_row; row < first_row + kRows && row < static_cast<size_t>(w.rows); ++row) {
      put_apart<Layout>(p, static_cast<int>(row), row * w.cols);
    }
    return;
  }
  const int64_t index = p.indices[blockIdx.x];
  if (index < 0 || index >= w.rows) {
    fail();
    return;
  }
  const int stripe = static_cast<int>(index / kRows), row = static_cast<int>(index % kRows);
  const size_t out = static_cast<size_t>(blockIdx.x) * w.cols;
  for (int part = threadIdx.x; part < 4 * across; part += kWarps * kLanes) {
    const size_t at = static_cast<size_t>(stripe) * across + part / 4;
    const typename Layout::Tile tile = Layout::load(w.tiles, at, row % 8 * 4 + part % 4);
    const int col = part / 4 * kCols + part % 4 * kRun;
    put_run(p, layout, tile, row >= 8, static_cast<int>(index), col, out + col);
  }
  __syncthreads();
  put_apart<Layout>(p, static_cast<int>(index), out);
}

using Pairs = PairsLayout<false, 1>;
using PairsOfLevels = PairsLayout<true, 1>;

// Where tiles come in runs, a stripe's are decoded whole, a run by each warp, also for one row of it.
template <class Layout>
__device__ void unpack_runs(const InfoldUnpack& p) {
  alignas(16) __shared__ uint32_t shared[Layout::kSharedBytes / sizeof(uint32_t)];
  const InfoldWeight& w = p.weight;
  Layout layout(w, shared);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int across = (w.cols + kCols - 1) / kCols;
  const int64_t index = p.indices == nullptr ? 0 : p.indices[blockIdx.x];
  if (index < 0 || index >= w.rows) {
    fail();
    return;
  }
  const int stripe = p.indices == nullptr ? blockIdx.x : static_cast<int>(index / kRows);
  // The rows that are wanted, and where the first of them begins.
  const int first_row = p.indices == nullptr ? stripe * kRows : static_cast<int>(index);
  const int end_row = p.indices != nullptr ? first_row + 1 : first_row + kRows < w.rows ? first_row + kRows : w.rows;
  const size_t out = static_cast<size_t>(p.indices == nullptr ? first_row : blockIdx.x) * w.cols;
  for (int run = warp; run < pairs::most_runs(across); run += kWarps) {
    const pairs::Run tiles = layout.enter(w, stripe, run, across);
    if (tiles.begin == tiles.end) break;
    layout.begin_run();
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
      const typename Layout::Decoded decoded =
          layout.decode(Layout::load(w.tiles, static_cast<size_t>(stripe) * across + tile, lane));
      const int col = tile * kCols + lane % 4 * kRun;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = stripe * kRows + lane / 4 + 8 * half;
        if (row < first_row || row >= end_row) continue;
        put_run(p, layout, decoded, half == 1, row, col, out + static_cast<size_t>(row - first_row) * w.cols + col);
      }
    }
  }
  __syncthreads();
  for (int row = first_row; row < end_row; ++row) {
    put_apart<Layout>(p, row, out + static_cast<size_t>(row - first_row) * w.cols);
  }
}

}  // namespace

// `blocks` of a multiprocessor shall have registers.
#define INFOLD_KERNEL(name, body, blocks) \
  extern "C" __global__ void __launch_bounds__(kWarps* kLanes, blocks) infold_unpack_##name(InfoldUnpack p) { body(p); }
INFOLD_KERNEL(window, unpack<WindowLayout>, 4)
INFOLD_KERNEL(codes4, unpack<CodesLayout<4>>, 4)
INFOLD_KERNEL(codes5, unpack<CodesLayout<5>>, 4)
INFOLD_KERNEL(codes8, unpack<CodesLayout<8>>, 4)
INFOLD_KERNEL(pairs, unpack_runs<Pairs>, 2)
INFOLD_KERNEL(pairs_of_levels, unpack_runs<PairsOfLevels>, 2)
#undef INFOLD_KERNEL
