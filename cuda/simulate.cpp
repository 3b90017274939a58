// The device's decoders on the host, for the tests: the same functions, lane by lane.
#include <cstddef>
#include <cstdint>

#include "params.h"
#include "window.cuh"

using namespace infold::window;

// Lays a (rows, cols) bfloat16 weight out; returns how many values are listed apart, in the order of the tiles. Where
// there is no row or column, the filler stands.
extern "C" size_t infold_simulate_window_encode(const uint16_t* weight, int rows, int cols, uint32_t base,
                                                uint32_t* tiles, uint32_t* escape_starts, InfoldEscape* escapes) {
  const int across = (cols + kCols - 1) / kCols, stripes = (rows + kRows - 1) / kRows;
  size_t count = 0;
  for (int stripe = 0; stripe < stripes; ++stripe) {
    escape_starts[stripe] = static_cast<uint32_t>(count);
    for (int tile = 0; tile < across; ++tile) {
      uint32_t* out = tiles + (static_cast<size_t>(stripe) * across + tile) * kTileWords;
      const int first_row = stripe * kRows, first_col = tile * kCols;
      const auto value = [&](int row, int col) -> uint32_t {
        const bool inside = first_row + row < rows && first_col + col < cols;
        return inside ? weight[static_cast<size_t>(first_row + row) * cols + first_col + col] : filler(base);
      };
      const auto apart = [&](int row, int col, uint32_t bits) {
        escapes[count++] = {static_cast<uint16_t>(row), static_cast<uint16_t>(bits),
                            static_cast<uint32_t>(first_col + col)};
      };
      for (int lane = 0; lane < kLanes; ++lane) {
        uint32_t words[kWords];
        encode(lane, base, value, apart, words);
        for (int word = 0; word < kWords; ++word) out[word_index(lane, word)] = words[word];
      }
    }
  }
  escape_starts[stripes] = static_cast<uint32_t>(count);
  return count;
}

// The registers that a lane decodes from a tile, step after step.
extern "C" void infold_simulate_window_decode(const uint32_t* tile, int lane, uint32_t base, uint32_t* registers) {
  for (int step = 0; step < kSteps; ++step) {
    const auto word = [&](int index) { return tile[word_index(lane, index)]; };
    const Fragment fragment = decode(word(2 * step), word(2 * step + 1), word(kRestWords + step), base_bits(base));
    for (int reg = 0; reg < kRegisters; ++reg) registers[step * kRegisters + reg] = fragment.registers[reg];
  }
}
