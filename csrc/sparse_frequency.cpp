// The product with a matrix of a sparse two-dimensional spectrum and its companions. T(g, c, x) = Re Σ c·x̂·conj(ĝ) is
// trilinear; y, dx and dc are its partial derivatives, so each one's backward is made of the other two, and gradients
// of any order need nothing new.

#include "infold/csrc/sparse_frequency.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "infold/csrc/call.h"
#include "infold/csrc/cast.h"
#include "infold/csrc/frequency.h"

namespace infold {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

struct LinearOp {
  static constexpr const char* name = "infold::sparse_frequency_linear";
  using Signature = Tensor(const Tensor& x, const Tensor& coefficients, const Tensor& indices,
                           const OptionalTensor& bias, int64_t out_features, double scale);
};

struct DxOp {
  static constexpr const char* name = "infold::sparse_frequency_linear_dx";
  using Signature = Tensor(const Tensor& gradient, const Tensor& coefficients, const Tensor& indices,
                           int64_t in_features, double scale);
};

struct DcOp {
  static constexpr const char* name = "infold::sparse_frequency_linear_dc";
  using Signature = Tensor(const Tensor& gradient, const Tensor& x, const Tensor& indices, double scale);
};

Tensor meta(const Tensor& x, const Tensor& coefficients, const Tensor& indices, const OptionalTensor& bias,
            int64_t out_features, double scale) {
  check_indices(indices, scale);
  check_coefficients(coefficients, indices);
  check_count(out_features, "out_features");
  check_bias(bias, out_features);
  return x.new_empty_symint(with_last(x, last(x, "x"), out_features, "x"));
}

Tensor meta_dx(const Tensor& gradient, const Tensor& coefficients, const Tensor& indices, int64_t in_features,
               double scale) {
  check_indices(indices, scale);
  check_coefficients(coefficients, indices);
  check_count(in_features, "in_features");
  return gradient.new_empty_symint(with_last(gradient, last(gradient, "gradient"), in_features, "gradient"));
}

Tensor meta_dc(const Tensor& gradient, const Tensor& x, const Tensor& indices, double scale) {
  check_indices(indices, scale);
  check_leading(gradient, x);
  return gradient.new_empty_symint({indices.sym_size(1), 2}, gradient.options().dtype(compute_dtype(gradient)));
}

Tensor linear(const Tensor& x, const Tensor& coefficients, const Tensor& indices, const OptionalTensor& bias,
              int64_t out_features, double scale) {
  return run(x, [&](Outputs& out) {
    return sparse_frequency_linear(x, coefficients, indices, or_undefined(bias), out_features, scale, out);
  });
}

Tensor linear_dx(const Tensor& gradient, const Tensor& coefficients, const Tensor& indices, int64_t in_features,
                 double scale) {
  return run(gradient, [&](Outputs& out) {
    return sparse_frequency_linear_dx(gradient, coefficients, indices, in_features, scale, out);
  });
}

Tensor linear_dc(const Tensor& gradient, const Tensor& x, const Tensor& indices, double scale) {
  return run(gradient, [&](Outputs& out) { return sparse_frequency_linear_dc(gradient, x, indices, scale, out); });
}

at::ScalarType dtype_of(AutogradContext* ctx, const char* name) {
  return static_cast<at::ScalarType>(ctx->saved_data[name].toInt());
}

struct LinearFunction : Function<LinearFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& coefficients, const Tensor& indices,
                        const OptionalTensor& bias, int64_t out_features, double scale) {
    const at::AutoDispatchBelowADInplaceOrView below;
    // Each of x and the coefficients is needed for the other's gradient alone.
    ctx->save_for_backward(
        {coefficients.requires_grad() ? x : Tensor(), x.requires_grad() ? coefficients : Tensor(), indices});
    ctx->saved_data["in_features"] = last(x, "x");
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["dtype"] = static_cast<int64_t>(coefficients.scalar_type());
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["bias_dtype"] = static_cast<int64_t>(bias.has_value() ? bias->scalar_type() : x.scalar_type());
    return op<LinearOp>().call(x, coefficients, indices, bias, out_features, scale);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const Tensor& gradient = gradients[0];
    const auto saved = ctx->get_saved_variables();
    const double scale = ctx->saved_data["scale"].toDouble();
    Tensor dx, dc, db;
    if (ctx->needs_input_grad(0))
      dx = op<DxOp>().call(gradient, saved[1], saved[2], ctx->saved_data["in_features"].toInt(), scale);
    if (ctx->needs_input_grad(1)) dc = op<DcOp>().call(gradient, saved[0], saved[2], scale).to(dtype_of(ctx, "dtype"));
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(3))
      db = sum_rows(gradient).to(dtype_of(ctx, "bias_dtype"));
    return {dx, dc, {}, db, {}, {}};
  }
};

