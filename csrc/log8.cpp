// log8: a byte for each coefficient. Its operators, and the block-circulant product of spectra that are stored so.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "infold/csrc/call.h"
#include "infold/csrc/cast.h"
#include "infold/csrc/frequency.h"

namespace infold {
namespace {

using at::ScalarType;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

struct Log8DecodeOp {
  static constexpr const char* name = "infold::log8_decode";
  using Signature = Tensor(const Tensor& codes, const Tensor& words, ScalarType dtype);
};

struct FrequencyLinearLog8Op {
  static constexpr const char* name = "infold::frequency_linear_log8";
  using Signature = Tensor(const Tensor& x, const Tensor& codes, const Tensor& words, const OptionalTensor& bias,
                           int64_t out_features);
};

/// Coefficients under one word.
constexpr int64_t block_size = 64;

void check_words(const Tensor& codes, const Tensor& words) {
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kByte, "codes: expected dtype uint8, got ", codes.scalar_type());
  TORCH_CHECK_VALUE(words.scalar_type() == at::kShort, "words: expected dtype int16, got ", words.scalar_type());
  const auto expected = (codes.sym_numel() + (block_size - 1)) / block_size;
  const bool fits = words.dim() == 1 && words.sym_size(0).sym_eq(expected).expect_true(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(fits, "words: expected shape [", expected, "], one word for 64 codes, got ", words.sym_sizes());
}

Tensor meta_decode(const Tensor& codes, const Tensor& words, ScalarType dtype) {
  check_words(codes, words);
  return codes.new_empty_symint(codes.sym_sizes(), codes.options().dtype(dtype));
}

Tensor meta_linear(const Tensor& x, const Tensor& codes, const Tensor& words, const OptionalTensor& bias,
                   int64_t out_features) {
  check_words(codes, words);
  check_spectrum(codes, 0, out_features, "out_features");
  check_spectrum(codes, 1, last(x, "x"), "x's last dimension");
  check_bias(bias, out_features);
  return x.new_empty_symint(with_last(x, last(x, "x"), out_features, "x"));
}

Tensor decode(const Tensor& codes, const Tensor& words, ScalarType dtype) {
  return run(codes, [&](Outputs& out) { return log8_decode(codes, words, static_cast<int32_t>(dtype), out); });
}

std::tuple<Tensor, Tensor> encode(const Tensor& x) {
  Outputs outputs;
  check(log8_encode(x, outputs));
  return {outputs.at(0), outputs.at(1)};
}

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& words, const OptionalTensor& bias,
              int64_t out_features) {
  return run(
      x, [&](Outputs& out) { return frequency_linear_log8(x, codes, words, or_undefined(bias), out_features, out); });
}

/// Keeps the codes for the backward, not what they decode to.
struct LinearFunction : Function<LinearFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& codes, const Tensor& words,
                        const OptionalTensor& bias, int64_t out_features) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({codes, words});
    ctx->saved_data["in_features"] = last(x, "x");
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["bias_dtype"] = static_cast<int64_t>(bias.has_value() ? bias->scalar_type() : x.scalar_type());
    return op<FrequencyLinearLog8Op>().call(x, codes, words, bias, out_features);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const Tensor& gradient = gradients[0];
    const auto saved = ctx->get_saved_variables();
    Tensor dx, db;
    if (ctx->needs_input_grad(0)) {
      const Tensor spectrum = op<Log8DecodeOp>().call(saved[0], saved[1], compute_dtype(gradient));
      dx = op<FrequencyLinearDxOp>().call(gradient, spectrum, ctx->saved_data["in_features"].toInt());
    }
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(3))
      db = sum_rows(gradient).to(static_cast<ScalarType>(ctx->saved_data["bias_dtype"].toInt()));
    return {dx, {}, {}, db, {}};
  }
};

template <c10::DispatchKey key, c10::DeviceType device>
Tensor autocast(const Tensor& x, const Tensor& codes, const Tensor& words, const OptionalTensor& bias,
                int64_t out_features) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return op<FrequencyLinearLog8Op>().call(cast<device>(x), codes, words, cast<device>(bias), out_features);
}

TORCH_LIBRARY_IMPL(infold, CPU, m) {
  m.impl("log8_encode", encode);
  m.impl("log8_decode", decode);
  m.impl("frequency_linear_log8", linear);
}

TORCH_LIBRARY_IMPL(infold, CUDA, m) {
  m.impl("log8_encode", encode);
  m.impl("log8_decode", decode);
  m.impl("frequency_linear_log8", linear);
}

TORCH_LIBRARY_IMPL(infold, Meta, m) {
  m.impl("log8_decode", meta_decode);
  m.impl("frequency_linear_log8", meta_linear);
}

TORCH_LIBRARY_IMPL(infold, Autograd, m) {
  m.impl("frequency_linear_log8", Apply<LinearFunction, FrequencyLinearLog8Op::Signature>::call);
}

TORCH_LIBRARY_IMPL(infold, AutocastCPU, m) {
  m.impl("frequency_linear_log8", autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(infold, AutocastCUDA, m) {
  m.impl("frequency_linear_log8", autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace
}  // namespace infold
