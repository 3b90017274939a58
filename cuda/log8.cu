// Numbers in log8, decoded: those that are too large for a dtype to its largest.
#include "log8.cuh"
#include "values.cuh"

namespace {

using namespace infold;

constexpr int kThreads = 256;

// The largest finite number.
__device__ float largest(int dtype) {
  return dtype == INFOLD_F16 ? 65504.0f : float_of(dtype == INFOLD_BF16 ? 0x7f7f0000 : log8::kLargest);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) infold_log8_decode(InfoldLog8Decode p) {
  const size_t index = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.count) return;
  const float value = log8::load(p.numbers, index), most = largest(p.dtype);
  store_value(p.out, index, p.dtype, value > most ? most : value < -most ? -most : value);
}
