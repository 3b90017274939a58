// Weights on disk (src/tier), and tensors whose storage comes and goes.

#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include "infold/csrc/dispatch.h"
#include "infold/csrc/host.h"
#include "infold/src/bridge.rs.h"

namespace infold {
namespace {

/// Bytes that every buffer's address is a multiple of, as PyTorch's own allocator has it.
constexpr std::size_t kAlignment = 64;

int64_t open(const std::string& folder, int64_t nbytes, int64_t depth, const std::string& backend) {
  int64_t store = 0;
  check(tier_open(folder, nbytes, depth, backend, store));
  return store;
}

int64_t reserve(int64_t store, int64_t nbytes) {
  int64_t offset = 0;
  check(tier_reserve(store, nbytes, offset));
  return offset;
}

int64_t read(int64_t store, int64_t offset, const Tensor& out) {
  int64_t ticket = 0;
  check(tier_read(store, offset, out, ticket));
  return ticket;
}

int64_t write(int64_t store, int64_t offset, const Tensor& data) {
  int64_t ticket = 0;
  check(tier_write(store, offset, data, ticket));
  return ticket;
}

void wait(int64_t store, int64_t ticket) { check(tier_wait(store, ticket)); }

bool done(int64_t store, int64_t ticket) {
  bool finished = false;
  check(tier_done(store, ticket, finished));
  return finished;
}

void close(int64_t store) { check(tier_close(store)); }

std::vector<int64_t> stats(int64_t store) {
  rust::Vec<int64_t> fields;
  check(tier_stats(store, fields));
  return {fields.begin(), fields.end()};
}

/// Points the tensor's storage, and so every view of it, to `memory`, which it then holds; or to nothing.
void bind(const Tensor& tensor, const OptionalTensor& memory) {
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  if (!memory.has_value()) {
    storage->set_data_ptr_noswap(at::DataPtr(nullptr, storage->device()));
    storage->set_nbytes(0);
    return;
  }
  TORCH_CHECK_VALUE(memory->scalar_type() == at::kByte && memory->is_contiguous(),
                    "memory: expected a contiguous uint8 tensor, got ", memory->scalar_type(), " of sizes ",
                    memory->sizes(), " and strides ", memory->strides());
  TORCH_CHECK_VALUE(memory->device() == storage->device(), "memory: expected device ", storage->device(), ", got ",
                    memory->device());
  TORCH_CHECK_VALUE(!memory->is_alias_of(tensor), "memory: expected a storage of its own, got the tensor's");
  const auto bytes = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize(),
                                                      static_cast<std::size_t>(tensor.storage_offset()));
  TORCH_CHECK_VALUE(memory->nbytes() >= bytes, "memory: expected at least ", bytes, " bytes, got ", memory->nbytes());
  void* address = memory->mutable_data_ptr();
  TORCH_CHECK_VALUE(reinterpret_cast<std::uintptr_t>(address) % kAlignment == 0,
                    "memory: expected an address that is a multiple of ", kAlignment, ", got ", address);
  const auto drop = [](void* held) { delete static_cast<Tensor*>(held); };
  at::DataPtr pointer(address, new Tensor(*memory), drop, storage->device());
  storage->set_data_ptr_noswap(std::move(pointer));
  storage->set_nbytes(memory->nbytes());
}

// One for every backend, and for calls without tensors.
TORCH_LIBRARY_IMPL(infold, CompositeExplicitAutograd, m) {
  m.impl("tier_open", open);
  m.impl("tier_reserve", reserve);
  m.impl("tier_read", read);
  m.impl("tier_write", write);
  m.impl("tier_wait", wait);
  m.impl("tier_done", done);
  m.impl("tier_close", close);
  m.impl("tier_stats", stats);
  m.impl("tier_bind", bind);
}

}  // namespace
}  // namespace infold
