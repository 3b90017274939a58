// The inputs of a product of many columns: tiles of 64 of x's columns, one after the other, each of `columns` times 128
// bytes, as warpgroups read their operand B from shared memory (K-major, swizzled by 128 bytes). Compiled for the host
// too.
#pragma once

#include <cstddef>

#include "fragment.cuh"

namespace infold {
namespace inputs {

// Neighbours in memory that swizzling keeps together: 16 bytes.
constexpr int kChunk = 8;
constexpr int kChunks = kCols / kChunk;

// Where a chunk of a tile of one column of the product lies: chunks 2 · step and 2 · step + 1 are a step's.
INFOLD_BOTH size_t chunk_index(int tile, int columns, int column, int chunk) {
  return (static_cast<size_t>(tile) * columns + column) * kChunks + (chunk ^ column % 8);
}

// The order of columns within a tile: that of a fragment, or as they are.
enum Order { kFragment = 0, kPlain = 1 };

// The column of the tile that an element of a chunk is.
INFOLD_BOTH int col_of(int chunk, int element, int order) {
  if (order == kPlain) return chunk * kChunk + element;
  return infold::col_of(element / 2, chunk / 2, 2 * (chunk % 2), element % 2);
}

// The element of all tiles that column `col` of the inputs is, of one column of the product.
INFOLD_BOTH size_t place(int columns, int column, int col, int order = kFragment) {
  const int within = col % kCols;
  const int chunk = order == kPlain ? within / kChunk : within % 16 / 4 * 2 + within % 4 / 2;
  const int element = order == kPlain ? within % kChunk : within / 16 * 2 + within % 2;
  return chunk_index(col / kCols, columns, column, chunk) * kChunk + element;
}

}  // namespace inputs
}  // namespace infold
