// Numbers in memory, in any of the dtypes.
#pragma once

#include <cstddef>

#include "intrinsics.cuh"
#include "params.h"

namespace infold {

__device__ inline float load_value(const void* values, size_t index, int dtype) {
  if (dtype == INFOLD_F32) return static_cast<const float*>(values)[index];
  const uint16_t bits = static_cast<const uint16_t*>(values)[index];
  return dtype == INFOLD_BF16 ? from_bf16(bits) : from_f16(bits);
}

__device__ inline void store_value(void* values, size_t index, int dtype, float value) {
  if (dtype == INFOLD_F32) {
    static_cast<float*>(values)[index] = value;
  } else {
    static_cast<uint16_t*>(values)[index] = dtype == INFOLD_BF16 ? to_bf16(value) : to_f16(value);
  }
}

}  // namespace infold
