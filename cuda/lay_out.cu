// From codes to a layout of the device, by the functions that the host lays weights out with: how often codes occur,
// for the host to choose by; what each row lists apart; and the tiles.
#include <cstddef>

#include "codes.cuh"
#include "intrinsics.cuh"
#include "params.h"
#include "window.cuh"

namespace {

using namespace infold;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;

// Exponents, then signs with mantissas.
constexpr int kBytes = 256;
// Levels this far out are counted one by one.
constexpr int kFarthest = 4096;

// What has a code is counted in a block's shared memory first.
template <int kPlaces, class Code, class Count>
__device__ void histogram(const InfoldHistogram& p, const Count& count) {
  __shared__ uint32_t counts[kPlaces];
  for (int i = threadIdx.x; i < kPlaces; i += kThreads) counts[i] = 0;
  __syncthreads();
  const Code* codes = static_cast<const Code*>(p.codes);
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.count;
       i += static_cast<uint64_t>(gridDim.x) * kThreads) {
    count(codes[i], counts);
  }
  __syncthreads();
  unsigned long long* total = reinterpret_cast<unsigned long long*>(p.counts);
  for (int i = threadIdx.x; i < kPlaces; i += kThreads) {
    if (counts[i] != 0) atomic_add(total + i, counts[i]);
  }
}

struct ToWindow {
  using Code = uint16_t;
  static constexpr int kWords = window::kWords;
  static constexpr int kTileWords = window::kTileWords;

  __device__ static int place(int lane, int word) { return word_index(lane, word); }
  __device__ static void encode(const InfoldLayOut& p, uint32_t code, int step, int reg, int half,
                                uint32_t (&words)[kWords]) {
    window::encode(code, step, reg, half, p.lo, words);
  }
};

template <int kBits>
struct ToCodes {
  using Code = uint32_t;
  static constexpr int kWords = codes::kWords<kBits>;
  static constexpr int kTileWords = codes::kTileWords<kBits>;

  __device__ static int place(int lane, int word) { return codes::place<kBits>(lane, word); }
  __device__ static void encode(const InfoldLayOut& p, uint32_t code, int step, int reg, int half,
                                uint32_t (&words)[kWords]) {
    const uint32_t index = code - p.lo;
    if (index < 1u << kBits) codes::encode<kBits>(index, step, reg, half, words);
  }
};

// A warp for each tile.
template <class To>
__device__ void encode_tiles(const InfoldLayOut& p) {
  const int lane = threadIdx.x % kLanes;
  const size_t index = static_cast<size_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const int across = (p.cols + kCols - 1) / kCols;
  const size_t first_row = index / across * kRows;
  const int first_col = static_cast<int>(index % across) * kCols;
  if (first_row >= static_cast<size_t>(p.rows)) return;
  uint32_t words[To::kWords] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int reg = 0; reg < kRegisters; ++reg) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const size_t row = first_row + row_of(lane, reg);
        const int col = first_col + col_of(lane, step, reg, half);
        if (row >= static_cast<size_t>(p.rows) || col >= p.cols) continue;
        To::encode(p, static_cast<const typename To::Code*>(p.codes)[row * p.cols + col], step, reg, half, words);
      }
    }
  }
  uint32_t* tile = p.tiles + index * To::kTileWords;
#pragma unroll
  for (int word = 0; word + 4 <= To::kWords; word += 4) {
    *reinterpret_cast<uint4*>(tile + To::place(lane, word)) = {words[word], words[word + 1], words[word + 2],
                                                               words[word + 3]};
  }
  if (To::kWords % 4 != 0) tile[To::place(lane, To::kWords - 1)] = words[To::kWords - 1];
}

struct FromBf16 {
  using Code = uint16_t;

  // How far a code lies above the lowest one that is held.
  __device__ static uint32_t above(const InfoldLayOut& p, uint32_t code) { return (code >> 7 & 0xff) - p.lo; }
  __device__ static float value(const InfoldLayOut&, uint32_t code) { return from_bf16(code); }
};

struct FromLevel {
  using Code = uint32_t;

  __device__ static uint32_t above(const InfoldLayOut& p, uint32_t code) { return code - p.lo; }
  __device__ static float value(const InfoldLayOut& p, uint32_t code) {
    const uint32_t index = code - p.first_centroid;
    if (index < static_cast<uint32_t>(p.centroid_count)) return p.centroids[index];
    return static_cast<float>(static_cast<int32_t>(code));
  }
};

// What has no code, counted or listed in the order of columns: a warp for each row.
template <class From>
__device__ void list_apart(const InfoldLayOut& p) {
  const int lane = threadIdx.x % kLanes;
  const size_t row = static_cast<size_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (row >= static_cast<size_t>(p.rows)) return;
  const typename From::Code* codes = static_cast<const typename From::Code*>(p.codes) + row * p.cols;
  uint32_t next = p.escapes == nullptr ? 0 : p.escape_starts[row];
  for (int first = 0; first < p.cols; first += kLanes) {
    const int col = first + lane;
    const uint32_t code = col < p.cols ? codes[col] : 0;
    const bool is_apart = col < p.cols && From::above(p, code) >= static_cast<uint32_t>(p.values);
    const uint32_t apart = warp_ballot(is_apart);
    if (is_apart && p.escapes != nullptr) {
      const uint32_t index = next + count_bits(apart & ((1u << lane) - 1));
      // Where somebody has written to the codes since they were counted, there may be more.
      if (index < p.escape_starts[row + 1]) p.escapes[index] = {static_cast<uint32_t>(col), From::value(p, code)};
    }
    next += count_bits(apart);
  }
  if (p.escapes == nullptr && lane == 0) p.row_counts[row] = next;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) infold_histogram_bf16(InfoldHistogram p) {
  histogram<2 * kBytes, uint16_t>(p, [](uint32_t bits, uint32_t* counts) {
    atomic_add(counts + (bits >> 7 & 0xff), 1);
    atomic_add(counts + kBytes + ((bits >> 8 & 0x80) | (bits & 0x7f)), 1);
  });
}

extern "C" __global__ void __launch_bounds__(kThreads) infold_histogram_levels(InfoldHistogram p) {
  constexpr uint32_t kCounted = 2 * kFarthest + 1;
  histogram<kCounted + 1, uint32_t>(p, [](uint32_t level, uint32_t* counts) {
    const uint32_t place = level + kFarthest;
    atomic_add(counts + (place < kCounted ? place : kCounted), 1);
  });
}

#define INFOLD_KERNEL(name, body) \
  extern "C" __global__ void __launch_bounds__(kThreads) infold_##name(InfoldLayOut p) { body(p); }
INFOLD_KERNEL(tiles_window, encode_tiles<ToWindow>)
INFOLD_KERNEL(tiles_codes4, encode_tiles<ToCodes<4>>)
INFOLD_KERNEL(tiles_codes5, encode_tiles<ToCodes<5>>)
INFOLD_KERNEL(tiles_codes8, encode_tiles<ToCodes<8>>)
INFOLD_KERNEL(apart_bf16, list_apart<FromBf16>)
INFOLD_KERNEL(apart_levels, list_apart<FromLevel>)
#undef INFOLD_KERNEL
