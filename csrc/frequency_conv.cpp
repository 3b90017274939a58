// Convolution by spectra and its companions. T(g, w, x) = Σ g·w·x is trilinear; y, dx and dw are its partial
// derivatives, so each one's backward is made of the other two, and gradients of any order need nothing new.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

#include "infold/csrc/call.h"
#include "infold/csrc/cast.h"

namespace infold {
namespace {

using at::IntArrayRef;
using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

struct FrequencyConvOp {
  static constexpr const char* name = "infold::frequency_conv";
  using Signature = Tensor(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                           IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool circular);
};

struct FrequencyConvDxOp {
  static constexpr const char* name = "infold::frequency_conv_dx";
  using Signature = Tensor(const Tensor& gradient, const Tensor& weight, SymIntArrayRef x_size, IntArrayRef stride,
                           IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool circular);
};

struct FrequencyConvDwOp {
  static constexpr const char* name = "infold::frequency_conv_dw";
  using Signature = Tensor(const Tensor& gradient, const Tensor& x, IntArrayRef kernel_size, IntArrayRef stride,
                           IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool circular);
};

/// Where a convolution looks, beside its kernel, as a backward keeps it.
struct Place {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
  bool circular;

  Place(IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool circular)
      : stride(stride.vec()), padding(padding.vec()), dilation(dilation.vec()), groups(groups), circular(circular) {}

  explicit Place(AutogradContext* ctx)
      : Place(ctx->saved_data["stride"].toIntVector(), ctx->saved_data["padding"].toIntVector(),
              ctx->saved_data["dilation"].toIntVector(), ctx->saved_data["groups"].toInt(),
              ctx->saved_data["circular"].toBool()) {}

  void save(AutogradContext* ctx) const {
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["circular"] = circular;
  }

  Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias = {}) const {
    return op<FrequencyConvOp>().call(x, weight, bias, stride, padding, dilation, groups, circular);
  }
  Tensor dx(const Tensor& gradient, const Tensor& weight, SymIntArrayRef x_size) const {
    return op<FrequencyConvDxOp>().call(gradient, weight, x_size, stride, padding, dilation, groups, circular);
  }
  Tensor dw(const Tensor& gradient, const Tensor& x, IntArrayRef kernel_size) const {
    return op<FrequencyConvDwOp>().call(gradient, x, kernel_size, stride, padding, dilation, groups, circular);
  }

