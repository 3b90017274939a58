// y = x Wᵀ + b for up to 256 columns on Hopper. A block takes 128 rows of W and all columns, so that a tile is decoded
// once: one warp keeps tiles of W and of x coming, eight warps decode a stripe of sixteen rows each to registers, which
// are operand A of their warpgroup's mma; operand B is x in shared memory. What W's columns are split into is added by
// a second kernel, in order, so results do not change from run to run.
#include "inputs.cuh"
#include "layouts.cuh"
#include "values.cuh"

namespace {

using namespace infold;

// Warps that multiply, and the rows of a block.
constexpr int kWarps = 8;
constexpr int kBlockRows = kWarps * kRows;
constexpr int kStages = 4;
// Columns of a warpgroup's mma.
constexpr int kGroup = 64;
// Bytes of a tile of x, a column; and of a step, of these.
constexpr int kColumnBytes = kCols * 2;
constexpr int kStepBytes = 16 * 2;

// One tile of each stripe, and x's.
template <class Layout, int kColumns>
struct Stage {
  unsigned char x[kColumns * kColumnBytes];
  uint32_t tiles[kWarps][Layout::kTileWords];
};

// A register's weights times their row's scale, rounded as those of a dense bfloat16 weight are.
__device__ uint32_t scaled(uint32_t pair, float scale) {
  const uint32_t low = to_bf16(from_bf16(pair & 0xffff) * scale);
  return low | static_cast<uint32_t>(to_bf16(from_bf16(pair >> 16) * scale)) << 16;
}

// Scales of a lane's two rows of a stripe from row `first` on.
struct RowScales {
  float scales[2];

  __device__ RowScales(const InfoldWeight& w, int first, int col) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + static_cast<int>(threadIdx.x) % kLanes / 4 + 8 * half;
      scales[half] = row < w.rows ? scale_of(w, row, col) : 0;
    }
  }
};

// A block's tiles and their places in shared memory.
template <class Layout, int kColumns>
struct Pipeline {
  const InfoldWide& p;
  Stage<Layout, kColumns>* stages;
  Barrier *full, *empty;
  int across, first_row, begin, count;

  // Begins to copy a tile, by one thread. Its place has to be empty.
  __device__ void fetch(int i) const {
    const int stripes = (p.weight.rows - first_row + kRows - 1) / kRows;
    const int present = stripes < kWarps ? stripes : kWarps;
    const int stage = i % kStages, tile = begin + i;
    Stage<Layout, kColumns>& to = stages[stage];
    expect_bytes(full[stage], static_cast<uint32_t>(sizeof to.x + present * sizeof to.tiles[0]));
    copy_async(to.x, p.x + static_cast<size_t>(tile) * kColumns * kCols, sizeof to.x, full[stage]);
    for (int stripe = 0; stripe < present; ++stripe) {
      const size_t index = static_cast<size_t>(first_row / kRows + stripe) * across + tile;
      copy_async(to.tiles[stripe], p.weight.tiles + index * Layout::kTileWords, sizeof to.tiles[0], full[stage]);
    }
  }

  // A warp's weights of a tile, when it has come.
  __device__ void decode(const Layout& layout, int i, bool grouped, Fragment (&a)[kSteps]) const {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, stage = i % kStages;
    wait_for(full[stage], i / kStages);
    const auto tile = Layout::template read<FromShared>(stages[stage].tiles[warp], lane);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) a[step] = layout.step(tile, step);
    if (!grouped) return;
    const RowScales row_scales(p.weight, first_row + warp * kRows, (begin + i) * kCols);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int reg = 0; reg < kRegisters; ++reg) {
        a[step].registers[reg] = scaled(a[step].registers[reg], row_scales.scales[reg % 2]);
      }
    }
  }

  __device__ void run(const Layout& layout, bool grouped, float (&sums)[kColumns / kGroup][32]) const {
    const int lane = threadIdx.x % kLanes;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages && i < count; ++i) fetch(i);
    }
    sync_warp();
    Fragment a[kSteps], next[kSteps];
    if (count > 0) decode(layout, 0, grouped, a);
    for (int i = 0; i < count; ++i) {
      begin_products(sums);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int group = 0; group < kColumns / kGroup; ++group) {
          const unsigned char* b = stages[i % kStages].x + group * kGroup * kColumnBytes + step * kStepBytes;
          multiply_add_async(sums[group], a[step].registers, swizzled_operand(b));
        }
      }
      commit_products();
      // While it is multiplied, the next one is decoded.
      if (i + 1 < count) decode(layout, i + 1, grouped, next);
      wait_for_products(sums);
      if (lane == 0) arrive(empty[i % kStages]);
      // The place of the tile before: the other warps will have left it, too.
      const int left = i - 1;
      if (threadIdx.x == 0 && left >= 0 && left + kStages < count) {
        wait_for(empty[left % kStages], left / kStages);
        fetch(left + kStages);
      }
      sync_warp();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) a[step] = next[step];
    }
  }
};

