// The block-circulant product and its companions. T(g, w, x) = Σ conj(ĝ)·ŵ·x̂ is trilinear; y, dx and dw are its partial
// derivatives, so each one's backward is made of the other two, and gradients of any order need nothing new.

#include "infold/csrc/frequency.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "infold/csrc/call.h"
#include "infold/csrc/cast.h"

namespace infold {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

Tensor meta(const Tensor& x, const Tensor& spectrum, const OptionalTensor& bias, int64_t out_features) {
  check_spectrum(spectrum, 0, out_features, "out_features");
  check_spectrum(spectrum, 1, last(x, "x"), "x's last dimension");
  check_bias(bias, out_features);
  return x.new_empty_symint(with_last(x, last(x, "x"), out_features, "x"));
}

Tensor meta_dx(const Tensor& gradient, const Tensor& spectrum, int64_t in_features) {
  check_spectrum(spectrum, 1, in_features, "in_features");
  check_spectrum(spectrum, 0, last(gradient, "gradient"), "gradient's last dimension");
  return gradient.new_empty_symint(with_last(gradient, last(gradient, "gradient"), in_features, "gradient"));
}

Tensor meta_dw(const Tensor& gradient, const Tensor& x, int64_t block) {
  TORCH_CHECK_VALUE(block > 0, "block: expected a positive size, got ", block);
  const auto outputs = ceil_div(last(gradient, "gradient"), block), inputs = ceil_div(last(x, "x"), block);
  check_leading(gradient, x);
  return gradient.new_empty({outputs, inputs, block}, gradient.options().dtype(compute_dtype(gradient)));
}

Tensor linear(const Tensor& x, const Tensor& spectrum, const OptionalTensor& bias, int64_t out_features) {
  return run(x, [&](Outputs& out) { return frequency_linear(x, spectrum, or_undefined(bias), out_features, out); });
}

Tensor linear_dx(const Tensor& gradient, const Tensor& spectrum, int64_t in_features) {
  return run(gradient, [&](Outputs& out) { return frequency_linear_dx(gradient, spectrum, in_features, out); });
}

Tensor linear_dw(const Tensor& gradient, const Tensor& x, int64_t block) {
  return run(gradient, [&](Outputs& out) { return frequency_linear_dw(gradient, x, block, out); });
}

struct LinearFunction : Function<LinearFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& spectrum, const OptionalTensor& bias,
                        int64_t out_features) {
    const at::AutoDispatchBelowADInplaceOrView below;
    // Each of the two is needed for the other's gradient alone.
    ctx->save_for_backward({spectrum.requires_grad() ? x : Tensor(), x.requires_grad() ? spectrum : Tensor()});
    ctx->saved_data["spectrum_dtype"] = static_cast<int64_t>(spectrum.scalar_type());
    ctx->saved_data["in_features"] = last(x, "x");
    ctx->saved_data["block"] = last(spectrum, "spectrum");
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["bias_dtype"] = static_cast<int64_t>(bias.has_value() ? bias->scalar_type() : x.scalar_type());
    return op<FrequencyLinearOp>().call(x, spectrum, bias, out_features);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const Tensor& gradient = gradients[0];
    const auto saved = ctx->get_saved_variables();
    Tensor dx, dw, db;
    if (ctx->needs_input_grad(0))
      dx = op<FrequencyLinearDxOp>().call(gradient, saved[1], ctx->saved_data["in_features"].toInt());
    if (ctx->needs_input_grad(1))
      dw = op<FrequencyLinearDwOp>()
               .call(gradient, saved[0], ctx->saved_data["block"].toInt())
               .to(static_cast<at::ScalarType>(ctx->saved_data["spectrum_dtype"].toInt()));
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2))
      db = sum_rows(gradient).to(static_cast<at::ScalarType>(ctx->saved_data["bias_dtype"].toInt()));
    return {dx, dw, db, {}};
  }
};

struct DxFunction : Function<DxFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& gradient, const Tensor& spectrum, int64_t in_features) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({gradient, spectrum});
    return op<FrequencyLinearDxOp>().call(gradient, spectrum, in_features);
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    const Tensor& h = cotangents[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &gradient = saved[0], &spectrum = saved[1];
    Tensor dg, dw;
    if (ctx->needs_input_grad(0)) dg = op<FrequencyLinearOp>().call(h, spectrum, {}, last(gradient, "gradient"));
    if (ctx->needs_input_grad(1))
      dw = op<FrequencyLinearDwOp>().call(gradient, h, last(spectrum, "spectrum")).to(spectrum.scalar_type());
    return {dg, dw, {}};
  }
};

