// What the operator families share in the dispatcher: handles, autograd kernels, shapes.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include <optional>

namespace infold {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// The dispatcher's handle of an operator, looked up once.
template <class Op>
const c10::TypedOperatorHandle<typename Op::Signature>& op() {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow(Op::name, "").template typed<typename Op::Signature>();
  return handle;
}

/// The autograd kernel of an operator: its Function, applied.
template <class F, class Signature>
struct Apply;
template <class F, class... Arguments>
struct Apply<F, Tensor(Arguments...)> {
  static Tensor call(Arguments... arguments) { return F::apply(arguments...); }
};

/// Sums a gradient over its leading dimensions.
inline Tensor sum_rows(const Tensor& gradient) {
  return gradient.dim() == 1 ? gradient : gradient.flatten(0, -2).sum(0);
}

/// `like`'s leading sizes and another last one.
inline c10::SymDimVector with_last(const Tensor& like, int64_t expected, int64_t last, const char* what) {
  TORCH_CHECK_VALUE(like.dim() > 0, what, ": expected a last dimension of ", expected, ", got a scalar");
  const auto sizes = like.sym_sizes();
  TORCH_CHECK_VALUE(sizes.back().sym_eq(expected).expect_true(__FILE__, __LINE__), what,
                    ": expected a last dimension of ", expected, ", got ", sizes.back());
  c10::SymDimVector out(sizes.begin(), sizes.end());
  out.back() = last;
  return out;
}

inline void check_bias(const OptionalTensor& bias, int64_t out_features) {
  if (!bias.has_value()) return;
  const bool fits = bias->dim() == 1 && bias->sym_size(0).sym_eq(out_features).expect_true(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(fits, "bias: expected shape [", out_features, "], got ", bias->sym_sizes());
}

/// float64 for float64, else float32: what the kernels sum in.
inline at::ScalarType compute_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace infold
