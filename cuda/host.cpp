// Laying weights out on the host, and taking them back, by the device's own functions. A stripe at a time: at most 16
// rows of `cols` weights.
#include <cstddef>
#include <cstdint>

#include "codes.cuh"
#include "window.cuh"

using namespace infold;

namespace {

// Calls `visit(lane, step, reg, half, row, col)` for each weight of a tile from column `first` on that is there.
template <class Visit>
void for_weights(int lane, int rows, int cols, int first, const Visit& visit) {
  for (int step = 0; step < kSteps; ++step) {
    for (int reg = 0; reg < kRegisters; ++reg) {
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(lane, reg), col = first + col_of(lane, step, reg, half);
        if (row < rows && col < cols) visit(step, reg, half, row, col);
      }
    }
  }
}

template <int kBits>
void encode_codes(const uint8_t* weights, int rows, int cols, uint32_t* tiles) {
  for (int first = 0; first < cols; first += kCols, tiles += codes::kTileWords<kBits>) {
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t words[codes::kWords<kBits>] = {};
      for_weights(lane, rows, cols, first, [&](int step, int reg, int half, int row, int col) {
        codes::encode<kBits>(weights[static_cast<size_t>(row) * cols + col], step, reg, half, words);
      });
      for (int word = 0; word < codes::kWords<kBits>; ++word) tiles[codes::place<kBits>(lane, word)] = words[word];
    }
  }
}

template <int kBits>
void decode_codes(const uint32_t* tiles, int rows, int cols, uint8_t* weights) {
  for (int first = 0; first < cols; first += kCols, tiles += codes::kTileWords<kBits>) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for_weights(lane, rows, cols, first, [&](int step, int reg, int half, int row, int col) {
        const uint32_t low = tiles[codes::place<kBits>(lane, codes::low_word<kBits>(step, reg))];
        const uint32_t fifths = kBits == 5 ? tiles[codes::place<kBits>(lane, 4)] : 0;
        const uint32_t code = codes::code<kBits>(low, fifths, step, reg, half);
        weights[static_cast<size_t>(row) * cols + col] = static_cast<uint8_t>(code);
      });
    }
  }
}

}  // namespace

// Lays out bfloat16s. Returns how many are listed apart; `apart`, which has room for all, takes their places, column ·
// 16 + row.
extern "C" size_t infold_window_encode(const uint16_t* weights, int rows, int cols, uint32_t base, uint32_t* tiles,
                                       uint32_t* apart) {
  size_t count = 0;
  for (int first = 0; first < cols; first += kCols, tiles += window::kTileWords) {
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t words[window::kWords] = {};
      for_weights(lane, rows, cols, first, [&](int step, int reg, int half, int row, int col) {
        const uint32_t bits = weights[static_cast<size_t>(row) * cols + col];
        const bool held = window::encode(bits, step, reg, half, base, words);
        if (!held) apart[count++] = static_cast<uint32_t>(col * kRows + row);
      });
      for (int word = 0; word < window::kWords; ++word) tiles[word_index(lane, word)] = words[word];
    }
  }
  return count;
}

extern "C" void infold_window_decode(const uint32_t* tiles, int rows, int cols, uint32_t base, uint16_t* weights) {
  for (int first = 0; first < cols; first += kCols, tiles += window::kTileWords) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto word = [&](int index) { return tiles[word_index(lane, index)]; };
      for_weights(lane, rows, cols, first, [&](int step, int reg, int half, int row, int col) {
        const Fragment fragment = window::decode(word(2 * step), word(2 * step + 1), word(window::kRestWords + step),
                                                 window::base_bits(base));
        weights[static_cast<size_t>(row) * cols + col] = static_cast<uint16_t>(fragment.registers[reg] >> 16 * half);
      });
    }
  }
}

// Codes of 4, 5 or 8 bits; false for another width.
extern "C" bool infold_codes_encode(int bits, const uint8_t* weights, int rows, int cols, uint32_t* tiles) {
  switch (bits) {
    case 4:
      return encode_codes<4>(weights, rows, cols, tiles), true;
    case 5:
      return encode_codes<5>(weights, rows, cols, tiles), true;
    case 8:
      return encode_codes<8>(weights, rows, cols, tiles), true;
    default:
      return false;
  }
}

extern "C" bool infold_codes_decode(int bits, const uint32_t* tiles, int rows, int cols, uint8_t* weights) {
  switch (bits) {
    case 4:
      return decode_codes<4>(tiles, rows, cols, weights), true;
    case 5:
      return decode_codes<5>(tiles, rows, cols, weights), true;
    case 8:
      return decode_codes<8>(tiles, rows, cols, weights), true;
    default:
      return false;
  }
}
