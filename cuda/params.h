/* What kernels are launched with; src/cuda/params.rs has the same. */
#pragma once

#include <stdint.h>

/* A weight that the window does not hold. */
struct InfoldEscape {
  uint16_t row;  /* in its stripe of 16 rows */
  uint16_t bits; /* of the bfloat16 */
  uint32_t col;
};

/* A weight in the window layout, tile after tile across, stripe of rows after stripe. */
struct InfoldWindowWeight {
  const uint32_t* base; /* exponent of the window's first value */
  const uint32_t* tiles;
  const uint32_t* escape_starts; /* of each stripe, and their end */
  const struct InfoldEscape* escapes;
  int32_t rows;
  int32_t cols;
};

/* y = x Wᵀ + bias. */
struct InfoldWindowLinear {
  struct InfoldWindowWeight weight;
  const uint16_t* x;    /* bfloat16, (batch, cols) */
  const uint16_t* bias; /* bfloat16, (rows), or null */
  uint16_t* y;          /* bfloat16, (batch, rows) */
  int32_t batch;        /* at most 8 or 16, as the kernel's name says */
};

/* The dense weight. */
struct InfoldWindowUnpack {
  struct InfoldWindowWeight weight;
  uint16_t* out; /* bfloat16, (rows, cols) */
};

/* Some rows of it. */
struct InfoldWindowEmbedding {
  struct InfoldWindowWeight weight;
  const int64_t* indices; /* a block for each */
  uint16_t* out;          /* bfloat16, (indices, cols) */
};
