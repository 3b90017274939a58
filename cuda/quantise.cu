// From a dense weight to levels: the largest magnitude under each scale, and then the levels at scales that the host
// makes of those. A warp for each row's part under one scale.
#include <cmath>
#include <cstddef>

#include "fragment.cuh"
#include "intrinsics.cuh"
#include "params.h"

namespace {

using namespace infold;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;

struct FromF32 {
  using Weight = float;
  __device__ static float value(float weight) { return weight; }
};

struct FromBf16 {
  using Weight = uint16_t;
  __device__ static float value(uint16_t weight) { return from_bf16(weight); }
};

// Calls `body(part, first, end)` with the parts of rows that fall to this warp, and where each begins and ends.
template <class Body>
__device__ void for_parts(const InfoldQuantise& p, const Body& body) {
  const int64_t groups = (p.cols + p.group_cols - 1) / p.group_cols;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t part = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes; part < p.rows * groups;
       part += stride) {
    const int64_t row = part / groups, col = part % groups * p.group_cols;
    const int64_t end = col + p.group_cols < p.cols ? col + p.group_cols : p.cols;
    body(part, row * p.cols + col, row * p.cols + end);
  }
}

// Magnitudes are compared by their bits: an infinity or a NaN is the largest then, and the host sees it.
template <class From>
__device__ void find_largest(const InfoldQuantise& p) {
  const typename From::Weight* weights = static_cast<const typename From::Weight*>(p.weights);
  const int lane = threadIdx.x % kLanes;
  for_parts(p, [&](int64_t part, int64_t first, int64_t end) {
    uint32_t largest = 0;
    for (int64_t i = first + lane; i < end; i += kLanes) {
      const uint32_t magnitude = bits_of(From::value(weights[i])) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const uint32_t other = shuffle(largest, lane ^ step);
      largest = other > largest ? other : largest;
    }
    if (lane == 0) p.largest[part] = largest;
  });
}

// Rounded to nearest, ties to even; the division is IEEE's.
template <class From>
__device__ void quantise(const InfoldQuantise& p) {
  const typename From::Weight* weights = static_cast<const typename From::Weight*>(p.weights);
  const int lane = threadIdx.x % kLanes;
  for_parts(p, [&](int64_t part, int64_t first, int64_t end) {
    const float scale = p.scales[part];
    for (int64_t i = first + lane; i < end; i += kLanes) {
      const float level = rintf(From::value(weights[i]) / scale);
      p.levels[i] = static_cast<int32_t>(level < -p.max ? -p.max : level > p.max ? p.max : level);
    }
  });
}

}  // namespace

#define INFOLD_KERNEL(name, body) \
  extern "C" __global__ void __launch_bounds__(kThreads) infold_##name(InfoldQuantise p) { body(p); }
INFOLD_KERNEL(largest_f32, find_largest<FromF32>)
INFOLD_KERNEL(largest_bf16, find_largest<FromBf16>)
INFOLD_KERNEL(quantise_f32, quantise<FromF32>)
INFOLD_KERNEL(quantise_bf16, quantise<FromBf16>)
#undef INFOLD_KERNEL
