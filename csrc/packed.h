// The operators on packed weights as the dispatcher knows them. Each takes the weight's tensors (payload, directory,
// tables, scales) and, last, the integers that shapes depend on.
#pragma once

#include "infold/csrc/dispatch.h"

namespace infold {

struct FusedLinearOp {
  static constexpr const char* name = "infold::fused_linear";
  using Signature = Tensor(const Tensor& x, const Tensor& payload, const Tensor& directory, const Tensor& tables,
                           const OptionalTensor& scales, const OptionalTensor& bias, int64_t codec, int64_t layout,
                           int64_t out_features, int64_t in_features, at::ScalarType weight_dtype, bool exact);
};

struct FusedLinearDxOp {
  static constexpr const char* name = "infold::fused_linear_dx";
  using Signature = Tensor(const Tensor& gradient, const Tensor& payload, const Tensor& directory, const Tensor& tables,
                           const OptionalTensor& scales, int64_t codec, int64_t layout, int64_t out_features,
                           int64_t in_features, at::ScalarType weight_dtype, bool exact);
};

struct FusedLinearDsOp {
  static constexpr const char* name = "infold::fused_linear_ds";
  using Signature = Tensor(const Tensor& gradient, const Tensor& x, const Tensor& payload, const Tensor& directory,
                           const Tensor& tables, at::IntArrayRef scale_shape, int64_t codec, int64_t layout,
                           int64_t out_features, int64_t in_features, at::ScalarType weight_dtype);
};

struct FusedEmbeddingOp {
  static constexpr const char* name = "infold::fused_embedding";
  using Signature = Tensor(const Tensor& indices, const Tensor& payload, const Tensor& directory, const Tensor& tables,
                           const OptionalTensor& scales, int64_t codec, int64_t layout, int64_t num_embeddings,
                           int64_t embedding_dim, at::ScalarType weight_dtype);
};

struct FusedEmbeddingDsOp {
  static constexpr const char* name = "infold::fused_embedding_ds";
  using Signature = Tensor(const Tensor& gradient, const Tensor& indices, const Tensor& payload,
                           const Tensor& directory, const Tensor& tables, at::IntArrayRef scale_shape, int64_t codec,
                           int64_t layout, int64_t num_embeddings, int64_t embedding_dim, at::ScalarType weight_dtype);
};

struct FusedConvOp {
  static constexpr const char* name = "infold::fused_conv";
  using Signature = Tensor(const Tensor& x, const Tensor& payload, const Tensor& directory, const Tensor& tables,
                           const OptionalTensor& scales, const OptionalTensor& bias, at::IntArrayRef kernel_size,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                           int64_t codec, int64_t layout, int64_t out_features, int64_t in_features,
                           at::ScalarType weight_dtype, bool exact);
};

struct UnpackOp {
  static constexpr const char* name = "infold::unpack";
  using Signature = Tensor(const Tensor& payload, const Tensor& directory, const Tensor& tables,
                           const OptionalTensor& scales, int64_t codec, int64_t layout, int64_t out_features,
                           int64_t in_features, at::ScalarType weight_dtype);
};

}  // namespace infold
