// Autocast: activations and bias are cast as for F.linear; the weight and its scales never are.

#include <torch/library.h>

#include "infold/csrc/cast.h"
#include "infold/csrc/packed.h"

namespace infold {
namespace {

template <c10::DispatchKey key, c10::DeviceType device>
Tensor linear(const Tensor& x, const Tensor& payload, const Tensor& directory, const Tensor& tables,
              const OptionalTensor& scales, const OptionalTensor& bias, int64_t codec, int64_t layout,
              int64_t out_features, int64_t in_features, at::ScalarType weight_dtype, bool exact) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return op<FusedLinearOp>().call(cast<device>(x), payload, directory, tables, scales, cast<device>(bias), codec,
                                  layout, out_features, in_features, weight_dtype, exact);
}

template <c10::DispatchKey key, c10::DeviceType device>
Tensor conv(const Tensor& x, const Tensor& payload, const Tensor& directory, const Tensor& tables,
            const OptionalTensor& scales, const OptionalTensor& bias, at::IntArrayRef kernel_size,
            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, int64_t codec,
            int64_t layout, int64_t out_features, int64_t in_features, at::ScalarType weight_dtype, bool exact) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return op<FusedConvOp>().call(cast<device>(x), payload, directory, tables, scales, cast<device>(bias), kernel_size,
                                stride, padding, dilation, groups, codec, layout, out_features, in_features,
                                weight_dtype, exact);
}

TORCH_LIBRARY_IMPL(infold, AutocastCPU, m) {
  m.impl("fused_linear", linear<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
  m.impl("fused_conv", conv<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(infold, AutocastCUDA, m) {
  m.impl("fused_linear", linear<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
  m.impl("fused_conv", conv<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace
}  // namespace infold
