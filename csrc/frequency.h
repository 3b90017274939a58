// The block-circulant operators as the dispatcher knows them, and what operators on spectra check.
#pragma once

#include "infold/csrc/dispatch.h"

namespace infold {

struct FrequencyLinearOp {
  static constexpr const char* name = "infold::frequency_linear";
  using Signature = Tensor(const Tensor& x, const Tensor& spectrum, const OptionalTensor& bias, int64_t out_features);
};

struct FrequencyLinearDxOp {
  static constexpr const char* name = "infold::frequency_linear_dx";
  using Signature = Tensor(const Tensor& gradient, const Tensor& spectrum, int64_t in_features);
};

struct FrequencyLinearDwOp {
  static constexpr const char* name = "infold::frequency_linear_dw";
  using Signature = Tensor(const Tensor& gradient, const Tensor& x, int64_t block);
};

/// A size that is one in every program.
inline int64_t last(const Tensor& tensor, const char* what) {
  TORCH_CHECK_VALUE(tensor.dim() > 0, what, ": expected at least one dimension, got a scalar");
  return tensor.sym_size(-1).guard_int(__FILE__, __LINE__);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

/// Checks that a spectrum's blocks cover `features` in dimension `dimension`.
inline void check_spectrum(const Tensor& spectrum, int64_t dimension, int64_t features, const char* what) {
  TORCH_CHECK_VALUE(spectrum.dim() == 3 && spectrum.size(2) > 0,
                    "spectrum: expected shape [output blocks, input blocks, block], got ", spectrum.sym_sizes());
  const auto blocks = spectrum.size(dimension), block = spectrum.size(2);
  TORCH_CHECK_VALUE(features >= 0 && ceil_div(features, block) == blocks, what, ": expected ",
                    blocks > 0 ? (blocks - 1) * block + 1 : 0, " to ", blocks * block, ", got ", features);
}

/// Checks that a gradient has x's leading dimensions.
inline void check_leading(const Tensor& gradient, const Tensor& x) {
  const auto leading = [](const Tensor& tensor) { return tensor.sym_sizes().slice(0, tensor.dim() - 1); };
  bool fits = gradient.dim() == x.dim();
  for (int64_t i = 0; fits && i + 1 < x.dim(); ++i) {
    fits = leading(gradient)[i].sym_eq(leading(x)[i]).expect_true(__FILE__, __LINE__);
  }
  TORCH_CHECK_VALUE(fits, "gradient: expected leading dimensions ", leading(x), ", got ", leading(gradient));
}

}  // namespace infold
