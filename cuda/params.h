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

/* What x, y, a bias, a dense weight and spectra are made of. */
enum InfoldDtype { INFOLD_BF16 = 0, INFOLD_F16 = 1, INFOLD_F32 = 2, INFOLD_LOG8 = 3 };

/* Numbers of a byte each, as src/spectral/log8.rs has them. */
struct InfoldLog8 {
  const uint8_t* codes;
  const uint16_t* words; /* of 64 codes each */
  const float* levels;   /* (8 curves, 256 codes), in units of the scale */
};

/* All of them in a dtype. */
struct InfoldLog8Decode {
  struct InfoldLog8 numbers;
  void* out;
  uint64_t count;
  int32_t dtype;
};

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
  int32_t order; /* of a tile's columns: 0 as W's fragments have them, 1 as they are */
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

/*
 * The same of many columns, of the rows of W from first_row on, in two steps. Or dx = g W: then x is g, y is dx, and
 * the rows are W's columns.
 */
struct InfoldWide {
  struct InfoldWeight weight;
  const uint16_t* x; /* tiles of `columns` columns */
  float* sums;       /* (splits, row_count, columns) */
  const void* bias;
  void* y;
  int32_t dtype;
  int32_t batch;
  int32_t parts;
  int32_t columns; /* 64 or 128, as the kernel's name says */
  int32_t splits;  /* of the sums' terms */
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

/* How a plane of the canonical form is coded. */
struct InfoldPlane {
  int32_t coding;  /* 0 plain bits, of a constant none; 1 rANS; 2 alias */
  int32_t width;   /* plain bits of a symbol */
  int32_t streams; /* of a coder */
  int32_t escapes; /* whether a list of them follows plain bits */
  int32_t lo;      /* the value of symbol 0 */
};

/* One plane of a weight in its canonical form, into its codes. */
struct InfoldDecode {
  const uint8_t* payload;
  uint64_t payload_bytes;
  const uint32_t* directory; /* two words a tile, the first one where it begins */
  const uint32_t* slots;     /* of the plane's coder: frequency, offset and symbol in 12, 12 and 8 bits */
  void* codes;               /* (rows, cols): bfloat16s' bits, or levels in int32 */
  uint64_t* damage;          /* set where a tile does not hold what it should */
  struct InfoldPlane before; /* the plane before it in a tile; where there is none, one without bytes */
  struct InfoldPlane own;
  int32_t plane;   /* its number: the first one's codes overwrite, the second's are added */
  int32_t workers; /* warps of a tile: the plane's streams, or any number for plain bits */
  int32_t low_bits;
  int32_t tile_rows;
  int32_t rows;
  int32_t cols;
};

/* How often codes occur. */
struct InfoldHistogram {
  const void* codes;
  uint64_t count;
  uint64_t* counts; /* added to: exponents, then signs with mantissas; or levels, then all others */
};

/* Codes into a layout of the device. */
struct InfoldLayOut {
  const void* codes;
  int32_t rows;
  int32_t cols;
  int32_t lo;     /* the window's base, or the level of code 0 */
  int32_t values; /* that have a code, from there on */
  uint32_t* tiles;
  uint32_t* row_counts;          /* written where there is no list: how many each row lists apart */
  const uint32_t* escape_starts; /* of each row's, and the end of all */
  struct InfoldEscape* escapes;  /* null to count them */
  const float* centroids;        /* r(q) of levels from the first on; others are their own */
  int32_t first_centroid;
  int32_t centroid_count;
};

/* A dense weight into levels. */
struct InfoldQuantise {
  const void* weights; /* float32 or bfloat16, (rows, cols) */
  uint32_t* largest;   /* bits of the largest magnitude under each scale */
  const float* scales; /* (rows, groups of columns) */
  int32_t* levels;     /* (rows, cols) */
  int32_t rows;
  int32_t cols;
  int32_t group_cols; /* under one scale */
  float max;          /* the largest level */
};

/* Sums over a dense weight, of every `every`th row. */
struct InfoldMeasure {
  const void* weights;     /* float32 or bfloat16, (rows, cols) */
  const float* scales;     /* of each row */
  const uint32_t* squares; /* of the scales, as integers */
  uint64_t* counts;        /* added to: levels, then all others */
  uint64_t* level_weights; /* added to: the squares at each level */
  int64_t* moments;        /* added to: the same times errors in steps */
  double* distortions; /* written: the squared errors of each row that is measured, or all of the weight's squares */
  int32_t rows;
  int32_t cols;
  int32_t every;
  float max; /* the largest level */
};

/*
 * The block-circulant product y = x Wᵀ + bias by packed spectra (src/spectral/circulant.rs); or dx = g W, of conjugate
 * spectra and with g as x and dx as y.
 */
struct InfoldCirculant {
  const void* x;        /* (batch, in_features) */
  const void* spectrum; /* of each output and input block, n numbers; not of log8 */
  struct InfoldLog8 log8;
  const void* bias; /* (out_features), or null */
  void* y;          /* (batch, out_features) */
  uint32_t* tiles;  /* the spectra as a product of many rows reads them: see cuda/circulant_many.cu */
  int32_t dtype;    /* of x, bias and y */
  int32_t spectrum_dtype;
  int32_t batch;
  int32_t in_features;
  int32_t out_features;
  int32_t n;
  int32_t inputs;        /* blocks of x */
  int32_t outputs;       /* blocks of y */
  int32_t input_stride;  /* in blocks, from an input's spectra to the next one's */
  int32_t output_stride; /* the same of outputs */
  int32_t conjugate;
  int32_t input_steps;  /* of many rows: sixteen blocks of x each */
  int32_t outputs_each; /* and blocks of y of a task: a multiple of 8 */
};
