// log8: a byte for each number, and for 64 of them a word of their curve and scale, as src/spectral/log8.rs has it.
#pragma once

#include <cstddef>

#include "intrinsics.cuh"
#include "params.h"

namespace infold {
namespace log8 {

constexpr int kBlock = 64;
// Bits of a word that are the scale's, the upper ones of a float32 without its sign; the curve's are above.
constexpr int kScaleBits = 13, kDropped = 31 - kScaleBits;
constexpr uint32_t kScaleMask = (1u << kScaleBits) - 1;
// Of infinity, for which the largest float32 stands, and that one's.
constexpr uint32_t kInfinity = 0x7f800000, kLargest = 0x7f7fffff;

__device__ inline float scale_of(uint32_t word) {
  const uint32_t bits = (word & kScaleMask) << kDropped;
  return float_of(bits < kInfinity ? bits : kLargest);
}

__device__ inline float load(const InfoldLog8& numbers, size_t index) {
  const uint32_t word = numbers.words[index / kBlock];
  return numbers.levels[(word >> kScaleBits) * 256 + numbers.codes[index]] * scale_of(word);
}

}  // namespace log8
}  // namespace infold
