// y = x Wᵀ for at most eight rows of x, W in the window layout: bound by reading W once. A block owns a stripe of
// sixteen rows of W and divides its tiles among its warps; each decodes to the registers of an mma, whose eight columns
// are rows of x. The partial sums are added in the order of the warps, so results do not change from run to run.
#include "params.h"
#include "window.cuh"

namespace {

using namespace infold::window;

constexpr int kWarps = 8;
constexpr int kBatch = 8;
// Tiles of a warp that are on their way from memory while one is decoded.
constexpr int kAhead = 2;

struct Tile {
  uint4 quads[kQuads];

  __device__ uint32_t word(int index) const {
    const uint4& quad = quads[index / 4];
    return index % 4 == 0 ? quad.x : index % 4 == 1 ? quad.y : index % 4 == 2 ? quad.z : quad.w;
  }

  __device__ Fragment step(int step, uint32_t base) const {
    return decode(word(2 * step), word(2 * step + 1), word(kRestWords + step), base);
  }
};

// A lane's part of a tile. Nobody reads it again: it shall not push x out of the cache.
__device__ Tile load(const uint32_t* tiles, size_t tile, int lane) {
  Tile result;
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    result.quads[quad] = __ldcs(reinterpret_cast<const uint4*>(tiles + tile * kTileWords + word_index(lane, 4 * quad)));
  }
  return result;
}

__device__ void multiply_add(float (&sums)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.registers[0]), "r"(a.registers[1]), "r"(a.registers[2]), "r"(a.registers[3]), "r"(b0), "r"(b1));
}

__device__ float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }

__device__ uint16_t to_bf16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Sixteen neighbours in a row of x, in pairs: operand B of a tile's steps.
struct Inputs {
  uint32_t pairs[8];
};

// Of what is beyond x, zero.
__device__ Inputs load_inputs(const InfoldWindowLinear& p, int row, int col) {
  Inputs result = {};
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + static_cast<size_t>(row) * p.cols + col;
  if (row >= p.batch || col >= p.cols) return result;
  if (col + 16 <= p.cols && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    const uint4 low = __ldg(reinterpret_cast<const uint4*>(x)), high = __ldg(reinterpret_cast<const uint4*>(x) + 1);
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (col + i < p.cols) result.pairs[i / 2] |= static_cast<uint32_t>(__ldg(x + i)) << 16 * (i % 2);
  }
  return result;
}

// What the sum of one row of W and one of x lacks because of values outside the window.
__device__ float listed_apart(const InfoldWindowLinear& p, int stripe, int row, int batch_row) {
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + static_cast<size_t>(batch_row) * p.cols;
  const float filler_value = from_bf16(filler(p.base));
  float sum = 0;
  for (uint32_t i = p.escape_starts[stripe]; i < p.escape_starts[stripe + 1]; ++i) {
    const InfoldEscape escape = p.escapes[i];
    if (escape.row == row) sum += (from_bf16(escape.bits) - filler_value) * from_bf16(x[escape.col]);
  }
  return sum;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kWarps* kLanes) infold_linear_window(InfoldWindowLinear p) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, stripe = blockIdx.x;
  const int across = (p.cols + kCols - 1) / kCols;
  const size_t first = static_cast<size_t>(stripe) * across;
  const uint32_t base = base_bits(p.base);

  Tile ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int tile = warp + i * kWarps;
    if (tile < across) ahead[i] = load(p.tiles, first + tile, lane);
  }
  float sums[4] = {};
  for (int start = warp; start < across; start += kAhead * kWarps) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int tile = start + i * kWarps;
      if (tile >= across) break;
      const Tile current = ahead[i];
      const int next = tile + kAhead * kWarps;
      if (next < across) ahead[i] = load(p.tiles, first + next, lane);
      const Inputs x = load_inputs(p, lane / 4, tile * kCols + lane % 4 * 16);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        multiply_add(sums, current.step(step, base), x.pairs[2 * step], x.pairs[2 * step + 1]);
      }
    }
  }

  __shared__ float parts[kWarps][kRows][kBatch];
  const int row = lane / 4, col = lane % 4 * 2;
  parts[warp][row][col] = sums[0];
  parts[warp][row][col + 1] = sums[1];
  parts[warp][row + 8][col] = sums[2];
  parts[warp][row + 8][col + 1] = sums[3];
  __syncthreads();
  const int out_row = threadIdx.x / kBatch, batch_row = threadIdx.x % kBatch;
  const int global_row = stripe * kRows + out_row;
  if (out_row >= kRows || global_row >= p.rows || batch_row >= p.batch) return;
  float sum = 0;
  for (int part = 0; part < kWarps; ++part) sum += parts[part][out_row][batch_row];
  sum += listed_apart(p, stripe, out_row, batch_row);
  static_cast<uint16_t*>(p.y)[static_cast<size_t>(batch_row) * p.rows + global_row] = to_bf16(sum);
}

// The decoder alone, for its rate: each lane of a grid of any size decodes its share of the tiles and keeps a digest.
extern "C" __global__ void __launch_bounds__(kWarps* kLanes)
    infold_window_rate(const uint32_t* tiles, uint32_t count, uint32_t base, uint32_t* digests) {
  const int lane = threadIdx.x % kLanes;
  const uint32_t warp = (blockIdx.x * blockDim.x + threadIdx.x) / kLanes, warps = gridDim.x * blockDim.x / kLanes;
  uint32_t digest = 0;
  for (uint32_t tile = warp; tile < count; tile += warps) {
    const Tile current = load(tiles, tile, lane);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const Fragment fragment = current.step(step, base_bits(base));
      digest ^= fragment.registers[0] ^ fragment.registers[1] ^ fragment.registers[2] ^ fragment.registers[3];
    }
  }
  digests[blockIdx.x * blockDim.x + threadIdx.x] = digest;
}
