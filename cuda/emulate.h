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

// What a lane tells its warp: in two places in turn, so that a lane which is ahead overwrites nothing that another has
// yet to read; and how often it has.
struct Message {
  uint32_t words[2];
  unsigned turns;
};

// The block that runs: its kernel, and where each of its threads is.
struct Block {
  void (*kernel)(const void*);
  const void* arguments;
  State states[kMaxThreads];
  Operands operands[kMaxThreads];
  Message messages[kMaxThreads];
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
    block.messages[i].turns = 0;
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

namespace emulation {

// Tells the warp a word; returns the place where the lanes' words are. Every lane has to take part.
inline unsigned exchange(uint32_t word) {
  Message& own = block.messages[threadIdx.x];
  const unsigned turn = ++own.turns, place = turn % 2;
  own.words[place] = word;
  wait(State::kWaitsForWarp);
  const Message* warp = &block.messages[threadIdx.x / kWarp * kWarp];
  for (unsigned i = 0; i < kWarp; ++i) {
    if (warp[i].turns >= turn) continue;
    std::fprintf(stderr, "a lane takes no part in what its warp does\n");
    std::abort();
  }
  return place;
}

}  // namespace emulation

inline uint32_t warp_ballot(bool vote) {
  using namespace emulation;
  const unsigned place = exchange(vote);
  const Message* warp = &block.messages[threadIdx.x / kWarp * kWarp];
  uint32_t votes = 0;
  for (unsigned i = 0; i < kWarp; ++i) votes |= warp[i].words[place] << i;
  return votes;
}

inline void sync_warp() { emulation::exchange(0); }

template <class T>
T shuffle(T value, int lane) {
  using namespace emulation;
  static_assert(sizeof(T) == sizeof(uint32_t), "a word");
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  const unsigned place = exchange(word);
  std::memcpy(&value, &block.messages[threadIdx.x / kWarp * kWarp + lane].words[place], sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  return word;
}

inline int count_bits(uint32_t word) { return __builtin_popcount(word); }

// A thread runs at a time.
inline void atomic_add(uint32_t* to, uint32_t value) { *to += value; }
inline void atomic_add(unsigned long long* to, uint64_t value) { *to += value; }

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
