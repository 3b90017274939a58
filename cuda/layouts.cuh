// How kernels read each layout: a tile from memory, fragments and values from it.
#pragma once

#include <cstddef>

#include "codes.cuh"
#include "intrinsics.cuh"
#include "params.h"
#include "window.cuh"

namespace infold {

// Words of shared memory that a layout may ask for.
constexpr int kTableWords = 8192;

// How words of a weight are read: from memory, once, or from a block's own.
struct FromMemory {
  __device__ static uint4 load(const uint32_t* words) { return load_streaming(words); }
};
struct FromShared {
  __device__ static uint4 load(const uint32_t* words) { return *reinterpret_cast<const uint4*>(words); }
};

// Words of a lane, in the loads that they come by.
template <int kCount>
struct Quads {
  uint4 quads[kCount];

  __device__ uint32_t word(int index) const {
    const uint4& quad = quads[index / 4];
    return index % 4 == 0 ? quad.x : index % 4 == 1 ? quad.y : index % 4 == 2 ? quad.z : quad.w;
  }
};

// The same, read one by one from a tile in shared memory.
struct SharedWords {
  const uint32_t* words;
  int lane;

  __device__ uint32_t word(int index) const { return words[word_index(lane, index)]; }
};

struct WindowLayout {
  static constexpr bool kInRuns = false;
  static constexpr int kTileWords = window::kTileWords;
  static constexpr int kSharedWords = 1;
  static constexpr int kQuads = window::kWords / 4;

  using Tile = Quads<kQuads>;
  using SharedTile = SharedWords;

  uint32_t base;

  __device__ WindowLayout(const InfoldWeight& w, uint32_t*) : base(window::base_bits(w.head->base)) {}

  __device__ static WindowLayout without_table(const InfoldWeight& w) { return {w, nullptr}; }

  template <class From>
  __device__ static Tile read(const uint32_t* words, int lane) {
    Tile result;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) result.quads[quad] = From::load(words + word_index(lane, 4 * quad));
    return result;
  }
  __device__ static Tile load(const uint32_t* tiles, size_t tile, int lane) {
    return read<FromMemory>(tiles + tile * kTileWords, lane);
  }

  template <class T>
  __device__ Fragment step(const T& tile, int step) const {
    return window::decode(tile.word(2 * step), tile.word(2 * step + 1), tile.word(window::kRestWords + step), base);
  }

  // What stands where something is listed apart.
  __device__ static float filler(const InfoldWeight& w) { return from_bf16(window::filler(w.head->base)); }

  // Two values of a row, before their scale, from a tile in hand.
  __device__ void values(const Tile& tile, const InfoldWeight&, int step, int reg, float (&out)[2]) const {
    const uint32_t bits = this->step(tile, step).registers[reg];
    out[0] = from_bf16(bits & 0xffff);
    out[1] = from_bf16(bits >> 16);
  }

  // Of a value from here: nothing is rounded, and a NaN keeps its bits.
  __device__ static uint16_t to_bf16(float value) { return upper_half(value); }
};

template <int kBits>
struct CodesLayout {
  static constexpr bool kInRuns = false;
  static constexpr int kTileWords = codes::kTileWords<kBits>;
  static constexpr int kSharedWords = kTableWords;
  static constexpr int kQuads = kBits / 4;
  // The table of pairs of codes, or of eight bits' in both halves; and so many copies that lanes seldom meet in a bank.
  static constexpr int kEntries = kBits == 5 ? 1024 : 256;
  static constexpr int kCopies = kTableWords / kEntries;

  struct Tile : Quads<kQuads> {
    uint32_t fifths;
  };
  struct SharedTile : SharedWords {
    uint32_t fifths;

    __device__ SharedTile(const uint32_t* words, int lane)
        : SharedWords{words, lane}, fifths(kBits == 5 ? words[codes::place<kBits>(lane, 4)] : 0) {}
  };

  // This lane's copy.
  const uint32_t* table = nullptr;

  __device__ CodesLayout() {}

  // For `values` alone.
  __device__ static CodesLayout without_table(const InfoldWeight&) { return {}; }

