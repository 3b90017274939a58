// Calling Rust from an operator's kernel.
#pragma once

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "infold/csrc/dispatch.h"
#include "infold/csrc/host.h"
#include "infold/src/bridge.rs.h"

namespace infold {

/// The tensor, or an undefined one.
inline const Tensor& or_undefined(const OptionalTensor& tensor) {
  static const Tensor undefined;
  return tensor.has_value() ? *tensor : undefined;
}

/// The device that has to be current for a tensor's operators.
inline std::optional<at::Device> gpu_of(const Tensor& tensor) {
  return tensor.is_cpu() ? std::nullopt : std::optional(tensor.device());
}

/// Calls Rust with a place for results, rethrows its error, returns its one result.
template <class Call>
Tensor run(const Tensor& tensor, Call&& rust) {
  const c10::OptionalDeviceGuard device(gpu_of(tensor));
  // Autocast has had its say; the library's own products must not ask it again.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Outputs outputs;
  check(rust(outputs));
  return outputs.at(0);
}

}  // namespace infold
