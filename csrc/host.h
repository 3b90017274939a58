// What Rust and C++ share: tensors going out, a parallel loop coming in, errors.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <vector>

namespace infold {

struct Body;
struct Status;

/// The tensors that a Rust call returns.
using Outputs = std::vector<at::Tensor>;

void push_output(Outputs& outputs, const at::Tensor& tensor);

/// Runs a Rust loop body over [0, items) on PyTorch's intra-op threads.
void parallel_for(std::size_t items, const Body& body);

/// PyTorch's current stream of a CUDA tensor's device, as the driver names it.
std::size_t current_stream(const at::Tensor& tensor);

/// Throws what a Rust call ended with: ValueError for a wrong argument, RuntimeError otherwise.
void check(const Status& status);

}  // namespace infold