struct DxFunction : Function<DxFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& gradient, const Tensor& coefficients, const Tensor& indices,
                        int64_t in_features, double scale) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({gradient, coefficients, indices});
    ctx->saved_data["scale"] = scale;
    return op<DxOp>().call(gradient, coefficients, indices, in_features, scale);
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    const Tensor& h = cotangents[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &gradient = saved[0], &coefficients = saved[1], &indices = saved[2];
    const double scale = ctx->saved_data["scale"].toDouble();
    Tensor dg, dc;
    if (ctx->needs_input_grad(0))
      dg = op<LinearOp>().call(h, coefficients, indices, {}, last(gradient, "gradient"), scale);
    if (ctx->needs_input_grad(1)) dc = op<DcOp>().call(gradient, h, indices, scale).to(coefficients.scalar_type());
    return {dg, dc, {}, {}, {}};
  }
};

struct DcFunction : Function<DcFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& gradient, const Tensor& x, const Tensor& indices,
                        double scale) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({gradient, x, indices});
    ctx->saved_data["scale"] = scale;
    return op<DcOp>().call(gradient, x, indices, scale);
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    // The cotangent has the coefficients' shape and takes their place.
    const Tensor& h = cotangents[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &gradient = saved[0], &x = saved[1], &indices = saved[2];
    const double scale = ctx->saved_data["scale"].toDouble();
    Tensor dg, dx;
    if (ctx->needs_input_grad(0))
      dg = op<LinearOp>().call(x, h, indices, {}, last(gradient, "gradient"), scale).to(gradient.scalar_type());
    if (ctx->needs_input_grad(1)) dx = op<DxOp>().call(gradient, h, indices, last(x, "x"), scale).to(x.scalar_type());
    return {dg, dx, {}, {}};
  }
};

template <c10::DispatchKey key, c10::DeviceType device>
Tensor autocast(const Tensor& x, const Tensor& coefficients, const Tensor& indices, const OptionalTensor& bias,
                int64_t out_features, double scale) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return op<LinearOp>().call(cast<device>(x), coefficients, indices, cast<device>(bias), out_features, scale);
}

TORCH_LIBRARY_IMPL(infold, CPU, m) {
  m.impl("sparse_frequency_linear", linear);
  m.impl("sparse_frequency_linear_dx", linear_dx);
  m.impl("sparse_frequency_linear_dc", linear_dc);
}

TORCH_LIBRARY_IMPL(infold, Meta, m) {
  m.impl("sparse_frequency_linear", meta);
  m.impl("sparse_frequency_linear_dx", meta_dx);
  m.impl("sparse_frequency_linear_dc", meta_dc);
}

TORCH_LIBRARY_IMPL(infold, Autograd, m) {
  m.impl("sparse_frequency_linear", Apply<LinearFunction, LinearOp::Signature>::call);
  m.impl("sparse_frequency_linear_dx", Apply<DxFunction, DxOp::Signature>::call);
  m.impl("sparse_frequency_linear_dc", Apply<DcFunction, DcOp::Signature>::call);
}

TORCH_LIBRARY_IMPL(infold, AutocastCPU, m) {
  m.impl("sparse_frequency_linear", autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(infold, AutocastCUDA, m) {
  m.impl("sparse_frequency_linear", autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace
}  // namespace infold