struct DwFunction : Function<DwFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& gradient, const Tensor& x, int64_t block) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({gradient, x});
    return op<FrequencyLinearDwOp>().call(gradient, x, block);
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    // The cotangent has the spectrum's shape and takes its place.
    const Tensor& h = cotangents[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &gradient = saved[0], &x = saved[1];
    Tensor dg, dx;
    if (ctx->needs_input_grad(0))
      dg = op<FrequencyLinearOp>().call(x, h, {}, last(gradient, "gradient")).to(gradient.scalar_type());
    if (ctx->needs_input_grad(1)) dx = op<FrequencyLinearDxOp>().call(gradient, h, last(x, "x")).to(x.scalar_type());
    return {dg, dx, {}};
  }
};

template <c10::DispatchKey key, c10::DeviceType device>
Tensor autocast(const Tensor& x, const Tensor& spectrum, const OptionalTensor& bias, int64_t out_features) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return op<FrequencyLinearOp>().call(cast<device>(x), spectrum, cast<device>(bias), out_features);
}

/// The packed spectrum of complex half-spectra, as `torch.fft.rfft` makes them. What a real block's spectrum cannot
/// have, an imaginary part of frequency 0 or an even block's Nyquist frequency, counts for nothing and gets no
/// gradient.
Tensor complex(const Tensor& x, const Tensor& spectrum, const OptionalTensor& bias, int64_t block,
               int64_t out_features) {
  TORCH_CHECK_VALUE(spectrum.is_complex() && spectrum.dim() == 3 && block > 0 && spectrum.size(2) == block / 2 + 1,
                    "spectrum: expected a complex tensor [output blocks, input blocks, ", block / 2 + 1, "], got ",
                    spectrum.scalar_type(), " ", spectrum.sym_sizes());
  const Tensor real = at::real(spectrum), imaginary = at::imag(spectrum);
  const auto pairs = (block - 1) / 2;
  const double lone = std::sqrt(1.0 / static_cast<double>(block)), pair = std::sqrt(2.0 / static_cast<double>(block));
  std::vector<Tensor> parts{real.narrow(2, 0, 1) * lone, real.narrow(2, 1, pairs) * pair};
  if (block % 2 == 0) parts.push_back(real.narrow(2, block / 2, 1) * lone);
  parts.push_back(imaginary.narrow(2, 1, pairs) * pair);
  return op<FrequencyLinearOp>().call(x, at::cat(parts, 2), bias, out_features);
}

TORCH_LIBRARY_IMPL(infold, CPU, m) {
  m.impl("frequency_linear", linear);
  m.impl("frequency_linear_dx", linear_dx);
  m.impl("frequency_linear_dw", linear_dw);
}

TORCH_LIBRARY_IMPL(infold, CUDA, m) {
  m.impl("frequency_linear", linear);
  m.impl("frequency_linear_dx", linear_dx);
  m.impl("frequency_linear_dw", linear_dw);
}

TORCH_LIBRARY_IMPL(infold, Meta, m) {
  m.impl("frequency_linear", meta);
  m.impl("frequency_linear_dx", meta_dx);
  m.impl("frequency_linear_dw", meta_dw);
}

TORCH_LIBRARY_IMPL(infold, Autograd, m) {
  m.impl("frequency_linear", Apply<LinearFunction, FrequencyLinearOp::Signature>::call);
  m.impl("frequency_linear_dx", Apply<DxFunction, FrequencyLinearDxOp::Signature>::call);
  m.impl("frequency_linear_dw", Apply<DwFunction, FrequencyLinearDwOp::Signature>::call);
}

TORCH_LIBRARY_IMPL(infold, AutocastCPU, m) {
  m.impl("frequency_linear", autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(infold, AutocastCUDA, m) {
  m.impl("frequency_linear", autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

TORCH_LIBRARY_IMPL(infold, CompositeImplicitAutograd, m) { m.impl("frequency_linear_complex", complex); }

}  // namespace
}  // namespace infold