  /// The sizes of the result beyond the channels. Checks everything but the channels.
  c10::SymDimVector outputs(SymIntArrayRef inputs, IntArrayRef kernel_size) const {
    const auto dimensions = kernel_size.size();
    TORCH_CHECK_VALUE(1 <= dimensions && dimensions <= 3, "kernel_size: expected 1 to 3 dimensions, got ", kernel_size);
    TORCH_CHECK_VALUE(inputs.size() == dimensions, "x_size: expected ", dimensions, " integers, got ", inputs);
    const auto check = [&](const char* what, IntArrayRef list, std::size_t count, int64_t least) {
      bool fits = list.size() == count;
      for (const auto value : list) fits = fits && value >= least;
      TORCH_CHECK_VALUE(fits, what, ": expected ", count, " integers from ", least, ", got ", list);
    };
    check("kernel_size", kernel_size, dimensions, 1);
    check("stride", stride, dimensions, 1);
    check("padding", padding, padding.size() == 2 * dimensions ? 2 * dimensions : dimensions, 0);
    check("dilation", dilation, dimensions, 1);
    c10::SymDimVector out;
    for (std::size_t i = 0; i < dimensions; ++i) {
      const auto before = padding[i], after = padding[padding.size() - dimensions + i];
      const auto reach = dilation[i] * (kernel_size[i] - 1) + 1;
      if (circular) {
        TORCH_CHECK_VALUE(inputs[i].sym_ge(std::max(before, after)).expect_true(__FILE__, __LINE__),
                          "padding: expected at most the input's ", inputs[i], " for a circular boundary, got ",
                          std::max(before, after));
      }
      const auto padded = inputs[i] + before + after;
      TORCH_CHECK_VALUE(padded.sym_ge(reach).expect_true(__FILE__, __LINE__),
                        "kernel_size: expected at most the padded input's ", padded, " with its dilation, got ", reach);
      out.push_back((padded - reach) / stride[i] + 1);
    }
    return out;
  }
};

/// A tensor's sizes beyond the channels.
std::vector<SymInt> inner(const Tensor& tensor, std::size_t dimensions, const char* what) {
  TORCH_CHECK_VALUE(static_cast<std::size_t>(tensor.dim()) == dimensions + 2, what, ": expected ", dimensions + 2,
                    " dimensions, got shape ", tensor.sym_sizes());
  return tensor.sym_sizes().slice(2).vec();
}

/// A weight's sizes beyond the channels, which shapes depend on.
std::vector<int64_t> kernel_of(const Tensor& weight) {
  TORCH_CHECK_VALUE(3 <= weight.dim() && weight.dim() <= 5, "weight: expected 3 to 5 dimensions, got shape ",
                    weight.sym_sizes());
  std::vector<int64_t> out;
  for (int64_t i = 2; i < weight.dim(); ++i) out.push_back(weight.sym_size(i).guard_int(__FILE__, __LINE__));
  return out;
}

void check_groups(int64_t groups, int64_t channels, const char* what) {
  TORCH_CHECK_VALUE(groups > 0 && channels % groups == 0, "groups: expected a divisor of ", what, ", ", channels,
                    ", got ", groups);
}

int64_t channels_of(const Tensor& tensor, int64_t dimension) {
  return tensor.sym_size(dimension).guard_int(__FILE__, __LINE__);
}

void check_sizes(const Tensor& tensor, const c10::SymDimVector& expected, const char* what) {
  const auto sizes = tensor.sym_sizes();
  bool fits = sizes.size() == expected.size();
  for (std::size_t i = 0; fits && i < expected.size(); ++i) {
    fits = sizes[i].sym_eq(expected[i]).expect_true(__FILE__, __LINE__);
  }
  TORCH_CHECK_VALUE(fits, what, ": expected shape ", SymIntArrayRef(expected), ", got ", sizes);
}

c10::SymDimVector joined(const SymInt& batch, int64_t channels, SymIntArrayRef rest) {
  c10::SymDimVector out{batch, channels};
  out.append(rest.begin(), rest.end());
  return out;
}

Tensor meta(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
            IntArrayRef dilation, int64_t groups, bool circular) {
  const Place place(stride, padding, dilation, groups, circular);
  const auto kernel_size = kernel_of(weight);
  const auto inputs = inner(x, kernel_size.size(), "x");
  const auto channels = channels_of(weight, 0);
  TORCH_CHECK_VALUE(channels_of(x, 1) == channels_of(weight, 1) * groups, "x: expected ",
                    channels_of(weight, 1) * groups, " channels in ", groups, " groups, got ", x.sym_size(1));
  check_groups(groups, channels, "out_channels");
  check_bias(bias, channels);
  return at::empty_symint(joined(x.sym_size(0), channels, place.outputs(inputs, kernel_size)), x.options());
}

Tensor meta_dx(const Tensor& gradient, const Tensor& weight, SymIntArrayRef x_size, IntArrayRef stride,
               IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool circular) {
  const Place place(stride, padding, dilation, groups, circular);
  const auto kernel_size = kernel_of(weight);
  inner(gradient, kernel_size.size(), "gradient");
  check_groups(groups, channels_of(weight, 0), "out_channels");
  const auto outputs = place.outputs(x_size, kernel_size);
  check_sizes(gradient, joined(gradient.sym_size(0), channels_of(weight, 0), outputs), "gradient");
  return at::empty_symint(joined(gradient.sym_size(0), channels_of(weight, 1) * groups, x_size), gradient.options());
}

Tensor meta_dw(const Tensor& gradient, const Tensor& x, IntArrayRef kernel_size, IntArrayRef stride,
               IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool circular) {
  const Place place(stride, padding, dilation, groups, circular);
  const auto inputs = inner(x, kernel_size.size(), "x");
  inner(gradient, kernel_size.size(), "gradient");
  const auto ins = channels_of(x, 1), outs = channels_of(gradient, 1);
  check_groups(groups, ins, "in_channels");
  check_groups(groups, outs, "out_channels");
  check_sizes(gradient, joined(x.sym_size(0), outs, place.outputs(inputs, kernel_size)), "gradient");
  std::vector<int64_t> sizes{outs, ins / groups};
  sizes.insert(sizes.end(), kernel_size.begin(), kernel_size.end());
  return at::empty(sizes, gradient.options().dtype(compute_dtype(gradient)));
}

rust::Slice<const int64_t> slice(IntArrayRef list) { return {list.data(), list.size()}; }

Tensor conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
            IntArrayRef dilation, int64_t groups, bool circular) {
  const Window window{{}, slice(stride), slice(padding), slice(dilation), groups};
  return run(x, [&](Outputs& out) { return frequency_conv(x, weight, or_undefined(bias), window, circular, out); });
}

Tensor conv_dx(const Tensor& gradient, const Tensor& weight, SymIntArrayRef x_size, IntArrayRef stride,
               IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool circular) {
  const Window window{{}, slice(stride), slice(padding), slice(dilation), groups};
  const auto size = slice(C10_AS_INTARRAYREF_SLOW(x_size));
  return run(gradient, [&](Outputs& out) { return frequency_conv_dx(gradient, weight, size, window, circular, out); });
}

