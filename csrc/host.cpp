#include "infold/csrc/host.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include "infold/src/bridge.rs.h"

namespace infold {

void push_output(Outputs& outputs, const at::Tensor& tensor) { outputs.push_back(tensor); }

void parallel_for(std::size_t items, const Body& body) {
  at::parallel_for(0, static_cast<int64_t>(items), 1, [&body](int64_t begin, int64_t end) {
    run_body(body, static_cast<std::size_t>(begin), static_cast<std::size_t>(end));
  });
}

std::size_t current_stream(const at::Tensor& tensor) {
  // By way of c10, which every build of PyTorch has: no CUDA library is needed to load this one.
  const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
  return reinterpret_cast<std::size_t>(guard.getStreamNativeHandle(guard.getStream(tensor.device())));
}

void check(const Status& status) {
  TORCH_CHECK_VALUE(status.kind != 1, std::string(status.message));
  TORCH_CHECK(status.kind == 0, std::string(status.message));
}

}  // namespace infold
