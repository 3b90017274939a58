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
  uint32_t base;       /* of the window, or 0 */
  uint32_t group_cols; /* columns under one scale */
  uint32_t unused[2];
};

/* A weight, tile after tile across, stripe of 16 rows after stripe. */
struct InfoldWeight {
  const struct InfoldHead* head;
  const float* values; /* of each code; none in the window */
  const uint32_t* tiles;
  const uint32_t* escape_starts; /* of each row's, and the end of all */
  const struct InfoldEscape* escapes;
  const void* scales; /* null for 1, else float32 or bfloat16 */
  int32_t scales_are_bf16;
  int32_t scale_stride; /* from a row's to the next one's: 0 where rows share them */
  int32_t rows;
  int32_t cols;
};

/* What x, y, a bias and a dense weight are made of. */
enum InfoldDtype { INFOLD_BF16 = 0, INFOLD_F16 = 1, INFOLD_F32 = 2 };

/*
 * x as columns of bfloat16 for a product: each of its rows is the sum of `parts` columns, which are neighbours. Without
 * tiles out is (batch * parts, cols); else it has the order of cuda/inputs.cuh, with `columns` columns.
 */
struct InfoldInputs {
  const void* x; /* (batch, cols) */
  uint16_t* out;
  int32_t dtype;
  int32_t batch;
  int32_t cols;
  int32_t parts;
  int32_t columns;
};

/* y = x Wᵀ + bias. */
struct InfoldLinear {
  struct InfoldWeight weight;
  const uint16_t* x; /* bfloat16, (batch * parts, cols) */
  const void* bias;  /* (rows), or null */
  void* y;           /* (batch, rows) */
  int32_t dtype;     /* of bias and y */
  int32_t batch;
  int32_t parts; /* batch * parts is at most what the kernel's name says */
};

/* The same of many columns, of the rows of W from first_row on, in two steps. */
struct InfoldWide {
  struct InfoldWeight weight;
  const uint16_t* x; /* tiles of `columns` columns */
  float* sums;       /* (splits, row_count, columns) */
  const void* bias;
  void* y;
  int32_t dtype;
  int32_t batch;
  int32_t parts;
  int32_t columns; /* 64, 128 or 256, as the kernel's name says */
  int32_t splits;  /* of W's columns */
  int32_t first_row;
  int32_t row_count;
};

/* Rows of the dense weight: those that `indices` name, or all of them if it is null. */
struct InfoldUnpack {
  struct InfoldWeight weight;
  const int64_t* indices; /* a block for each; without them, one for each stripe */
  void* out;              /* (rows or indices, cols) */
  int32_t dtype;
};
