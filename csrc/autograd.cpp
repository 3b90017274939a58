// Gradients. T(g, s, x) = Σ g·s·r(q)·x is trilinear; y, dx and ds are its partial derivatives, so each one's backward
// is made of the other two and double backward needs nothing new. For embeddings, T(g, s) = Σ g·s·r(q[i]) likewise.
// A convolution differentiates the library's, and unpacks the weight again for it.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "infold/csrc/packed.h"

namespace infold {
namespace {

using at::ScalarType;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

/// The constants of a packed weight, on their way from forward to backward.
struct Constants {
  int64_t codec, layout, out_features, in_features;
  ScalarType dtype;

  void save(AutogradContext* ctx) const {
    ctx->saved_data["codec"] = codec;
    ctx->saved_data["layout"] = layout;
    ctx->saved_data["out_features"] = out_features;
    ctx->saved_data["in_features"] = in_features;
    ctx->saved_data["dtype"] = static_cast<int64_t>(dtype);
  }

  static Constants load(AutogradContext* ctx) {
    const auto get = [ctx](const char* name) { return ctx->saved_data[name].toInt(); };
    return {get("codec"), get("layout"), get("out_features"), get("in_features"),
            static_cast<ScalarType>(get("dtype"))};
  }
};

/// A packed weight's tensors and constants, and the operators on them.
struct Weight {
  Tensor payload, directory, tables;
  OptionalTensor scales;
  Constants constants;

  Tensor linear(const Tensor& x, const OptionalTensor& scales_, const OptionalTensor& bias, bool exact) const {
    const auto& [codec, layout, out, in, dtype] = constants;
    return op<FusedLinearOp>().call(x, payload, directory, tables, scales_, bias, codec, layout, out, in, dtype, exact);
  }
  Tensor dx(const Tensor& gradient, const OptionalTensor& scales_, bool exact) const {
    const auto& [codec, layout, out, in, dtype] = constants;
    return op<FusedLinearDxOp>().call(gradient, payload, directory, tables, scales_, codec, layout, out, in, dtype,
                                      exact);
  }
  Tensor ds(const Tensor& gradient, const Tensor& x, at::IntArrayRef shape) const {
    const auto& [codec, layout, out, in, dtype] = constants;
    return op<FusedLinearDsOp>().call(gradient, x, payload, directory, tables, shape, codec, layout, out, in, dtype);
  }
  Tensor embedding(const Tensor& indices, const OptionalTensor& scales_, ScalarType dtype_) const {
    const auto& [codec, layout, out, in, dtype] = constants;
    return op<FusedEmbeddingOp>().call(indices, payload, directory, tables, scales_, codec, layout, out, in, dtype_);
  }
  Tensor embedding_ds(const Tensor& gradient, const Tensor& indices, at::IntArrayRef shape) const {
    const auto& [codec, layout, out, in, dtype] = constants;
    return op<FusedEmbeddingDsOp>().call(gradient, indices, payload, directory, tables, shape, codec, layout, out, in,
                                         dtype);
  }
  Tensor unpack(ScalarType dtype_) const {
    const auto& [codec, layout, out, in, dtype] = constants;
    return op<UnpackOp>().call(payload, directory, tables, scales, codec, layout, out, in, dtype_);
  }
  /// The scales' gradient from the dense weight's: that is the lookup of every row.
  Tensor unpack_ds(const Tensor& gradient) const {
    const Tensor all = at::arange(constants.out_features, gradient.options().dtype(at::kLong));
    return embedding_ds(gradient, all, scales->sizes()).to(scales->scalar_type());
  }