  // Fills the table; for all threads of a block.
  __device__ CodesLayout(const InfoldWeight& w, uint32_t* shared) : table(shared + threadIdx.x % kCopies) {
    for (int i = threadIdx.x; i < kTableWords; i += blockDim.x) {
      const uint32_t entry = i / kCopies;
      const uint32_t first = kBits == 8 ? entry : codes::half_of<kBits>(entry, 0);
      const uint32_t second = kBits == 8 ? entry : codes::half_of<kBits>(entry, 1);
      shared[i] = infold::to_bf16(w.values[first]) | static_cast<uint32_t>(infold::to_bf16(w.values[second])) << 16;
    }
    __syncthreads();
  }

  template <class From>
  __device__ static Tile read(const uint32_t* words, int lane) {
    Tile result;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      result.quads[quad] = From::load(words + codes::place<kBits>(lane, 4 * quad));
    }
    result.fifths = kBits == 5 ? words[codes::place<kBits>(lane, 4)] : 0;
    return result;
  }
  __device__ static Tile load(const uint32_t* tiles, size_t tile, int lane) {
    return read<FromMemory>(tiles + tile * kTileWords, lane);
  }

  template <class T>
  __device__ Fragment step(const T& tile, int step) const {
    Fragment result;
#pragma unroll
    for (int reg = 0; reg < kRegisters; ++reg) {
      const uint32_t low = tile.word(codes::low_word<kBits>(step, reg));
      if constexpr (kBits == 8) {
        const uint32_t first = table[codes::code<kBits>(low, 0, step, reg, 0) * kCopies];
        const uint32_t second = table[codes::code<kBits>(low, 0, step, reg, 1) * kCopies];
        result.registers[reg] = (first & 0xffff) | (second & 0xffff0000);
      } else {
        result.registers[reg] = table[codes::pair<kBits>(low, tile.fifths, step, reg) * kCopies];
      }
    }
    return result;
  }

  __device__ static float filler(const InfoldWeight& w) { return from_bf16(infold::to_bf16(w.values[0])); }

  __device__ void values(const Tile& tile, const InfoldWeight& w, int step, int reg, float (&out)[2]) const {
    const uint32_t low = tile.word(codes::low_word<kBits>(step, reg));
#pragma unroll
    for (int half = 0; half < 2; ++half) out[half] = w.values[codes::code<kBits>(low, tile.fifths, step, reg, half)];
  }

  __device__ static uint16_t to_bf16(float value) { return infold::to_bf16(value); }
};

// The scale of a weight.
__device__ inline float scale_of(const InfoldWeight& w, int row, int col) {
  if (w.scales == nullptr) return 1;
  const size_t index = static_cast<size_t>(row) * w.scale_stride + col / w.head->group_cols;
  return w.scales_are_bf16 ? from_bf16(static_cast<const uint16_t*>(w.scales)[index])
                           : static_cast<const float*>(w.scales)[index];
}

// Whether scales change along a row.
__device__ inline bool is_grouped(const InfoldWeight& w) { return static_cast<int>(w.head->group_cols) < w.cols; }

// Where a row's escapes begin and end; whatever the payload says of them, within it.
struct EscapeRange {
  uint32_t begin, end;
};
__device__ inline EscapeRange escapes_of(const InfoldWeight& w, int row) {
  const ptrdiff_t before = reinterpret_cast<const char*>(w.escapes) - reinterpret_cast<const char*>(w.head);
  const uint64_t room = (w.payload_bytes - before) / sizeof(InfoldEscape);
  const uint32_t begin = w.escape_starts[row], end = w.escape_starts[row + 1];
  return {begin < room ? begin : static_cast<uint32_t>(room), end < room ? end : static_cast<uint32_t>(room)};
}

// Calls `visit` with each escape of a row whose column is there, or with every `stride`th from `first` on.
template <class Visit>
__device__ void for_escapes(const InfoldWeight& w, int row, uint32_t first, uint32_t stride, const Visit& visit) {
  const EscapeRange range = escapes_of(w, row);
  for (uint32_t i = range.begin + first; i < range.end; i += stride) {
    const InfoldEscape escape = w.escapes[i];
    if (escape.col < static_cast<uint32_t>(w.cols)) visit(escape);
  }
}

}  // namespace infold

// Each layout of fixed width, for what makes kernels of it: its name and its class.
#define INFOLD_FOR_LAYOUTS(make) \
  make(window, WindowLayout) make(codes4, CodesLayout<4>) make(codes5, CodesLayout<5>) make(codes8, CodesLayout<8>)
