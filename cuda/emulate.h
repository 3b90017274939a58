// Kernels on the host, for the tests: every thread of a block is a fiber of this thread, which runs until the block or
// its warp has to meet. Threads that wait for one another in vain are found out. The mma is written by the PTX manual's
// tables of operands. One kernel at a time: what a block shares is static.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
// A block runs at a time.
#define __shared__ static
#define __launch_bounds__(threads)

struct uint4 {
  uint32_t x, y, z, w;
};

struct Index {
  unsigned x = 0;
};

static Index threadIdx, blockIdx, blockDim, gridDim;

namespace infold {
namespace emulation {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStack = 64 << 10;

enum class State { kRuns, kWaitsForWarp, kWaitsForBlock, kDone };

// What a lane brings to an mma.
struct Operands {
  uint32_t a[4], b[2];
};

// A copy to shared memory that nobody has waited for yet.
struct Copy {
  uint32_t* target;
  uint4 words;
};
constexpr unsigned kMostCopies = 64;

// The block that runs: its kernel, and where each of its threads is.
struct Block {
  void (*kernel)(const void*);
  const void* arguments;
  State states[kMaxThreads];
  Operands operands[kMaxThreads];
  Copy copies[kMaxThreads][kMostCopies];
  unsigned copying[kMaxThreads];
  ucontext_t fibers[kMaxThreads];
  ucontext_t scheduler;
};

static Block block;

inline void wait(State state) {
  const unsigned thread = threadIdx.x;
  block.states[thread] = state;
  swapcontext(&block.fibers[thread], &block.scheduler);
}

inline void enter() {
  block.kernel(block.arguments);
  wait(State::kDone);
}

// Sends words on their way to shared memory, and lets those arrive that the running thread sent.
inline void send(uint32_t* target, const uint4& words) {
  unsigned& count = block.copying[threadIdx.x];
  if (reinterpret_cast<uintptr_t>(target) % sizeof words != 0 || count == kMostCopies) std::abort();
  block.copies[threadIdx.x][count++] = {target, words};
}

inline void receive() {
  unsigned& count = block.copying[threadIdx.x];
  for (unsigned i = 0; i < count; ++i) {
    std::memcpy(block.copies[threadIdx.x][i].target, &block.copies[threadIdx.x][i].words, sizeof(uint4));
  }
  count = 0;
}

// Lets the threads of [begin, end) go on if all that are left wait for this; returns whether it did.
inline bool release(unsigned begin, unsigned end, State state) {
  bool any = false;
  for (unsigned i = begin; i < end; ++i) {
    if (block.states[i] != state && block.states[i] != State::kDone) return false;
    any |= block.states[i] == state;
  }
  for (unsigned i = begin; i < end; ++i) {
    if (block.states[i] == state) block.states[i] = State::kRuns;
  }
  return any;
}

// Runs a warp's threads until all of them wait for the block or have ended.
inline void run_warp(unsigned begin, unsigned end) {
  do {
    for (unsigned i = begin; i < end; ++i) {
      if (block.states[i] != State::kRuns) continue;
      threadIdx.x = i;
      swapcontext(&block.scheduler, &block.fibers[i]);
    }
  } while (release(begin, end, State::kWaitsForWarp));
}

inline void run_block(unsigned threads, char* stacks) {
  for (unsigned i = 0; i < threads; ++i) {
    block.states[i] = State::kRuns;
    block.copying[i] = 0;
    getcontext(&block.fibers[i]);
    block.fibers[i].uc_stack.ss_sp = stacks + i * kStack;
    block.fibers[i].uc_stack.ss_size = kStack;
    block.fibers[i].uc_link = nullptr;
    makecontext(&block.fibers[i], enter, 0);
  }
  // A warp at a time, as far as it comes, now the first one first and now the last: where a barrier is missing, one
  // warp overtakes another.
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  for (unsigned round = 0;; ++round) {
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned begin = (round % 2 == 0 ? i : warps - 1 - i) * kWarp;
      run_warp(begin, begin + kWarp < threads ? begin + kWarp : threads);
    }
    if (release(0, threads, State::kWaitsForBlock)) continue;
    for (unsigned i = 0; i < threads; ++i) {
      if (block.states[i] == State::kDone) continue;
      std::fprintf(stderr, "a kernel's threads wait for one another\n");
      std::abort();
    }
    return;
  }
}

// kernel<<<blocks, threads>>>(parameters)
template <class Parameters, void (*kKernel)(Parameters)>
void launch(unsigned blocks, unsigned threads, const void* parameters) {
  if (threads > kMaxThreads) std::abort();
  block.kernel = [](const void* arguments) { kKernel(*static_cast<const Parameters*>(arguments)); };
  block.arguments = parameters;
  gridDim.x = blocks;
  blockDim.x = threads;
  char* stacks = static_cast<char*>(std::malloc(threads * kStack));
  if (stacks == nullptr) std::abort();
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx.x = i;
    run_block(threads, stacks);
  }
  std::free(stacks);
}

}  // namespace emulation

// As much as any device has.
inline unsigned char* dynamic_shared() {
  alignas(1024) static unsigned char bytes[227 << 10];
  return bytes;
}

inline uint4 load_streaming(const uint32_t* words) { return {words[0], words[1], words[2], words[3]}; }

inline uint4 load_quad(const void* words) {
  // As on the device, where such a load has to be aligned.
  if (reinterpret_cast<uintptr_t>(words) % 16 != 0) std::abort();
  return load_streaming(static_cast<const uint32_t*>(words));
}

// Copies arrive when they are waited for, as they may on the device.
inline void copy_quad(uint32_t* shared, const uint32_t* words) { emulation::send(shared, load_quad(words)); }

inline void wait_for_copies() {
  emulation::receive();
  emulation::wait(emulation::State::kWaitsForWarp);
}

inline void sync_warp() { emulation::wait(emulation::State::kWaitsForWarp); }

inline int uniform(int value) { return value; }

inline void prefetch(const void*) {}

inline uint16_t load_half(const uint16_t* half) { return *half; }

inline float from_bf16(uint32_t bits) {
  const uint32_t word = bits << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline uint16_t to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline uint16_t upper_half(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  return static_cast<uint16_t>(word >> 16);
}

inline void fail() { std::abort(); }

inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulation;
  const unsigned lane = threadIdx.x % kWarp;
  Operands* warp = &block.operands[threadIdx.x - lane];
  warp[lane] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  wait(State::kWaitsForWarp);
  const auto half = [](uint32_t word, unsigned k) { return from_bf16(k % 2 == 0 ? word & 0xffff : word >> 16); };
  const auto a_at = [&](unsigned row, unsigned k) {
    return half(warp[row % 8 * 4 + k % 8 / 2].a[(row < 8 ? 0 : 1) + (k < 8 ? 0 : 2)], k);
  };
  const auto b_at = [&](unsigned k, unsigned col) { return half(warp[col * 4 + k % 8 / 2].b[k < 8 ? 0 : 1], k); };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + (i < 2 ? 0 : 8), col = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) sums[i] += a_at(row, k) * b_at(k, col);
  }
  wait(State::kWaitsForWarp);
}

}  // namespace infold

inline void __syncthreads() { infold::emulation::wait(infold::emulation::State::kWaitsForBlock); }
