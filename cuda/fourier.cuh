// Fourier transforms of blocks of a power of two, by some lanes of a warp each.
#pragma once

#include "intrinsics.cuh"

namespace infold {

struct Complex {
  float re, im;
};

__device__ inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
__device__ inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
__device__ inline Complex operator*(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
__device__ inline Complex conjugate(Complex a) { return {a.re, -a.im}; }

namespace fourier {

// Cosines of sixteenths of a turn, up to a quarter.
__device__ constexpr float kCosines[5] = {1.0f, 0.92387953f, 0.70710678f, 0.38268343f, 0.0f};

// a · e^(-2πi k/16), for a constant k below 8.
__device__ inline Complex rotate(Complex a, int k) {
  if (k == 0) return a;
  if (k == 4) return {a.im, -a.re};
  const Complex root = k < 4 ? Complex{kCosines[k], -kCosines[4 - k]} : Complex{-kCosines[8 - k], -kCosines[k - 4]};
  return a * root;
}

// The transform of R numbers in registers, R at most 16.
template <int R>
__device__ inline void transform(Complex (&values)[R]) {
  if constexpr (R > 1) {
    Complex even[R / 2], odd[R / 2];
#pragma unroll
    for (int i = 0; i < R / 2; ++i) {
      even[i] = values[2 * i];
      odd[i] = values[2 * i + 1];
    }
    transform(even);
    transform(odd);
#pragma unroll
    for (int k = 0; k < R / 2; ++k) {
      const Complex other = rotate(odd[k], k * (16 / R));
      values[k] = even[k] + other;
      values[k + R / 2] = even[k] - other;
    }
  }
}

// A block of N is kFirst rows of kLanes numbers, one for each lane: a lane transforms its column, and then rows of what
// is turned.
template <int N>
struct Plan {
  static constexpr int kLanes = N >= 256 ? 16 : N >= 64 ? 8 : 4;
  static constexpr int kFirst = N / kLanes;
  // Between rows, so that lanes meet in few banks.
  static constexpr int kStride = kLanes + 1;
  // Numbers of scratch in shared memory.
  static constexpr int kScratch = kFirst * kStride;

  // Roots of unity, for all threads of a block.
  __device__ static void fill(Complex (&roots)[N]) {
    for (int i = threadIdx.x; i < N; i += blockDim.x) {
      const float turns = static_cast<float>(i) / N;
      roots[i] = {cosine_of_turns(turns), -sine_of_turns(turns)};
    }
  }

  // `column[i]` is number i · kLanes + lane; the spectrum goes to the scratch, frequency after frequency. For whole
  // warps.
  __device__ static void run(Complex (&column)[kFirst], const Complex (&roots)[N], Complex* scratch) {
    const int lane = threadIdx.x % kLanes;
    transform(column);
#pragma unroll
    for (int k = 0; k < kFirst; ++k) scratch[k * kStride + lane] = column[k] * roots[k * lane];
    sync_warp();
    constexpr int kRows = kFirst / kLanes;
    Complex rows[kRows][kLanes];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) rows[i][j] = scratch[(i * kLanes + lane) * kStride + j];
      transform(rows[i]);
    }
    sync_warp();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) scratch[i * kLanes + lane + j * kFirst] = rows[i][j];
    }
    sync_warp();
  }
};

}  // namespace fourier
}  // namespace infold