  /// Saves the weight and `more`.
  void save(AutogradContext* ctx, Tensor first = {}, Tensor second = {}) const {
    constants.save(ctx);
    ctx->save_for_backward({payload, directory, tables, scales.value_or(Tensor()), first, second});
  }
  /// Loads the weight; the tensors given to `save` go to `first` and `second`.
  static Weight load(AutogradContext* ctx, Tensor* first = nullptr, Tensor* second = nullptr) {
    const auto saved = ctx->get_saved_variables();
    if (first) *first = saved[4];
    if (second) *second = saved[5];
    OptionalTensor scales = saved[3].defined() ? OptionalTensor(saved[3]) : std::nullopt;
    return {saved[0], saved[1], saved[2], scales, Constants::load(ctx)};
  }
};

bool trains(const OptionalTensor& tensor) { return tensor.has_value() && tensor->requires_grad(); }

struct LinearFunction : Function<LinearFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& payload, const Tensor& directory,
                        const Tensor& tables, const OptionalTensor& scales, const OptionalTensor& bias, int64_t codec,
                        int64_t layout, int64_t out_features, int64_t in_features, ScalarType dtype, bool exact) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Weight weight{payload, directory, tables, scales, {codec, layout, out_features, in_features, dtype}};
    // x is needed for ds alone: on a frozen weight no activation is kept.
    weight.save(ctx, trains(scales) ? x : Tensor());
    ctx->saved_data["exact"] = exact;
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["bias_dtype"] = static_cast<int64_t>(bias.has_value() ? bias->scalar_type() : x.scalar_type());
    return weight.linear(x, scales, bias, exact);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const Tensor& gradient = gradients[0];
    Tensor x;
    const Weight weight = Weight::load(ctx, &x);
    Tensor dx, ds, db;
    if (ctx->needs_input_grad(0)) dx = weight.dx(gradient, weight.scales, ctx->saved_data["exact"].toBool());
    if (weight.scales && ctx->needs_input_grad(4))
      ds = weight.ds(gradient, x, weight.scales->sizes()).to(weight.scales->scalar_type());
    // An absent optional tensor has no edge.
    const auto bias_edge = weight.scales ? 5 : 4;
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(bias_edge)) {
      db = sum_rows(gradient).to(static_cast<ScalarType>(ctx->saved_data["bias_dtype"].toInt()));
    }
    return {dx, {}, {}, {}, ds, db, {}, {}, {}, {}, {}, {}};
  }
};

struct DxFunction : Function<DxFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& gradient, const Tensor& payload, const Tensor& directory,
                        const Tensor& tables, const OptionalTensor& scales, int64_t codec, int64_t layout,
                        int64_t out_features, int64_t in_features, ScalarType dtype, bool exact) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Weight weight{payload, directory, tables, scales, {codec, layout, out_features, in_features, dtype}};
    weight.save(ctx, trains(scales) ? gradient : Tensor());
    ctx->saved_data["exact"] = exact;
    return weight.dx(gradient, scales, exact);
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    const Tensor& h = cotangents[0];
    Tensor gradient;
    const Weight weight = Weight::load(ctx, &gradient);
    Tensor dg, ds;
    if (ctx->needs_input_grad(0)) dg = weight.linear(h, weight.scales, {}, ctx->saved_data["exact"].toBool());
    if (weight.scales && ctx->needs_input_grad(4))
      ds = weight.ds(gradient, h, weight.scales->sizes()).to(weight.scales->scalar_type());
    return {dg, {}, {}, {}, ds, {}, {}, {}, {}, {}, {}};
  }
};

struct DsFunction : Function<DsFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& gradient, const Tensor& x, const Tensor& payload,
                        const Tensor& directory, const Tensor& tables, at::IntArrayRef scale_shape, int64_t codec,
                        int64_t layout, int64_t out_features, int64_t in_features, ScalarType dtype) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Weight weight{payload, directory, tables, {}, {codec, layout, out_features, in_features, dtype}};
    weight.save(ctx, gradient, x);
    return weight.ds(gradient, x, scale_shape);
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    const Tensor& t = cotangents[0];
    Tensor gradient, x;
    const Weight weight = Weight::load(ctx, &gradient, &x);
    Tensor dg, dx;
    // The cotangent has the scales' shape and takes their place.
    if (ctx->needs_input_grad(0)) dg = weight.linear(x, t, {}, false).to(gradient.scalar_type());
    if (ctx->needs_input_grad(1)) dx = weight.dx(gradient, t, false).to(x.scalar_type());
    return {dg, dx, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

struct EmbeddingFunction : Function<EmbeddingFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& indices, const Tensor& payload, const Tensor& directory,
                        const Tensor& tables, const OptionalTensor& scales, int64_t codec, int64_t layout,
                        int64_t num_embeddings, int64_t embedding_dim, ScalarType dtype) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Weight weight{payload, directory, tables, scales, {codec, layout, num_embeddings, embedding_dim, dtype}};
    weight.save(ctx, indices);
    return weight.embedding(indices, scales, dtype);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    Tensor indices;
    const Weight weight = Weight::load(ctx, &indices);
    Tensor ds;
    if (weight.scales && ctx->needs_input_grad(4)) {
      ds = weight.embedding_ds(gradients[0], indices, weight.scales->sizes()).to(weight.scales->scalar_type());
    }
    return {{}, {}, {}, {}, ds, {}, {}, {}, {}, {}};
  }
};

