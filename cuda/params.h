/* What kernels are launched with; src/cuda/params.rs has the same. */
#pragma once

#include <stdint.h>

/* A weight that its layout has no code for. */
struct InfoldEscape {
  uint32_t col;
  float value; /* before its scale */
};

/* What a layout's table begins with. */
struct InfoldHead {
  uint32_t base;           /* of the window; of pairs, the bfloat16 that stands for what is listed apart; or 0 */
  uint32_t group_cols;     /* columns under one scale */
  uint32_t upper_bytes[2]; /* that the values of pairs of levels have, or 0 */
};

/* A weight, tile after tile across, stripe of 16 rows after stripe. */
struct InfoldWeight {
  const struct InfoldHead* head;
  const float* values; /* of each code; of pairs, of each index of the table, two of levels, and then the entries */
  const uint32_t* tiles;
  const uint32_t* escape_starts; /* of each row's, and the end of all; of pairs, then of each run's words */
  const struct InfoldEscape* escapes;
  const void* scales; /* null for 1, else float32 or bfloat16 */
  int32_t scales_are_bf16;
  int32_t scale_stride; /* from a row's to the next one's: 0 where rows share them */
  int32_t rows;
  int32_t cols;
  uint64_t payload_bytes; /* from the head on */
};

/* y = x Wᵀ + bias. */
struct InfoldLinear {
  struct InfoldWeight weight;
  const uint16_t* x;    /* bfloat16, (batch, cols) */
  const uint16_t* bias; /* bfloat16, (rows), or null */
  uint16_t* y;          /* bfloat16, (batch, rows) */
  int32_t batch;        /* at most 8 or 16, as the kernel's name says */
};

/* Rows of the dense weight: those that `indices` name, or all of them if it is null. */
struct InfoldUnpack {
  struct InfoldWeight weight;
  const int64_t* indices; /* a block for each; without them, one for each stripe */
  void* out;              /* (rows or indices, cols) */
  int32_t out_is_bf16;    /* else float32 */
};
