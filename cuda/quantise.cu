// From a dense weight to levels: the largest magnitude under each scale, and then the levels at scales that the host
// makes of those. A warp for each row's part under one scale. And what the host's search for ECSQ's scales asks for:
// sums over the levels at some scales, of integers or else in the host's order, so that they are the host's bits.
#include <cmath>
#include <cstddef>

#include "fragment.cuh"
#include "intrinsics.cuh"
#include "params.h"

namespace {

using namespace infold;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;

// Levels this far out are measured one by one, and those this near in a block's shared memory first.
constexpr int kFarthest = 4096;
constexpr int kNear = 512;
// Errors are summed in fractions of a step.
constexpr float kStep = 16384;
constexpr float kMostError = kStep / 2;

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

// Of a value in steps, a quotient that is IEEE's: rounded to nearest, ties to even.
__device__ int32_t level_of(float steps, float max) {
  const float level = rintf(steps);
  return static_cast<int32_t>(level < -max ? -max : level > max ? max : level);
}

template <class From>
__device__ void quantise(const InfoldQuantise& p) {
  const typename From::Weight* weights = static_cast<const typename From::Weight*>(p.weights);
  const int lane = threadIdx.x % kLanes;
  for_parts(p, [&](int64_t part, int64_t first, int64_t end) {
    const float scale = p.scales[part];
    for (int64_t i = first + lane; i < end; i += kLanes) {
      p.levels[i] = level_of(From::value(weights[i]) / scale, p.max);
    }
  });
}

// The sum of the lanes' numbers, in the order of lanes; lane 0 has it.
__device__ double sum_in_order(double own) {
  __shared__ double numbers[kWarps][kLanes];
  double (&warp)[kLanes] = numbers[threadIdx.x / kLanes];
  warp[threadIdx.x % kLanes] = own;
  sync_warp();
  double sum = 0;
  if (threadIdx.x % kLanes == 0) {
    for (int lane = 0; lane < kLanes; ++lane) sum += warp[lane];
  }
  sync_warp();
  return sum;
}

// Calls `body(row, values)` with the rows to measure that fall to this warp.
template <class From, class Body>
__device__ void for_measured(const InfoldMeasure& p, const Body& body) {
  const int measured = (p.rows - 1) / p.every + 1, stride = gridDim.x * kWarps;
  for (int index = blockIdx.x * kWarps + threadIdx.x / kLanes; index < measured; index += stride) {
    const int row = index * p.every;
    const double sum = sum_in_order(
        body(row, static_cast<const typename From::Weight*>(p.weights) + static_cast<size_t>(row) * p.cols));
    if (threadIdx.x % kLanes == 0) p.distortions[index] = sum;
  }
}

// Squares of floats are exact, so that it is all one whether an instruction multiplies and adds at once.
template <class From>
__device__ void square(const InfoldMeasure& p) {
  for_measured<From>(p, [&](int, const typename From::Weight* values) {
    double squares = 0;
    for (int col = threadIdx.x % kLanes; col < p.cols; col += kLanes) {
      const double value = From::value(values[col]);
      squares += value * value;
    }
    return squares;
  });
}

// Counts, weights and moments of levels up to kTo.
template <int kTo, class Count>
struct OfLevels {
  Count* counts;
  unsigned long long* weights;
  unsigned long long* moments;

  __device__ static bool has(int32_t level) { return level >= -kTo && level <= kTo; }
  __device__ void add(int32_t level, uint32_t count, uint64_t weight, uint64_t moment) const {
    const int place = level + kTo;
    atomic_add(counts + place, count);
    atomic_add(weights + place, weight);
    atomic_add(moments + place, moment);
  }
};

template <class From>
__device__ void measure(const InfoldMeasure& p) {
  constexpr int kPlaces = 2 * kNear + 1;
  __shared__ uint32_t near_counts[kPlaces];
  __shared__ unsigned long long near_weights[kPlaces], near_moments[kPlaces];
  for (int i = threadIdx.x; i < kPlaces; i += kThreads) near_counts[i] = near_weights[i] = near_moments[i] = 0;
  __syncthreads();
  const OfLevels<kNear, uint32_t> near = {near_counts, near_weights, near_moments};
  const OfLevels<kFarthest, unsigned long long> all = {reinterpret_cast<unsigned long long*>(p.counts),
                                                       reinterpret_cast<unsigned long long*>(p.level_weights),
                                                       reinterpret_cast<unsigned long long*>(p.moments)};
  uint64_t outside = 0;
  for_measured<From>(p, [&](int row, const typename From::Weight* values) {
    const float scale = p.scales[row];
    const uint32_t weight = p.squares[row];
    double squares = 0;
    for (int col = threadIdx.x % kLanes; col < p.cols; col += kLanes) {
      const float steps = From::value(values[col]) / scale;
      const int32_t level = level_of(steps, p.max);
      const float error = steps - static_cast<float>(level);
      squares += static_cast<double>(error) * error;
      if (!all.has(level)) {
        ++outside;
        continue;
      }
      const int64_t moment = static_cast<int64_t>(weight) * level_of(error * kStep, kMostError);
      if (near.has(level)) {
        near.add(level, 1, weight, moment);
      } else {
        all.add(level, 1, weight, moment);
      }
    }
    return squares * (static_cast<double>(scale) * scale);
  });
  if (outside != 0) atomic_add(all.counts + 2 * kFarthest + 1, outside);
  __syncthreads();
  for (int i = threadIdx.x; i < kPlaces; i += kThreads) {
    if (near_counts[i] != 0) all.add(i - kNear, near_counts[i], near_weights[i], near_moments[i]);
  }
}

}  // namespace

#define INFOLD_KERNEL(name, body) \
  extern "C" __global__ void __launch_bounds__(kThreads) infold_##name(InfoldQuantise p) { body(p); }
INFOLD_KERNEL(largest_f32, find_largest<FromF32>)
INFOLD_KERNEL(largest_bf16, find_largest<FromBf16>)
INFOLD_KERNEL(quantise_f32, quantise<FromF32>)
INFOLD_KERNEL(quantise_bf16, quantise<FromBf16>)
#undef INFOLD_KERNEL
#define INFOLD_KERNEL(name, body) \
  extern "C" __global__ void __launch_bounds__(kThreads) infold_##name(InfoldMeasure p) { body(p); }
INFOLD_KERNEL(square_f32, square<FromF32>)
INFOLD_KERNEL(square_bf16, square<FromBf16>)
INFOLD_KERNEL(measure_f32, measure<FromF32>)
INFOLD_KERNEL(measure_bf16, measure<FromBf16>)
#undef INFOLD_KERNEL
