// Tiles of the window layout as kernels read them.
#pragma once

#include <cstddef>

#include "intrinsics.cuh"
#include "window.cuh"

namespace infold {
namespace window {

// A lane's words of a tile.
struct Tile {
  uint4 quads[kQuads];

  INFOLD_BOTH uint32_t word(int index) const {
    const uint4& quad = quads[index / 4];
    return index % 4 == 0 ? quad.x : index % 4 == 1 ? quad.y : index % 4 == 2 ? quad.z : quad.w;
  }

  INFOLD_BOTH Fragment step(int step, uint32_t base) const {
    return decode(word(2 * step), word(2 * step + 1), word(kRestWords + step), base);
  }
};

__device__ inline Tile load_tile(const uint32_t* tiles, size_t tile, int lane) {
  Tile result;
#pragma unroll
  for (int quad = 0; quad < kQuads; ++quad) {
    result.quads[quad] = load_streaming(tiles + tile * kTileWords + word_index(lane, 4 * quad));
  }
  return result;
}

}  // namespace window
}  // namespace infold
