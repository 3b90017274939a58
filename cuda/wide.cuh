// Products of up to 128 columns on Hopper, W's and its transpose's alike. A block takes eight tiles of W at a time and
// all columns of the inputs, so that a tile is decoded once. Tiles of both are copied to shared memory ahead of eight
// warps; these decode to registers, which are operand A of their warpgroup's mma; operand B is the inputs as they lie.
// What the sums' terms are split into is added by a second kernel, in order, so that results do not change from run to
// run.
#pragma once

#include "inputs.cuh"
#include "layouts.cuh"
#include "values.cuh"

namespace infold {
namespace wide {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kStages = 4;
// Columns of a warpgroup's mma, and its warps.
constexpr int kGroup = 64;
constexpr int kGroupWarps = 4;
// Rows of sums that a block makes: sixteen a warp.
constexpr int kBlockSums = kWarps * 16;
// Bytes of a tile of the inputs, a column; and of a step, of these.
constexpr int kColumnBytes = kCols * 2;
constexpr int kStepBytes = 16 * 2;

// Eight tiles of W and one of the inputs.
template <class Layout, int kColumns>
struct Stage {
  unsigned char inputs[kColumns * kColumnBytes];
  uint32_t tiles[kWarps][Layout::kTileWords];
};

// A register's weights times their row's scale, rounded as those of a dense bfloat16 weight are.
__device__ inline uint32_t scaled(uint32_t pair, float scale) {
  const uint32_t low = to_bf16(from_bf16(pair & 0xffff) * scale);
  return low | static_cast<uint32_t>(to_bf16(from_bf16(pair >> 16) * scale)) << 16;
}

// What is to be added for a value that has no code, whose filler was scaled with the others, or whose sum was.
__device__ inline float correction(float value, float filler, float scale, bool was_scaled) {
  return was_scaled ? value * scale - from_bf16(to_bf16(filler * scale)) : (value - filler) * scale;
}

// Scales of a lane's two rows of a stripe.
struct RowScales {
  float scales[2];

  __device__ RowScales(const InfoldWeight& w, int stripe, int col) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = stripe * kRows + static_cast<int>(threadIdx.x) % kLanes / 4 + 8 * half;
      scales[half] = row < w.rows ? scale_of(w, row, col) : 0;
    }
  }

  __device__ void apply(Fragment& a) const {
#pragma unroll
    for (int reg = 0; reg < kRegisters; ++reg) a.registers[reg] = scaled(a.registers[reg], scales[reg % 2]);
  }
};

// A block's share of the terms, and its place among the blocks of a launch.
struct Share {
  int block, split, begin, count;

  // Of `terms` that are split, for `sums` rows of sums.
  __device__ Share(const InfoldWide& p, int terms) {
    const int blocks = (p.row_count + kBlockSums - 1) / kBlockSums;
    block = static_cast<int>(blockIdx.x) % blocks;
    split = static_cast<int>(blockIdx.x) / blocks;
    begin = static_cast<int>(static_cast<int64_t>(split) * terms / p.splits);
    count = static_cast<int>(static_cast<int64_t>(split + 1) * terms / p.splits) - begin;
  }
};

// `Direction` says which tiles of W a stage has, and decodes a warp's part of them.
template <class Direction, class Layout, int kColumns>
struct Pipeline {
  using Place = Stage<Layout, kColumns>;
  // Patterns of swizzling repeat every 1,024 bytes.
  static_assert(sizeof(Place) % 1024 == 0, "a stage's inputs are not aligned");

  const InfoldWide& p;
  const Direction& direction;
  const Layout& layout;
  Place* stages;
  Barrier *full, *empty;
  Share share;

  // Begins to copy a stage, by one thread. Its place has to be empty.
  __device__ void fetch(int i) const {
    const int at = share.begin + i;
    Place& to = stages[i % kStages];
    Barrier& barrier = full[i % kStages];
    int present = 0;
    for (int tile = 0; tile < kWarps; ++tile) present += direction.has(at, tile);
    expect_bytes(barrier, static_cast<uint32_t>(sizeof to.inputs + present * sizeof to.tiles[0]));
    copy_async(to.inputs, p.x + static_cast<size_t>(at) * kColumns * kCols, sizeof to.inputs, barrier);
    for (int tile = 0; tile < kWarps; ++tile) {
      if (!direction.has(at, tile)) continue;
      const uint32_t* from = p.weight.tiles + direction.tile(at, tile) * Layout::kTileWords;
      copy_async(to.tiles[tile], from, sizeof to.tiles[0], barrier);
    }
  }

