// The layout of quantised weights: a code of 4, 5 or 8 bits a weight, which picks a value from a table. What has no
// code is listed apart, and code 0 stands in its place.
#pragma once

#include "fragment.cuh"

namespace infold {
namespace codes {

// Words of a lane in a tile. Of five bits the lowest four come as those of four do, and then a word of the fifths.
template <int kBits>
constexpr int kWords = kBits == 5 ? 5 : kBits;
template <int kBits>
constexpr int kTileWords = kLanes * kWords<kBits>;

// Where word `word` of a lane lies in its tile.
template <int kBits>
INFOLD_BOTH int place(int lane, int word) {
  return kBits == 5 && word == 4 ? 4 * kLanes + lane : word_index(lane, word);
}

// Where a weight's low bits (four, or all eight) lie among a lane's words.
template <int kBits>
INFOLD_BOTH int low_word(int step, int reg) {
  return kBits == 8 ? 2 * step + reg / 2 : step;
}
template <int kBits>
INFOLD_BOTH int low_shift(int reg, int half) {
  return kBits == 8 ? 16 * (reg % 2) + 8 * half : 8 * reg + 4 * half;
}

// Where a weight's fifth bit lies in its word: a register's two are neighbours.
INFOLD_BOTH int high_shift(int step, int reg, int half) { return 8 * step + 2 * reg + half; }

// The code of a weight, from the word that its low bits are in and that of the fifths.
template <int kBits>
INFOLD_BOTH uint32_t code(uint32_t low, uint32_t fifths, int step, int reg, int half) {
  const uint32_t bits = low >> low_shift<kBits>(reg, half) & (kBits == 8 ? 0xff : 0xf);
  return kBits == 5 ? bits | (fifths >> high_shift(step, reg, half) & 1) << 4 : bits;
}

// The codes of a register's two weights side by side, of four or five bits each: the low ones first, then the fifths.
template <int kBits>
INFOLD_BOTH uint32_t pair(uint32_t low, uint32_t fifths, int step, int reg) {
  const uint32_t bits = low >> low_shift<kBits>(reg, 0) & 0xff;
  return kBits == 5 ? bits | (fifths >> high_shift(step, reg, 0) & 3) << 8 : bits;
}

// The code of one half of such a pair.
template <int kBits>
INFOLD_BOTH uint32_t half_of(uint32_t pair, int half) {
  return (pair >> 4 * half & 0xf) | (kBits == 5 ? (pair >> (8 + half) & 1) << 4 : 0);
}

// Puts a code into a lane's words, which were zero.
template <int kBits>
INFOLD_BOTH void encode(uint32_t code, int step, int reg, int half, uint32_t (&words)[kWords<kBits>]) {
  words[low_word<kBits>(step, reg)] |= (code & (kBits == 8 ? 0xff : 0xf)) << low_shift<kBits>(reg, half);
  if (kBits == 5) words[kBits - 1] |= (code >> 4) << high_shift(step, reg, half);
}

}  // namespace codes
}  // namespace infold
