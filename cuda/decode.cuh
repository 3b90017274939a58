// Reading the canonical form (docs/format.md): where a tile's blocks, streams and escapes lie, and a coder's step. Any
// bytes may come: reads beyond the payload give zeros, and what does not fit in its tile is noticed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "both.h"
#include "params.h"

namespace infold {
namespace canonical {

// Rows that are coded side by side, and columns of a block.
constexpr int kGroup = 32;
constexpr int kChunk = 64;

constexpr int kPlain = 0;
constexpr int kRans = 1;

constexpr uint32_t kHasEscapes = 1u << 31;
constexpr int kEscapeRowBits = 6;
constexpr int kEscapeBytes = 8;
constexpr uint32_t kNoBlock = ~0u;

// A payload, and zeros after it.
struct Payload {
  const uint8_t* bytes;
  uint64_t size;

  INFOLD_BOTH uint32_t byte(uint64_t at) const { return at < size ? bytes[at] : 0; }

  template <int kBytes>
  INFOLD_BOTH uint32_t word(uint64_t at) const {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kBytes; ++i) word |= byte(at + i) << 8 * i;
    return word;
  }
};

// A block's place in its tile, and its size.
struct Block {
  int row, col, lanes, cols;
};

// A tile's shape.
struct Tile {
  int rows, cols;

  INFOLD_BOTH int groups() const { return (rows + kGroup - 1) / kGroup; }
  INFOLD_BOTH int blocks() const { return (cols + kChunk - 1) / kChunk * groups(); }
  INFOLD_BOTH int lanes() const { return rows < kGroup ? rows : kGroup; }

  INFOLD_BOTH Block block(int index) const {
    const int row = index % groups() * kGroup, col = index / groups() * kChunk;
    return {row, col, rows - row < kGroup ? rows - row : kGroup, cols - col < kChunk ? cols - col : kChunk};
  }

  // The block that an escape's position lies in.
  INFOLD_BOTH uint32_t block_of(uint32_t position) const {
    const int row = position & ((1 << kEscapeRowBits) - 1), col = static_cast<int>(position >> kEscapeRowBits);
    return row < rows && col < cols ? static_cast<uint32_t>(col / kChunk * groups() + row / kGroup) : kNoBlock;
  }
};

// Bytes of a step of plain bits.
INFOLD_BOTH int step_bytes(int lanes, int width) { return (lanes * width + 7) / 8; }

// Bytes of a column of a tile's plain bits, and where a block's begin.
INFOLD_BOTH uint64_t column_bytes(const Tile& tile, int width) {
  return tile.rows / kGroup * step_bytes(kGroup, width) + step_bytes(tile.rows % kGroup, width);
}
INFOLD_BOTH uint64_t plain_start(const Tile& tile, const Block& block, int width) {
  const uint64_t groups_before = block.row / kGroup * step_bytes(kGroup, width);
  return block.col * column_bytes(tile, width) + groups_before * block.cols;
}

// What is left of a tile.
struct Rest {
  uint64_t at, left;
  bool fits;

  // Where the next `size` bytes begin.
  INFOLD_BOTH uint64_t take(uint64_t size) {
    fits &= size <= left;
    const uint64_t start = at, taken = size <= left ? size : left;
    at += taken;
    left -= taken;
    return start;
  }
};

// The bytes of tile `index` of `tiles`, which end where the next one's begin.
INFOLD_BOTH Rest open(const Payload& payload, const uint32_t* directory, int index, int tiles) {
  const uint64_t start = uint64_t{directory[2 * static_cast<size_t>(index)]} * 4;
  const uint64_t end = index + 1 < tiles ? uint64_t{directory[2 * static_cast<size_t>(index) + 2]} * 4 : payload.size;
  const bool fits = start <= end && end <= payload.size;
  return {start, fits ? end - start : 0, fits};
}

// A stream of a plane in a tile, and the plane's escapes.
struct Stream {
  uint64_t states;  // or the plane's plain bits
  uint64_t words;
  uint64_t escapes;
  uint32_t escape_count;
};

// Takes a plane from the rest of its tile; `stream` of its streams is the one to be read.
INFOLD_BOTH Stream take_plane(Rest& rest, const Payload& payload, const InfoldPlane& plane, const Tile& tile,
                              int stream) {
  Stream result = {};
  bool listed = plane.escapes != 0;
  if (plane.coding == kPlain) {
    result.states = rest.take(tile.cols * column_bytes(tile, plane.width));
  } else {
    const int state_bytes = plane.coding == kRans ? 4 : 2;
    const uint64_t heads = rest.take(4 * plane.streams);
    const uint64_t states = rest.take(static_cast<uint64_t>(plane.streams) * state_bytes * tile.lanes());
    result.states = states + static_cast<uint64_t>(stream) * state_bytes * tile.lanes();
    for (int i = 0; i < plane.streams; ++i) {
      const uint64_t words = payload.word<4>(heads + 4 * i) & ~kHasEscapes;
      const uint64_t start = rest.take(words * (state_bytes / 2));
      if (i == stream) result.words = start;
    }
    listed = (payload.word<4>(heads) & kHasEscapes) != 0;
  }
  if (!listed) return result;
  result.escape_count = payload.word<4>(rest.take(4));
  result.escapes = rest.take(uint64_t{result.escape_count} * kEscapeBytes);
  return result;
}

// A lane of a coder with slots of kSlotBits and words of kWordBytes.
template <int kSlotBits, int kWordBytes>
struct Lane {
  static constexpr int kStateBytes = 2 * kWordBytes;
  static constexpr int kWord = kWordBytes;

  uint32_t state;

  // Decodes a symbol; returns whether the lane has to take a word.
  INFOLD_BOTH bool step(const uint32_t* slots, uint32_t& symbol) {
    const uint32_t entry = slots[state & ((1u << kSlotBits) - 1)];
    symbol = entry & 0xff;
    state = (entry >> 20) * (state >> kSlotBits) + (entry >> 8 & 0xfff);
    return state < 1u << 8 * kWordBytes;
  }

  INFOLD_BOTH void refill(uint32_t word) { state = state << 8 * kWordBytes | word; }
};
using RansLane = Lane<12, 2>;
using AliasLane = Lane<8, 1>;

// A lane's symbol in a step of plain bits that begins at `at`.
INFOLD_BOTH uint32_t plain_symbol(const Payload& payload, uint64_t at, int lane, int width) {
  const int bit = lane * width;
  return payload.word<2>(at + bit / 8) >> bit % 8 & ((1u << width) - 1);
}

// The value that an escape gives its place in a plane, symbols of which are bytes; a level's first plane holds any.
INFOLD_BOTH uint32_t escaped(bool is_any, int32_t lo, uint32_t value) {
  return is_any ? value : lo + ((value - lo) & 0xff);
}

// Where a plane's value stands in a code.
INFOLD_BOTH uint32_t place_bf16(int plane, uint32_t value) {
  return plane == 0 ? (value & 0xff) << 7 : (value & 0x80) << 8 | (value & 0x7f);
}
INFOLD_BOTH uint32_t place_level(int plane, int low_bits, uint32_t value) {
  return plane == 0 ? value << low_bits : value;
}

}  // namespace canonical
}  // namespace infold