  // A warp's weights of a stage, when it has come.
  __device__ void decode(int i, Fragment (&a)[kSteps]) const {
    wait_for(full[i % kStages], i / kStages);
    direction.decode(layout, stages[i % kStages].tiles, share.begin + i, a);
  }

  __device__ void run(float (&sums)[kColumns / kGroup][32]) const {
    const int lane = threadIdx.x % kLanes, count = share.count;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages && i < count; ++i) fetch(i);
    }
    sync_warp();
    for (int i = 0; i < count; ++i) {
      Fragment a[kSteps];
      decode(i, a);
      begin_products(sums);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int group = 0; group < kColumns / kGroup; ++group) {
          const unsigned char* b = stages[i % kStages].inputs + group * kGroup * kColumnBytes + step * kStepBytes;
          multiply_add_async(sums[group], a[step].registers, swizzled_operand(b));
        }
      }
      commit_products();
      // Nothing is decoded meanwhile, for ptxas then puts temporaries into registers that the products still read. The
      // other warpgroup decodes.
      wait_for_products(sums);
      if (lane == 0) arrive(empty[i % kStages]);
      // The place of the stage before: the other warps will have left it, too.
      const int left = i - 1;
      if (threadIdx.x == 0 && left >= 0 && left + kStages < count) {
        wait_for(empty[left % kStages], left / kStages);
        fetch(left + kStages);
      }
      sync_warp();
    }
  }
};

// Runs a block's share. A warp's sums are sixteen rows, those of an mma.
template <class Direction, class Layout, int kColumns>
__device__ void multiply(const InfoldWide& p, const Direction& direction, const Layout& layout, const Share& share,
                         float (&sums)[kColumns / kGroup][32]) {
  __shared__ Barrier full[kStages], empty[kStages];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(full[i], 1);
      init_barrier(empty[i], kWarps);
    }
    publish_barriers();
  }
  __syncthreads();
  auto* stages = reinterpret_cast<Stage<Layout, kColumns>*>(dynamic_shared());
  const Pipeline<Direction, Layout, kColumns> pipeline{p, direction, layout, stages, full, empty, share};
  pipeline.run(sums);
}

// Writes one of a lane's two rows of sums as row `row` of a split's.
template <int kColumns>
__device__ void put_sums(const InfoldWide& p, const float (&sums)[kColumns / kGroup][32], int half, int split, int row,
                         float scale) {
  const int lane = threadIdx.x % kLanes;
  float* out = p.sums + (static_cast<size_t>(split) * p.row_count + row) * kColumns;
#pragma unroll
  for (int i = 0; i < kColumns / 8; ++i) {
    const float* pair = &sums[i / 8][i % 8 * 4 + 2 * half];
    out[8 * i + lane % 4 * 2] = pair[0] * scale;
    out[8 * i + lane % 4 * 2 + 1] = pair[1] * scale;
  }
}

// The splits' sums of sixteen rows, of all columns, with what is to be added to each.
constexpr int kMostColumns = 128;
using Outputs = float[kRows][kMostColumns + 1];

__device__ inline float sum_of_splits(const InfoldWide& p, int row, int column) {
  float sum = 0;
  for (int split = 0; split < p.splits; ++split) {
    sum += p.sums[(static_cast<size_t>(split) * p.row_count + row) * p.columns + column];
  }
  return sum;
}

// Writes results of sixteen rows of sums from `first` on, of `width` in a row of y: the sum of a value's parts, and the
// bias.
__device__ inline void put_results(const InfoldWide& p, const Outputs& outputs, int first, int width) {
  for (int i = threadIdx.x; i < p.batch * kRows; i += blockDim.x) {
    const int row = first + i % kRows, batch_row = i / kRows;
    if (row >= p.first_row + p.row_count) continue;
    float sum = 0;
    for (int part = 0; part < p.parts; ++part) sum += outputs[i % kRows][batch_row * p.parts + part];
    if (p.bias != nullptr) sum += load_value(p.bias, row, p.dtype);
    store_value(p.y, static_cast<size_t>(batch_row) * width + row, p.dtype, sum);
  }
}

}  // namespace wide
}  // namespace infold
