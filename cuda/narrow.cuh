// Products of few columns: what a warp does with a tile, and a block with the sums of its warps, however tiles come.
#pragma once

#include "layouts.cuh"
#include "values.cuh"

namespace infold {
namespace narrow {

constexpr int kWarps = 8;
// Columns that an mma takes.
constexpr int kGroup = 8;

// Sixteen neighbours in a column's x, in pairs: operand B of a tile's steps.
struct Inputs {
  uint32_t pairs[8];
};

// Of what is beyond x, zero.
__device__ inline Inputs load_inputs(const InfoldLinear& p, int column, int col) {
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
__device__ inline float listed_apart(const InfoldLinear& p, float filler, int row, int column) {
  const InfoldWeight& w = p.weight;
  const uint16_t* x = p.x + static_cast<size_t>(column) * w.cols;
  float sum = 0;
  for_escapes(w, row, 0, 1, [&](const InfoldEscape& escape) {
    sum += (escape.value - filler) * from_bf16(x[escape.col]) * scale_of(w, row, escape.col);
  });
  return sum;
}

// A warp's part of a stripe's sums of kGroups groups of columns: those of `scaled` are a lane's, with what has its
// scale.
template <int kGroups>
struct Sums {
  float own[kGroups][4] = {}, scaled[kGroups][4] = {};

  // Of a lane's two rows.
  struct Scales {
    float rows[2];
  };

  __device__ static Scales load_scales(const InfoldWeight& w, int stripe, int col) {
    const int row = stripe * kRows + threadIdx.x % kLanes / 4;
    return {{row < w.rows ? scale_of(w, row, col) : 0, row + 8 < w.rows ? scale_of(w, row + 8, col) : 0}};
  }

  // Takes the sums over, scaled.
  __device__ void scale(const Scales& scales) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scaled[group][i] += own[group][i] * scales.rows[i / 2];
        own[group][i] = 0;
      }
    }
  }

  // Adds a tile's products.
  template <class Layout>
  __device__ void add(const InfoldLinear& p, Layout& layout, const typename Layout::Tile& weights, int stripe, int tile,
                      bool grouped) {
    const int lane = threadIdx.x % kLanes;
    // All inputs of a tile are on their way at once where registers hold them; many groups' come one after another.
    constexpr int kTogether = kGroups < 2 ? 1 : 2;
    Fragment a[kSteps];
    // On their way before they are needed.
    Scales scales = {};
    if (grouped) scales = load_scales(p.weight, stripe, tile * kCols);
#pragma unroll
    for (int part = 0; part < kGroups; part += kTogether) {
      Inputs x[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        x[i] = load_inputs(p, (part + i) * kGroup + lane / 4, tile * kCols + lane % 4 * 16);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (part == 0) a[step] = layout.step(weights, step);
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          multiply_add(own[part + i], a[step].registers, x[i].pairs[2 * step], x[i].pairs[2 * step + 1]);
        }
      }
    }
    if (grouped) scale(scales);
  }
};

// Adds the warps' sums of a stripe in their order, and writes the results.
template <class Layout, int kGroups>
__device__ void finish(const InfoldLinear& p, const Sums<kGroups>& sums, int stripe) {
  // Groups whose sums the warps exchange at a time.
  constexpr int kTogether = kGroups < 2 ? 1 : 2;
  constexpr int kColumns = kTogether * kGroup;
  __shared__ float shares[kWarps][kRows][kColumns];
  const InfoldWeight& w = p.weight;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
#pragma unroll
  for (int first = 0; first < kGroups; first += kTogether) {
#pragma unroll
    for (int group = 0; group < kTogether; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = group * kGroup + lane % 4 * 2 + i % 2;
        shares[warp][row][column] = sums.scaled[first + group][i];
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

}  // namespace narrow
}  // namespace infold
