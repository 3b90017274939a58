// Autocast: activations and bias are cast as for F.linear; the weight and its scales never are.

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "infold/csrc/packed.h"

namespace infold {
namespace {

template <c10::DispatchKey key, c10::DeviceType device>
Tensor linear(const Tensor& x, const Tensor& payload, const Tensor& directory, const Tensor& tables,
              const OptionalTensor& scales, const OptionalTensor& bias, int64_t codec, int64_t layout,
              int64_t out_features, int64_t in_features, at::ScalarType weight_dtype, bool exact) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& tensor) { return at::autocast::cached_cast(dtype, tensor, device); };
  return op<FusedLinearOp>().call(cast(x), payload, directory, tables, scales,
                                  bias.has_value() ? OptionalTensor(cast(*bias)) : bias, codec, layout, out_features,
                                  in_features, weight_dtype, exact);
}

TORCH_LIBRARY_IMPL(infold, AutocastCPU, m) {
  m.impl("fused_linear", linear<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(infold, AutocastCUDA, m) {
  m.impl("fused_linear", linear<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace
}  // namespace infold
