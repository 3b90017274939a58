// Shapes and dtypes without data, batch sizes symbolic.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "infold/csrc/packed.h"

namespace infold {
namespace {

using at::ScalarType;

Tensor linear(const Tensor& x, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
              const OptionalTensor& bias, int64_t, int64_t, int64_t out_features, int64_t in_features, ScalarType,
              bool) {
  check_bias(bias, out_features);
  return x.new_empty_symint(with_last(x, in_features, out_features, "x"));
}

Tensor linear_dx(const Tensor& gradient, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t,
                 int64_t, int64_t out_features, int64_t in_features, ScalarType, bool) {
  return gradient.new_empty_symint(with_last(gradient, out_features, in_features, "gradient"));
}

Tensor linear_ds(const Tensor& gradient, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                 at::IntArrayRef scale_shape, int64_t, int64_t, int64_t, int64_t, ScalarType) {
  return gradient.new_empty(scale_shape, gradient.options().dtype(compute_dtype(gradient)));
}

Tensor embedding(const Tensor& indices, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t,
                 int64_t, int64_t, int64_t embedding_dim, ScalarType weight_dtype) {
  const auto sizes = indices.sym_sizes();
  c10::SymDimVector out(sizes.begin(), sizes.end());
  out.emplace_back(embedding_dim);
  return indices.new_empty_symint(out, indices.options().dtype(weight_dtype));
}

Tensor conv(const Tensor& x, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
            at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
            int64_t groups, int64_t, int64_t, int64_t out_features, int64_t in_features, ScalarType, bool) {
  const auto dimensions = kernel_size.size();
  TORCH_CHECK_VALUE(1 <= dimensions && dimensions <= 3, "kernel_size: expected 1 to 3 integers, got ", kernel_size);
  const auto check = [&](const char* what, at::IntArrayRef list, int64_t least) {
    bool fits = list.size() == dimensions;
    for (const auto value : list) fits = fits && value >= least;
    TORCH_CHECK_VALUE(fits, what, ": expected ", dimensions, " integers from ", least, ", got ", list);
  };
  check("kernel_size", kernel_size, 1);
  check("stride", stride, 1);
  check("padding", padding, 0);
  check("dilation", dilation, 1);
  TORCH_CHECK_VALUE(static_cast<std::size_t>(x.dim()) == dimensions + 2, "x: expected ", dimensions + 2,
                    " dimensions, got ", x.dim());
  auto columns = x.sym_size(1);
  for (const auto length : kernel_size) columns = columns * length;
  TORCH_CHECK_VALUE(groups > 0 && columns.sym_eq(in_features * groups).expect_true(__FILE__, __LINE__),
                    "x: expected channels / groups · kernel to be ", in_features, ", got shape ", x.sym_sizes());
  c10::SymDimVector out{x.sym_size(0), out_features};
  for (std::size_t i = 0; i < dimensions; ++i) {
    const auto reach = dilation[i] * (kernel_size[i] - 1) + 1;
    out.push_back((x.sym_size(static_cast<int64_t>(i) + 2) + 2 * padding[i] - reach) / stride[i] + 1);
  }
  return at::empty_symint(out, x.options(), x.suggest_memory_format());
}

Tensor unpack(const Tensor& payload, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t,
              int64_t out_features, int64_t in_features, ScalarType weight_dtype) {
  return payload.new_empty({out_features, in_features}, payload.options().dtype(weight_dtype));
}

TORCH_LIBRARY_IMPL(infold, Meta, m) {
  m.impl("fused_linear", linear);
  m.impl("fused_linear_dx", linear_dx);
  m.impl("fused_linear_ds", linear_ds);
  m.impl("fused_embedding", embedding);
  m.impl("fused_embedding_ds", linear_ds);
  m.impl("fused_conv", conv);
  m.impl("unpack", unpack);
}

}  // namespace
}  // namespace infold