struct EmbeddingDsFunction : Function<EmbeddingDsFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& gradient, const Tensor& indices, const Tensor& payload,
                        const Tensor& directory, const Tensor& tables, at::IntArrayRef scale_shape, int64_t codec,
                        int64_t layout, int64_t num_embeddings, int64_t embedding_dim, ScalarType dtype) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Weight weight{payload, directory, tables, {}, {codec, layout, num_embeddings, embedding_dim, dtype}};
    weight.save(ctx, indices);
    ctx->saved_data["gradient_dtype"] = static_cast<int64_t>(gradient.scalar_type());
    return weight.embedding_ds(gradient, indices, scale_shape);
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    Tensor indices;
    const Weight weight = Weight::load(ctx, &indices);
    const auto dtype = static_cast<ScalarType>(ctx->saved_data["gradient_dtype"].toInt());
    Tensor dg;
    if (ctx->needs_input_grad(0)) dg = weight.embedding(indices, cotangents[0], dtype);
    return {dg, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

struct UnpackFunction : Function<UnpackFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& payload, const Tensor& directory, const Tensor& tables,
                        const OptionalTensor& scales, int64_t codec, int64_t layout, int64_t out_features,
                        int64_t in_features, ScalarType dtype) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Weight weight{payload, directory, tables, scales, {codec, layout, out_features, in_features, dtype}};
    weight.save(ctx);
    return weight.unpack(dtype);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const Weight weight = Weight::load(ctx);
    Tensor ds;
    if (weight.scales && ctx->needs_input_grad(3)) ds = weight.unpack_ds(gradients[0]);
    return {{}, {}, {}, ds, {}, {}, {}, {}, {}};
  }
};

/// A convolution. Its gradients are the library's, on a weight that is unpacked for them.
struct ConvFunction : Function<ConvFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& payload, const Tensor& directory,
                        const Tensor& tables, const OptionalTensor& scales, const OptionalTensor& bias,
                        at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                        at::IntArrayRef dilation, int64_t groups, int64_t codec, int64_t layout, int64_t out_features,
                        int64_t in_features, ScalarType dtype, bool exact) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Weight weight{payload, directory, tables, scales, {codec, layout, out_features, in_features, dtype}};
    // Without ds x matters by its shape alone, which one element can stand for.
    weight.save(ctx, trains(scales) ? x : x.new_empty({1}).expand_symint(x.sym_sizes()));
    ctx->saved_data["kernel_size"] = kernel_size;
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["bias_dtype"] = static_cast<int64_t>(bias.has_value() ? bias->scalar_type() : x.scalar_type());
    return op<FusedConvOp>().call(x, payload, directory, tables, scales, bias, kernel_size, stride, padding, dilation,
                                  groups, codec, layout, out_features, in_features, dtype, exact);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const Tensor& gradient = gradients[0];
    Tensor x;
    const Weight weight = Weight::load(ctx, &x);
    const auto list = [ctx](const char* name) { return ctx->saved_data[name].toIntVector(); };
    const auto kernel_size = list("kernel_size");
    const auto groups = ctx->saved_data["groups"].toInt();
    const auto out_features = weight.constants.out_features;
    std::vector<int64_t> shape{out_features, x.size(1) / groups};
    shape.insert(shape.end(), kernel_size.begin(), kernel_size.end());
    const bool to_scales = weight.scales && ctx->needs_input_grad(4);
    const auto bias_edge = weight.scales ? 5 : 4;
    const bool to_bias = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(bias_edge);
    const std::vector<int64_t> output_padding(kernel_size.size(), 0);
    auto [dx, dw, db] =
        at::convolution_backward(gradient, x, weight.unpack(gradient.scalar_type()).view(shape),
                                 at::IntArrayRef{out_features}, list("stride"), list("padding"), list("dilation"),
                                 false, output_padding, groups, {ctx->needs_input_grad(0), to_scales, to_bias});
    const Tensor ds = to_scales ? weight.unpack_ds(dw.flatten(1)) : Tensor();
    if (to_bias) db = db.to(static_cast<ScalarType>(ctx->saved_data["bias_dtype"].toInt()));
    return {dx, {}, {}, {}, ds, db, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

TORCH_LIBRARY_IMPL(infold, Autograd, m) {
  m.impl("fused_linear", Apply<LinearFunction, FusedLinearOp::Signature>::call);
  m.impl("fused_linear_dx", Apply<DxFunction, FusedLinearDxOp::Signature>::call);
  m.impl("fused_linear_ds", Apply<DsFunction, FusedLinearDsOp::Signature>::call);
  m.impl("fused_embedding", Apply<EmbeddingFunction, FusedEmbeddingOp::Signature>::call);
  m.impl("fused_embedding_ds", Apply<EmbeddingDsFunction, FusedEmbeddingDsOp::Signature>::call);
  m.impl("fused_conv", Apply<ConvFunction, FusedConvOp::Signature>::call);
  m.impl("unpack", Apply<UnpackFunction, UnpackOp::Signature>::call);
}

}  // namespace
}  // namespace infold