template <class Layout, int kColumns>
__device__ void wide(const InfoldWide& p) {
  // Patterns of swizzling repeat every 1,024 bytes.
  static_assert(sizeof(Stage<Layout, kColumns>) % 1024 == 0, "a stage's inputs are not aligned");
  __shared__ uint32_t table[Layout::kSharedWords];
  __shared__ Barrier full[kStages], empty[kStages];
  auto* stages = reinterpret_cast<Stage<Layout, kColumns>*>(dynamic_shared());
  const InfoldWeight& w = p.weight;
  const Layout layout(w, table);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(full[i], 1);
      init_barrier(empty[i], kWarps);
    }
    publish_barriers();
  }
  __syncthreads();
  const int across = (w.cols + kCols - 1) / kCols;
  const int blocks = (p.row_count + kBlockRows - 1) / kBlockRows;
  const int first_row = p.first_row + static_cast<int>(blockIdx.x) % blocks * kBlockRows;
  const int split = static_cast<int>(blockIdx.x) / blocks;
  const int begin = static_cast<int>(static_cast<int64_t>(split) * across / p.splits);
  const int end = static_cast<int>(static_cast<int64_t>(split + 1) * across / p.splits);
  float sums[kColumns / kGroup][32] = {};
  const bool grouped = static_cast<int>(w.head->group_cols) < w.cols;
  const Pipeline<Layout, kColumns> pipeline{p, stages, full, empty, across, first_row, begin, end - begin};
  pipeline.run(layout, grouped, sums);
  const RowScales row_scales(w, first_row + warp * kRows, 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + warp * kRows + lane / 4 + 8 * half - p.first_row;
    if (row >= p.row_count) continue;
    const float scale = grouped ? 1 : row_scales.scales[half];
    float* out = p.sums + (static_cast<size_t>(split) * p.row_count + row) * kColumns;
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      const float* pair = &sums[i / 8][i % 8 * 4 + 2 * half];
      out[8 * i + lane % 4 * 2] = pair[0] * scale;
      out[8 * i + lane % 4 * 2 + 1] = pair[1] * scale;
    }
  }
}

// What the sum of one row of W and one column lacks because of values that have no code.
__device__ float listed_apart(const InfoldWide& p, float filler, int row, int column) {
  const InfoldWeight& w = p.weight;
  float sum = 0;
  for (uint32_t i = w.escape_starts[row]; i < w.escape_starts[row + 1]; ++i) {
    const InfoldEscape escape = w.escapes[i];
    const float x = from_bf16(p.x[inputs::place(p.columns, column, static_cast<int>(escape.col))]);
    sum += (escape.value - filler) * x * scale_of(w, row, escape.col);
  }
  return sum;
}

// A block for each stripe.
template <class Layout>
__device__ void finish(const InfoldWide& p) {
  constexpr int kMostColumns = 256;
  __shared__ float outputs[kRows][kMostColumns + 1];
  const InfoldWeight& w = p.weight;
  const int first = blockIdx.x * kRows;
  const int present = p.row_count - first < kRows ? p.row_count - first : kRows;
  for (int i = threadIdx.x; i < present * p.columns; i += blockDim.x) {
    const int row = first + i / p.columns, column = i % p.columns;
    float sum = 0;
    for (int split = 0; split < p.splits; ++split) {
      sum += p.sums[(static_cast<size_t>(split) * p.row_count + row) * p.columns + column];
    }
    outputs[i / p.columns][column] = sum + listed_apart(p, Layout::filler(w), p.first_row + row, column);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.batch * kRows; i += blockDim.x) {
    const int row = p.first_row + first + i % kRows, batch_row = i / kRows;
    if (i % kRows >= present) continue;
    float sum = 0;
    for (int part = 0; part < p.parts; ++part) sum += outputs[i % kRows][batch_row * p.parts + part];
    if (p.bias != nullptr) sum += load_value(p.bias, row, p.dtype);
    store_value(p.y, static_cast<size_t>(batch_row) * w.rows + row, p.dtype, sum);
  }
}

}  // namespace

#define INFOLD_KERNEL(name, layout, columns)                                                                  \
  extern "C" __global__ void __launch_bounds__(kWarps* kLanes) infold_wide_##name##_##columns(InfoldWide p) { \
    INFOLD_HOPPER(wide<layout, columns>(p));                                                                  \
  }
#define INFOLD_KERNELS(name, layout) \
  INFOLD_KERNEL(name, layout, 64)    \
  INFOLD_KERNEL(name, layout, 128)   \
  INFOLD_KERNEL(name, layout, 256)   \
  extern "C" __global__ void __launch_bounds__(kWarps* kLanes) infold_finish_##name(InfoldWide p) { finish<layout>(p); }
INFOLD_KERNELS(window, WindowLayout)
INFOLD_KERNELS(codes4, CodesLayout<4>)
INFOLD_KERNELS(codes5, CodesLayout<5>)
INFOLD_KERNELS(codes8, CodesLayout<8>)
#undef INFOLD_KERNELS
#undef INFOLD_KERNEL
