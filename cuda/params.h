/* What kernels are launched with. */
#pragma once

#include <stdint.h>

/* A weight that the window does not hold. */
struct InfoldEscape {
  uint16_t row;  /* in its stripe of 16 rows */
  uint16_t bits; /* of the bfloat16 */
  uint32_t col;
};

/* y = x Wᵀ of a weight in the window layout, tile after tile across, stripe of rows after stripe. */
struct InfoldWindowLinear {
  const uint32_t* tiles;
  const uint32_t* escape_starts; /* of each stripe, and their end */
  const struct InfoldEscape* escapes;
  const void* x; /* bfloat16, (batch, cols) */
  void* y;       /* bfloat16, (batch, rows) */
  uint32_t base; /* exponent of the window's first value */
  int32_t rows;
  int32_t cols;
  int32_t batch; /* at most 8 */
};
