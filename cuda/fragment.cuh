// The order in which every layout holds a weight: tiles of 16 rows by 64 columns, each four steps of an
// mma.m16n8k16 whose operand A it is. Compiled for the host too, which lays weights out.
#pragma once

#include <cstdint>

#include "both.h"

namespace infold {

constexpr int kRows = 16;
constexpr int kCols = 64;
constexpr int kLanes = 32;
constexpr int kSteps = kCols / 16;
// Registers of operand A that a lane holds in a step, each of two weights.
constexpr int kRegisters = 4;

// Operand A of one step.
struct Fragment {
  uint32_t registers[kRegisters];
};

// The row of the tile that both halves of a lane's register belong to.
INFOLD_BOTH int row_of(int lane, int reg) { return lane / 4 + 8 * (reg % 2); }

// The column of the tile of one half of a lane's register. The order of columns within the mma is free as long as x's
// is the same: this one gives a lane sixteen neighbours of x in a tile.
INFOLD_BOTH int col_of(int lane, int step, int reg, int half) { return lane % 4 * 16 + step * 4 + reg / 2 * 2 + half; }

// A lane reads four words at a time, beside its neighbours': where word `word` of it lies in its tile.
INFOLD_BOTH int word_index(int lane, int word) { return (word / 4 * kLanes + lane) * 4 + word % 4; }

}  // namespace infold
