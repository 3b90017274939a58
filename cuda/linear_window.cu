// y = x Wᵀ + b for at most sixteen rows of x, W in the window layout: bound by reading W once. A block owns a stripe of
// sixteen rows of W and divides its tiles among its warps; each decodes to the registers of an mma, whose eight columns
// are rows of x. The partial sums are added in the order of the warps, so results do not change from run to run.
#include "params.h"
#include "window_tile.cuh"

namespace {

using namespace infold;
using namespace infold::window;

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
__device__ Inputs load_inputs(const InfoldWindowLinear& p, int row, int col) {
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

// What the sum of one row of W and one of x lacks because of values outside the window.
__device__ float listed_apart(const InfoldWindowLinear& p, int stripe, int row, int batch_row) {
  const InfoldWindowWeight& w = p.weight;
  const uint16_t* x = p.x + static_cast<size_t>(batch_row) * w.cols;
  const float filler_value = from_bf16(filler(*w.base));
  float sum = 0;
  for (uint32_t i = w.escape_starts[stripe]; i < w.escape_starts[stripe + 1]; ++i) {
    const InfoldEscape escape = w.escapes[i];
    if (escape.row == row) sum += (from_bf16(escape.bits) - filler_value) * from_bf16(x[escape.col]);
  }
  return sum;
}

// For at most kGroups groups of rows of x.
template <int kGroups>
__device__ void linear(const InfoldWindowLinear& p) {
  const InfoldWindowWeight& w = p.weight;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, stripe = blockIdx.x;
  const int across = (w.cols + kCols - 1) / kCols;
  const size_t first = static_cast<size_t>(stripe) * across;
  const uint32_t base = base_bits(*w.base);

  Tile ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int tile = warp + i * kWarps;
    if (tile < across) ahead[i] = load_tile(w.tiles, first + tile, lane);
  }
  float sums[kGroups][4] = {};
  for (int start = warp; start < across; start += kAhead * kWarps) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int tile = start + i * kWarps;
      if (tile >= across) break;
      const Tile current = ahead[i];
      const int next = tile + kAhead * kWarps;
      if (next < across) ahead[i] = load_tile(w.tiles, first + next, lane);
      Inputs x[kGroups];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        x[group] = load_inputs(p, group * kGroup + lane / 4, tile * kCols + lane % 4 * 16);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const Fragment a = current.step(step, base);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          multiply_add(sums[group], a.registers, x[group].pairs[2 * step], x[group].pairs[2 * step + 1]);
        }
      }
    }
  }

  __shared__ float parts[kWarps][kRows][kGroups * kGroup];
  const int row = lane / 4, col = lane % 4 * 2;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[warp][row + i / 2 * 8][group * kGroup + col + i % 2] = sums[group][i];
  }
  __syncthreads();
  const int out_row = threadIdx.x / (kGroups * kGroup), batch_row = threadIdx.x % (kGroups * kGroup);
  const int global_row = stripe * kRows + out_row;
  if (out_row >= kRows || global_row >= w.rows || batch_row >= p.batch) return;
  float sum = 0;
  for (int part = 0; part < kWarps; ++part) sum += parts[part][out_row][batch_row];
  sum += listed_apart(p, stripe, out_row, batch_row);
  if (p.bias != nullptr) sum += from_bf16(p.bias[global_row]);
  p.y[static_cast<size_t>(batch_row) * w.rows + global_row] = to_bf16(sum);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kWarps* kLanes) infold_linear_window_8(InfoldWindowLinear p) {
  linear<1>(p);
}

extern "C" __global__ void __launch_bounds__(kWarps* kLanes) infold_linear_window_16(InfoldWindowLinear p) {
  linear<2>(p);
}

// The decoder alone, for its rate: each lane of a grid of any size decodes its share of the tiles and keeps a digest.
extern "C" __global__ void __launch_bounds__(kWarps* kLanes)
    infold_window_rate(const uint32_t* tiles, uint32_t count, uint32_t base, uint32_t* digests) {
  const int lane = threadIdx.x % kLanes;
  const uint32_t warp = (blockIdx.x * blockDim.x + threadIdx.x) / kLanes, warps = gridDim.x * blockDim.x / kLanes;
  uint32_t digest = 0;
  for (uint32_t tile = warp; tile < count; tile += warps) {
    const Tile current = load_tile(tiles, tile, lane);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const Fragment fragment = current.step(step, base_bits(base));
      digest ^= fragment.registers[0] ^ fragment.registers[1] ^ fragment.registers[2] ^ fragment.registers[3];
    }
  }
  digests[blockIdx.x * blockDim.x + threadIdx.x] = digest;
}
