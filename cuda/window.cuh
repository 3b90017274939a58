// The window layout of a bfloat16 weight: 12 bits a weight, eight of sign and mantissa, four of exponent above a base.
// What lies outside the window is listed apart.
#pragma once

#include "fragment.cuh"

namespace infold {
namespace window {

// Words of a lane in a tile: signs and mantissas of two registers each, then exponents of a step each.
constexpr int kRestWords = kSteps * kRegisters / 2;
constexpr int kWords = kRestWords + kSteps;
constexpr int kTileWords = kLanes * kWords;
// Exponents in the window.
constexpr uint32_t kWindow = 16;

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

// Puts a bfloat16's bits into a lane's words, which were zero; false for one outside the window, in whose place the
// smallest value of the window stands: `filler` of it is to be subtracted.
INFOLD_BOTH bool encode(uint32_t bits, int step, int reg, int half, uint32_t base, uint32_t (&words)[kWords]) {
  const uint32_t exponent = (bits >> 7 & 0xff) - base;
  if (exponent >= kWindow) return false;
  const uint32_t rest = (bits & 0x807f) << 16 * half;
  words[2 * step + reg / 2] |= reg % 2 == 0 ? rest : rest << 8 | rest >> 24;
  words[kRestWords + step] |= exponent << (16 * half + 4 * reg);
  return true;
}

// The bits of the value that stands for what is listed apart.
INFOLD_BOTH uint32_t filler(uint32_t base) { return base << 7; }

}  // namespace window
}  // namespace infold