Tensor conv_dw(const Tensor& gradient, const Tensor& x, IntArrayRef kernel_size, IntArrayRef stride,
               IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool circular) {
  const Window window{slice(kernel_size), slice(stride), slice(padding), slice(dilation), groups};
  return run(gradient, [&](Outputs& out) { return frequency_conv_dw(gradient, x, window, circular, out); });
}

struct ConvFunction : Function<ConvFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool circular) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Place place(stride, padding, dilation, groups, circular);
    place.save(ctx);
    const auto kernel_size = kernel_of(weight);
    // Each of the two is needed for the other's gradient alone.
    ctx->save_for_backward(
        {weight.requires_grad() ? x : Tensor(), x.requires_grad() ? weight : Tensor(), weight.new_empty({0})});
    ctx->saved_data["x_size"] = inner(x, kernel_size.size(), "x");
    ctx->saved_data["kernel_size"] = kernel_size;
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["bias_dtype"] = static_cast<int64_t>(bias.has_value() ? bias->scalar_type() : x.scalar_type());
    return place.forward(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const Tensor& gradient = gradients[0];
    const auto saved = ctx->get_saved_variables();
    const Place place(ctx);
    Tensor dx, dw, db;
    if (ctx->needs_input_grad(0)) dx = place.dx(gradient, saved[1], ctx->saved_data["x_size"].toSymIntVector());
    if (ctx->needs_input_grad(1))
      dw = place.dw(gradient, saved[0], ctx->saved_data["kernel_size"].toIntVector()).to(saved[2].scalar_type());
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2))
      db = gradient.flatten(2)
               .sum(IntArrayRef{0, 2})
               .to(static_cast<at::ScalarType>(ctx->saved_data["bias_dtype"].toInt()));
    return {dx, dw, db, {}, {}, {}, {}, {}};
  }
};

struct DxFunction : Function<DxFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& gradient, const Tensor& weight, SymIntArrayRef x_size,
                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool circular) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Place place(stride, padding, dilation, groups, circular);
    place.save(ctx);
    ctx->save_for_backward({gradient, weight});
    return place.dx(gradient, weight, x_size);
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    const Tensor& h = cotangents[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &gradient = saved[0], &weight = saved[1];
    const Place place(ctx);
    Tensor dg, dw;
    if (ctx->needs_input_grad(0)) dg = place.forward(h, weight);
    if (ctx->needs_input_grad(1)) dw = place.dw(gradient, h, kernel_of(weight)).to(weight.scalar_type());
    return {dg, dw, {}, {}, {}, {}, {}, {}};
  }
};

struct DwFunction : Function<DwFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& gradient, const Tensor& x, IntArrayRef kernel_size,
                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool circular) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Place place(stride, padding, dilation, groups, circular);
    place.save(ctx);
    ctx->save_for_backward({gradient, x});
    return place.dw(gradient, x, kernel_size);
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    // The cotangent has the weight's shape and takes its place.
    const Tensor& h = cotangents[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &gradient = saved[0], &x = saved[1];
    const Place place(ctx);
    Tensor dg, dx;
    if (ctx->needs_input_grad(0)) dg = place.forward(x, h).to(gradient.scalar_type());
    if (ctx->needs_input_grad(1)) dx = place.dx(gradient, h, x.sym_sizes().slice(2)).to(x.scalar_type());
    return {dg, dx, {}, {}, {}, {}, {}, {}};
  }
};

template <c10::DispatchKey key, c10::DeviceType device>
Tensor autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                IntArrayRef padding, IntArrayRef dilation, int64_t groups, bool circular) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return op<FrequencyConvOp>().call(cast<device>(x), cast<device>(weight), cast<device>(bias), stride, padding,
                                    dilation, groups, circular);
}

TORCH_LIBRARY_IMPL(infold, CPU, m) {
  m.impl("frequency_conv", conv);
  m.impl("frequency_conv_dx", conv_dx);
  m.impl("frequency_conv_dw", conv_dw);
}

TORCH_LIBRARY_IMPL(infold, Meta, m) {
  m.impl("frequency_conv", meta);
  m.impl("frequency_conv_dx", meta_dx);
  m.impl("frequency_conv_dw", meta_dw);
}

TORCH_LIBRARY_IMPL(infold, Autograd, m) {
  m.impl("frequency_conv", Apply<ConvFunction, FrequencyConvOp::Signature>::call);
  m.impl("frequency_conv_dx", Apply<DxFunction, FrequencyConvDxOp::Signature>::call);
  m.impl("frequency_conv_dw", Apply<DwFunction, FrequencyConvDwOp::Signature>::call);
}

TORCH_LIBRARY_IMPL(infold, AutocastCPU, m) {
  m.impl("frequency_conv", autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(infold, AutocastCUDA, m) {
  m.impl("frequency_conv", autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace
}  // namespace infold
