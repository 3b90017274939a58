// Each operator on CPU and CUDA tensors: hands its arguments to Rust.

#include <torch/library.h>

#include <limits>
#include <tuple>

#include "infold/csrc/call.h"
#include "infold/csrc/packed.h"

namespace infold {
namespace {

using at::ScalarType;
using Packed = std::tuple<Tensor, Tensor, Tensor, Tensor>;

int32_t number(ScalarType dtype) { return static_cast<int32_t>(dtype); }

template <class Call>
Packed run_pack(const Tensor& weight, Call&& rust) {
  const c10::OptionalDeviceGuard device(gpu_of(weight));
  Outputs outputs;
  check(rust(outputs));
  const auto back = [&](std::size_t index) { return outputs.at(index).to(weight.device()); };
  return {back(0), back(1), back(2), back(3)};
}

Tensor linear(const Tensor& x, const Tensor& payload, const Tensor& directory, const Tensor& tables,
              const OptionalTensor& scales, const OptionalTensor& bias, int64_t codec, int64_t layout,
              int64_t out_features, int64_t in_features, ScalarType /*weight_dtype*/, bool exact) {
  const Weight weight{payload, directory, tables, or_undefined(scales), codec, layout, out_features, in_features};
  return run(payload, [&](Outputs& out) { return fused_linear(x, weight, or_undefined(bias), exact, out); });
}

Tensor linear_dx(const Tensor& gradient, const Tensor& payload, const Tensor& directory, const Tensor& tables,
                 const OptionalTensor& scales, int64_t codec, int64_t layout, int64_t out_features, int64_t in_features,
                 ScalarType /*weight_dtype*/, bool exact) {
  const Weight weight{payload, directory, tables, or_undefined(scales), codec, layout, out_features, in_features};
  return run(payload, [&](Outputs& out) { return fused_linear_dx(gradient, weight, exact, out); });
}

Tensor linear_ds(const Tensor& gradient, const Tensor& x, const Tensor& payload, const Tensor& directory,
                 const Tensor& tables, at::IntArrayRef scale_shape, int64_t codec, int64_t layout, int64_t out_features,
                 int64_t in_features, ScalarType /*weight_dtype*/) {
  const Weight weight{payload, directory, tables, or_undefined({}), codec, layout, out_features, in_features};
  const rust::Slice<const int64_t> shape(scale_shape.data(), scale_shape.size());
  return run(payload, [&](Outputs& out) { return fused_linear_ds(gradient, x, weight, shape, out); });
}

Tensor embedding(const Tensor& indices, const Tensor& payload, const Tensor& directory, const Tensor& tables,
                 const OptionalTensor& scales, int64_t codec, int64_t layout, int64_t num_embeddings,
                 int64_t embedding_dim, ScalarType weight_dtype) {
  const Weight weight{payload, directory, tables, or_undefined(scales), codec, layout, num_embeddings, embedding_dim};
  return run(payload, [&](Outputs& out) { return fused_embedding(indices, weight, number(weight_dtype), out); });
}

Tensor embedding_ds(const Tensor& gradient, const Tensor& indices, const Tensor& payload, const Tensor& directory,
                    const Tensor& tables, at::IntArrayRef scale_shape, int64_t codec, int64_t layout,
                    int64_t num_embeddings, int64_t embedding_dim, ScalarType /*weight_dtype*/) {
  const Weight weight{payload, directory, tables, or_undefined({}), codec, layout, num_embeddings, embedding_dim};
  const rust::Slice<const int64_t> shape(scale_shape.data(), scale_shape.size());
  return run(payload, [&](Outputs& out) { return fused_embedding_ds(gradient, indices, weight, shape, out); });
}

Tensor conv(const Tensor& x, const Tensor& payload, const Tensor& directory, const Tensor& tables,
            const OptionalTensor& scales, const OptionalTensor& bias, at::IntArrayRef kernel_size,
            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t codec,
            int64_t layout, int64_t out_features, int64_t in_features, ScalarType /*weight_dtype*/, bool exact) {
  const Weight weight{payload, directory, tables, or_undefined(scales), codec, layout, out_features, in_features};
  const auto slice = [](at::IntArrayRef list) { return rust::Slice<const int64_t>(list.data(), list.size()); };
  const Window window{slice(kernel_size), slice(stride), slice(padding), slice(dilation), groups};
  const Tensor y =
      run(payload, [&](Outputs& out) { return fused_conv(x, weight, or_undefined(bias), window, exact, out); });
  // The library picks strides by its backend; the meta kernel has to foresee them.
  return y.contiguous(x.suggest_memory_format());
}

Tensor dense(const Tensor& payload, const Tensor& directory, const Tensor& tables, const OptionalTensor& scales,
             int64_t codec, int64_t layout, int64_t out_features, int64_t in_features, ScalarType weight_dtype) {
  const Weight weight{payload, directory, tables, or_undefined(scales), codec, layout, out_features, in_features};
  return run(payload, [&](Outputs& out) { return unpack(weight, number(weight_dtype), out); });
}

Packed lossless(const Tensor& weight) {
  return run_pack(weight, [&](Outputs& out) { return pack_lossless(weight, out); });
}

Packed ecsq(const Tensor& weight, std::optional<double> bits, std::optional<double> max_error) {
  constexpr double none = std::numeric_limits<double>::quiet_NaN();
  return run_pack(weight,
                  [&](Outputs& out) { return pack_ecsq(weight, bits.value_or(none), max_error.value_or(none), out); });
}

Packed int8(const Tensor& weight) {
  return run_pack(weight, [&](Outputs& out) { return pack_int8(weight, out); });
}

Packed int4(const Tensor& weight, int64_t group_size) {
  return run_pack(weight, [&](Outputs& out) { return pack_int4(weight, group_size, out); });
}

std::tuple<Tensor, Tensor, Tensor> laid_out(const Tensor& payload, const Tensor& directory, const Tensor& tables,
                                            int64_t layout) {
  const c10::OptionalDeviceGuard device(gpu_of(payload));
  Outputs outputs;
  check(lay_out(payload, directory, tables, layout, outputs));
  return {outputs.at(0), outputs.at(1), outputs.at(2)};
}

std::vector<int64_t> inspect(const Tensor& payload, const Tensor& directory, const Tensor& tables,
                             const OptionalTensor& scales, bool verify) {
  rust::Vec<int64_t> fields;
  check(inspect_packed(payload, directory, tables, or_undefined(scales), verify, fields));
  return {fields.begin(), fields.end()};
}

// One for both: Rust tells them apart.
void implement(torch::Library& m) {
  m.impl("fused_linear", linear);
  m.impl("fused_linear_dx", linear_dx);
  m.impl("fused_linear_ds", linear_ds);
  m.impl("fused_embedding", embedding);
  m.impl("fused_embedding_ds", embedding_ds);
  m.impl("fused_conv", conv);
  m.impl("unpack", dense);
  m.impl("pack_lossless", lossless);
  m.impl("pack_ecsq", ecsq);
  m.impl("pack_int8", int8);
  m.impl("pack_int4", int4);
  m.impl("lay_out", laid_out);
  m.impl("inspect_packed", inspect);
}

TORCH_LIBRARY_IMPL(infold, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(infold, CUDA, m) { implement(m); }

}  // namespace
}  // namespace infold
