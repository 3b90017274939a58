// What a product of many rows by block-circulant weights is cut into: three products of small matrices, on tensor
// cores, whose operands lie in the orders of mma.m16n8k16. Numbers of a spectrum come in slots of two, the real and the
// imaginary part of a frequency, or what is real alone: frequency 0 and N/2.
#pragma once

#include <cstddef>

#include "fragment.cuh"

namespace infold {
namespace circulant {

constexpr int kRows = 16;

// For kFeatures of x at most: the spectra of 4,096 take 128 KB of shared memory.
template <int N, int kFeatures>
struct Shape {
  static constexpr int kThreads = N == 64 ? 512 : 256;
  // A lane's weights on their way: as many as it has registers for.
  static constexpr int kAhead = N == 32 ? 16 : N == 64 && kFeatures > 1024 ? 8 : 4;
  static constexpr int kSlots = N / 2;
  // Of the product over inputs, and of a transform.
  static constexpr int kInputSteps = kFeatures / N < 16 ? 1 : kFeatures / N / 16;
  static constexpr int kInputs = 16 * kInputSteps;
  static constexpr int kSteps = N / 16;
  // Of eight columns of a transform.
  static constexpr int kGroups = N / 8;
  // Words of a slot's spectra: of both parts, for sixteen rows two inputs a word, or for each output both parts. And so
  // many words more that slots lie in different banks.
  static constexpr int kRegion = kInputs * 16 + 16;
  static constexpr int kMatrixWords = kSteps * kGroups * kLanes * 2;
  static constexpr int kSharedWords = kSlots * kRegion + 2 * kMatrixWords;

  // The time that an element of a transform's step is, so that a lane has neighbours of x.
  INFOLD_BOTH static int time_of_step(int step, int lane, int high, int element) {
    return lane % 4 * (N / 4) + 4 * step + 2 * high + element;
  }
  // The same of an inverse transform's column, so that a lane has neighbours of y.
  INFOLD_BOTH static int time_of_column(int group, int column) { return column / 2 * (N / 4) + 2 * group + column % 2; }
  // The slot of an inverse transform's step.
  INFOLD_BOTH static int slot_of_step(int step, int lane, int high) { return 8 * step + 4 * high + lane % 4; }

  // Where a pair of inputs' part of a slot lies in its region, for rows `group` and `group + 8`: two words.
  INFOLD_BOTH static int input_place(int part, int pair, int group) {
    const int within = pair % 8, lane = within % 4;
    return ((part * kInputSteps + pair / 8) * kLanes + lane * 8 + (group ^ 2 * lane)) * 4 + within / 4 * 2;
  }
  // Where operand A of a step of them lies: four words.
  INFOLD_BOTH static int operand_place(int part, int step, int lane) {
    const int group = lane / 4, column = lane % 4;
    return ((part * kInputSteps + step) * kLanes + column * 8 + (group ^ 2 * column)) * 4;
  }
  // Where an output's numbers lie in a slot's region, for rows `group` and `group + 8`: two words.
  INFOLD_BOTH static int output_place(int output, int group) { return (output ^ (output / 2 & 1)) * 16 + group * 2; }
};

// Of the weights: four words of a lane, operand B of real parts and then of imaginary ones, of one slot, eight outputs
// and sixteen inputs.
INFOLD_BOTH size_t weight_place(int slot, int tiles, int tile, int steps, int step, int lane) {
  return (((static_cast<size_t>(slot) * tiles + tile) * steps + step) * kLanes + lane) * 4;
}
INFOLD_BOTH int input_of(int step, int lane, int high, int element) {
  return 16 * step + 8 * high + lane % 4 * 2 + element;
}

}  // namespace circulant
}  // namespace infold
