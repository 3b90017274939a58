// The window layout of a bfloat16 weight on the GPU: 12 bits a weight, eight of sign and mantissa, four of exponent
// above a base, in the order in which a warp feeds them to mma.m16n8k16. What lies outside the window is listed apart.
// Compiled for the host too, where tests compare it with the codec.
#pragma once

#include <cstdint>

#include "both.h"

namespace infold {
namespace window {

// A tile is 16 rows of the weight by 64 columns, four steps of an mma whose operand A it is.
constexpr int kRows = 16;
constexpr int kCols = 64;
constexpr int kLanes = 32;
constexpr int kSteps = kCols / 16;
// Registers of operand A that a lane holds in a step, each of two weights.
constexpr int kRegisters = 4;
// Words of a lane in a tile: signs and mantissas of two registers each, then exponents of a step each.
constexpr int kRestWords = kSteps * kRegisters / 2;
constexpr int kWords = kRestWords + kSteps;
// A lane reads four words at a time, beside its neighbours'.
constexpr int kQuads = kWords / 4;
constexpr int kTileWords = kLanes * kWords;
// Exponents in the window.
constexpr uint32_t kWindow = 16;

// Where word `word` of a lane lies in its tile.
INFOLD_BOTH int word_index(int lane, int word) { return (word / 4 * kLanes + lane) * 4 + word % 4; }

// The row of the tile that both halves of a lane's register belong to.
INFOLD_BOTH int row_of(int lane, int reg) { return lane / 4 + 8 * (reg % 2); }

// The column of the tile of one half of a lane's register. The order of columns within the mma is free as long as x's
// is the same: this one gives a lane sixteen neighbours of x in a tile.
INFOLD_BOTH int col_of(int lane, int step, int reg, int half) { return lane % 4 * 16 + step * 4 + reg / 2 * 2 + half; }

// Operand A of one step.
struct Fragment {
  uint32_t registers[kRegisters];
};

constexpr uint32_t kRestMask = 0x807f807f;
constexpr uint32_t kExponentMask = 0x07800780;

INFOLD_BOTH uint32_t rotate_right_8(uint32_t word) { return word >> 8 | word << 24; }

// The window's base in place in both halves of a register.
INFOLD_BOTH uint32_t base_bits(uint32_t base) { return base * 0x00800080u; }

// A step's fragment from two words of signs and mantissas and one of exponents. The bits of a word that the first
// register does not use are the second's, rotated by a byte: the mask of a sign and a mantissa in each half, rotated
// so, is its complement.
INFOLD_BOTH Fragment decode(uint32_t first, uint32_t second, uint32_t exponents, uint32_t base) {
  return {{
      (first & kRestMask) + (exponents << 7 & kExponentMask) + base,
      (rotate_right_8(first) & kRestMask) + (exponents << 3 & kExponentMask) + base,
      (second & kRestMask) + (exponents >> 1 & kExponentMask) + base,
      (rotate_right_8(second) & kRestMask) + (exponents >> 5 & kExponentMask) + base,
  }};
}

// A lane's words of a tile. `weight(row, col)` is the bfloat16's bits; `apart(row, col, bits)` takes what the window
// does not hold, in whose place the smallest value of the window stands: `filler` of it is to be subtracted.
template <class Weight, class Apart>
INFOLD_BOTH void encode(int lane, uint32_t base, const Weight& weight, const Apart& apart, uint32_t (&words)[kWords]) {
  for (uint32_t& word : words) word = 0;
  for (int step = 0; step < kSteps; ++step) {
    for (int reg = 0; reg < kRegisters; ++reg) {
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(lane, reg), col = col_of(lane, step, reg, half);
        const uint32_t bits = weight(row, col);
        const uint32_t exponent = (bits >> 7 & 0xff) - base;
        if (exponent >= kWindow) {
          apart(row, col, bits);
          continue;
        }
        const uint32_t rest = (bits & 0x807f) << 16 * half;
        words[2 * step + reg / 2] |= reg % 2 == 0 ? rest : rest << 8 | rest >> 24;
        words[kRestWords + step] |= exponent << (16 * half + 4 * reg);
      }
    }
  }
}

// The bits of the value that stands for what is listed apart.
INFOLD_BOTH uint32_t filler(uint32_t base) { return base << 7; }

}  // namespace window
}  // namespace infold
