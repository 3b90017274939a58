// The window layout on the host: what prepares a weight for the device and takes it back, by the device's own
// functions.
#include <cstddef>
#include <cstdint>

#include "params.h"
#include "window.cuh"

using namespace infold::window;

// Lays out a stripe: `rows` (at most 16) rows of `cols` bfloat16. Returns how many values are listed apart, in the
// order of the tiles; `escapes` has room for all. Where there is no row or column, the filler stands.
extern "C" size_t infold_window_encode(const uint16_t* weight, int rows, int cols, uint32_t base, uint32_t* tiles,
                                       InfoldEscape* escapes) {
  size_t count = 0;
  for (int first = 0; first < cols; first += kCols, tiles += kTileWords) {
    const auto value = [&](int row, int col) -> uint32_t {
      return row < rows && first + col < cols ? weight[static_cast<size_t>(row) * cols + first + col] : filler(base);
    };
    const auto apart = [&](int row, int col, uint32_t bits) {
      escapes[count++] = {static_cast<uint16_t>(row), static_cast<uint16_t>(bits), static_cast<uint32_t>(first + col)};
    };
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t words[kWords];
      encode(lane, base, value, apart, words);
      for (int word = 0; word < kWords; ++word) tiles[word_index(lane, word)] = words[word];
    }
  }
  return count;
}

// The stripe's rows again, less what is listed apart.
extern "C" void infold_window_decode(const uint32_t* tiles, int rows, int cols, uint32_t base, uint16_t* weight) {
  for (int first = 0; first < cols; first += kCols, tiles += kTileWords) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int step = 0; step < kSteps; ++step) {
        const auto word = [&](int index) { return tiles[word_index(lane, index)]; };
        const Fragment fragment = decode(word(2 * step), word(2 * step + 1), word(kRestWords + step), base_bits(base));
        for (int reg = 0; reg < kRegisters; ++reg) {
          for (int half = 0; half < 2; ++half) {
            const int row = row_of(lane, reg), col = first + col_of(lane, step, reg, half);
            if (row >= rows || col >= cols) continue;
            weight[static_cast<size_t>(row) * cols + col] = static_cast<uint16_t>(fragment.registers[reg] >> 16 * half);
          }
        }
      }
    }
  }
}
