// Autocast's dtype.
#pragma once

#include <ATen/autocast_mode.h>

#include "infold/csrc/dispatch.h"

namespace infold {

template <c10::DeviceType device>
Tensor cast(const Tensor& tensor) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

template <c10::DeviceType device>
OptionalTensor cast(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(cast<device>(*tensor)) : tensor;
}

}  // namespace infold
