// What the operators of sparse spectra check on every device.
#pragma once

#include <cmath>

#include "infold/csrc/dispatch.h"

namespace infold {

inline void check_indices(const Tensor& indices, double scale) {
  const auto dtype = indices.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kInt || dtype == at::kLong, "indices: expected an int32 or int64 tensor, got ", dtype);
  const bool fits = indices.dim() == 2 && indices.sym_size(0).sym_eq(2).expect_true(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(fits, "indices: expected shape [2, coefficients], got ", indices.sym_sizes());
  TORCH_CHECK_VALUE(std::isfinite(scale), "scale: expected a finite number, got ", scale);
}

/// Checks that there is a pair for each index.
inline void check_coefficients(const Tensor& coefficients, const Tensor& indices) {
  const bool fits = coefficients.dim() == 2 && coefficients.sym_size(1).sym_eq(2).expect_true(__FILE__, __LINE__) &&
                    coefficients.sym_size(0).sym_eq(indices.sym_size(1)).expect_true(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(fits, "coefficients: expected shape [", indices.sym_size(1), ", 2], got ",
                    coefficients.sym_sizes());
}

inline void check_count(int64_t features, const char* what) {
  TORCH_CHECK_VALUE(features >= 0, what, ": expected at least 0, got ", features);
}

}  // namespace infold
