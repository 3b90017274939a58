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
#define __launch_bounds__(...)
#define INFOLD_HOPPER(...) __VA_ARGS__

struct uint2 {
  uint32_t x, y;
};

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

enum class State { kRuns, kWaitsForWarp, kWaitsForBlock, kLooksAgain, kDone };

// As much as any device has, and what the launch asked for.
constexpr unsigned kMaxShared = 227 << 10;
static unsigned shared_bytes;

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

// A copy to shared memory that its thread has not waited for yet.
struct SentQuad {
  uint32_t* target;
  uint4 words;
};
constexpr unsigned kMostSent = 64;

// The block that runs: its kernel, and where each of its threads is.
struct Block {
  void (*kernel)(const void*);
  const void* arguments;
  State states[kMaxThreads];
  Operands operands[kMaxThreads];
  Message messages[kMaxThreads];
  SentQuad sent[kMaxThreads][kMostSent];
  unsigned sent_count[kMaxThreads];
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
  unsigned& count = block.sent_count[threadIdx.x];
  if (reinterpret_cast<uintptr_t>(target) % sizeof words != 0 || count == kMostSent) std::abort();
  block.sent[threadIdx.x][count++] = {target, words};
}

inline void receive() {
  unsigned& count = block.sent_count[threadIdx.x];
  for (unsigned i = 0; i < count; ++i) {
    std::memcpy(block.sent[threadIdx.x][i].target, &block.sent[threadIdx.x][i].words, sizeof(uint4));
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

// What happened that a thread may look for.
static uint64_t events;

inline bool finish_copy();

inline void run_block(unsigned threads, char* stacks) {
  for (unsigned i = 0; i < threads; ++i) {
    block.states[i] = State::kRuns;
    block.messages[i].turns = 0;
    block.sent_count[i] = 0;
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
    const uint64_t before = events;
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned begin = (round % 2 == 0 ? i : warps - 1 - i) * kWarp;
      run_warp(begin, begin + kWarp < threads ? begin + kWarp : threads);
    }
    if (release(0, threads, State::kWaitsForBlock)) continue;
    bool done = true;
    for (unsigned i = 0; i < threads; ++i) {
      if (block.states[i] == State::kLooksAgain) block.states[i] = State::kRuns;
      done &= block.states[i] == State::kDone;
    }
    if (done) return;
    if (events == before && !finish_copy()) {
      std::fprintf(stderr, "a kernel's threads wait for one another\n");
      std::abort();
    }
  }
}

// Whether what is asynchronous happens as late as it may, or at once: every other block.
static bool late;

inline unsigned char* dynamic_shared() {
  alignas(1024) static unsigned char bytes[kMaxShared];
  return bytes;
}

// kernel<<<blocks, threads>>>(parameters)
template <class Parameters, void (*kKernel)(Parameters)>
void launch(unsigned blocks, unsigned threads, unsigned shared, const void* parameters) {
  if (threads > kMaxThreads || shared > kMaxShared) std::abort();
  shared_bytes = shared;
  block.kernel = [](const void* arguments) { kKernel(*static_cast<const Parameters*>(arguments)); };
  block.arguments = parameters;
  gridDim.x = blocks;
  blockDim.x = threads;
  char* stacks = static_cast<char*>(std::malloc(threads * kStack));
  if (stacks == nullptr) std::abort();
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx.x = i;
    late = !late;
    std::memset(dynamic_shared(), 0xff, shared);
    run_block(threads, stacks);
  }
  std::free(stacks);
}

}  // namespace emulation

using emulation::dynamic_shared;

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

inline int uniform(int value) { return value; }

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

inline float from_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 0x1f) return mantissa == 0 ? sign * INFINITY : NAN;
  return exponent == 0 ? sign * std::ldexp(static_cast<float>(mantissa), -24)
                       : sign * std::ldexp(static_cast<float>(mantissa + 0x400), exponent - 25);
}

inline uint16_t to_f16(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(size)) return 0x7fff;
  if (size == 0) return sign;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);
  // Of the last bit: ten below the leading one, but not below the least subnormal.
  const int last = exponent - 11 < -24 ? -24 : exponent - 11;
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -last)));
  // A mantissa that rounds up to the next power of two carries into the exponent by itself.
  return static_cast<uint16_t>(sign | (steps + ((last + 24) << 10)));
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float cosine_of_turns(float turns) { return static_cast<float>(std::cos(2 * M_PI * turns)); }
inline float sine_of_turns(float turns) { return static_cast<float>(std::sin(2 * M_PI * turns)); }

inline float square_root(float value) { return std::sqrt(value); }

inline void prefetch(const void*) {}

inline bool is_nan(float value) { return std::isnan(value); }

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

inline uint32_t transposed(uint32_t pair) {
  using namespace emulation;
  const unsigned place = exchange(pair), row = threadIdx.x % kWarp / 4, col = threadIdx.x % 4 * 2;
  const Message* warp = &block.messages[threadIdx.x / kWarp * kWarp];
  const auto at = [&](unsigned r, unsigned c) { return warp[r * 4 + c / 2].words[place] >> 16 * (c % 2) & 0xffff; };
  return at(col, row) | at(col + 1, row) << 16;
}

inline int first_bit(uint32_t word) { return __builtin_ctz(word); }

inline uint32_t bits_of(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  return word;
}

inline int count_bits(uint32_t word) { return __builtin_popcount(word); }

// A thread runs at a time.
inline void atomic_add(uint32_t* to, uint32_t value) { *to += value; }
inline void atomic_add(unsigned long long* to, uint64_t value) { *to += value; }

namespace emulation {

// The operands of a warp's mma, which its lanes bring together.
struct Together {
  const Operands* warp;

  explicit Together(const Operands& own) : warp(&block.operands[threadIdx.x - threadIdx.x % kWarp]) {
    block.operands[threadIdx.x] = own;
    wait(State::kWaitsForWarp);
  }
  ~Together() { wait(State::kWaitsForWarp); }

  static float half(uint32_t word, unsigned k) { return from_bf16(k % 2 == 0 ? word & 0xffff : word >> 16); }
  float a(unsigned row, unsigned k) const {
    return half(warp[row % 8 * 4 + k % 8 / 2].a[(row < 8 ? 0 : 1) + (k < 8 ? 0 : 2)], k);
  }
  float b(unsigned k, unsigned col) const { return half(warp[col * 4 + k % 8 / 2].b[k < 8 ? 0 : 1], k); }
};

}  // namespace emulation

inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulation::Together operands({{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned lane = threadIdx.x % emulation::kWarp;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + (i < 2 ? 0 : 8), col = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) sums[i] += operands.a(row, k) * operands.b(k, col);
  }
}

struct Barrier {
  uint8_t arrivals, left, phase;
  int32_t bytes;
};

namespace emulation {

// A copy that is on its way.
struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  Barrier* barrier;
};

constexpr unsigned kMaxCopies = 256;
static Copy copies[kMaxCopies];
static unsigned copies_left;

inline void turn(Barrier& barrier) {
  ++events;
  if (barrier.left > 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.left = barrier.arrivals;
}

// The copy that was begun last: they come in any order.
inline bool finish_copy() {
  if (copies_left == 0) return false;
  const Copy copy = copies[--copies_left];
  std::memcpy(copy.to, copy.from, copy.bytes);
  copy.barrier->bytes -= static_cast<int32_t>(copy.bytes);
  turn(*copy.barrier);
  return true;
}

// A product that has begun, of a lane: its two rows of operand A.
struct Product {
  float a[2][16];
  uint64_t b;
  float* sums;
};

constexpr unsigned kMaxProducts = 16;
static Product products[kMaxThreads][kMaxProducts];
static unsigned products_left[kMaxThreads];

// Operand B, by the descriptor: column n, and k of its sixteen.
inline float operand(uint64_t descriptor, unsigned n, unsigned k) {
  const unsigned char* shared = dynamic_shared();
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) std::abort();
  const uint32_t at = start + n / 8 * stride + n % 8 * 128 + 2 * k;
  uint16_t bits;
  std::memcpy(&bits, shared + (at ^ (at >> 3 & 0x70)), sizeof bits);
  return from_bf16(bits);
}

inline void finish(const Product& product) {
  const unsigned lane = threadIdx.x % kWarp;
  for (unsigned i = 0; i < 32; ++i) {
    const unsigned n = i / 4 * 8 + lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) product.sums[i] += product.a[i % 4 / 2][k] * operand(product.b, n, k);
  }
}

}  // namespace emulation

// Where the launch's shared memory begins is address 0.
inline uint64_t swizzled_operand(const void* shared) {
  const ptrdiff_t address = static_cast<const unsigned char*>(shared) - dynamic_shared();
  return operand_descriptor(static_cast<uint32_t>(address));
}

inline void init_barrier(Barrier& barrier, uint32_t arrivals) {
  const auto count = static_cast<uint8_t>(arrivals);
  barrier = {count, count, 0, 0};
}

inline void publish_barriers() {}

inline void arrive(Barrier& barrier) {
  if (barrier.left == 0) std::abort();
  --barrier.left;
  emulation::turn(barrier);
}

inline void expect_bytes(Barrier& barrier, uint32_t bytes) {
  barrier.bytes += static_cast<int32_t>(bytes);
  arrive(barrier);
}

inline void wait_for(Barrier& barrier, int phase) {
  while (barrier.phase == (phase & 1)) emulation::wait(emulation::State::kLooksAgain);
}

inline void copy_async(void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  using namespace emulation;
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16 != 0) std::abort();
  if (static_cast<unsigned char*>(to) + bytes > dynamic_shared() + shared_bytes) std::abort();
  if (copies_left == kMaxCopies) std::abort();
  copies[copies_left++] = {to, from, bytes, &barrier};
  if (!late) finish_copy();
}

template <int kGroups>
void begin_products(float (&)[kGroups][32]) {}

inline void commit_products() {}

inline void multiply_add_async(float (&sums)[32], const uint32_t (&a)[4], uint64_t b) {
  using namespace emulation;
  const Together operands({{a[0], a[1], a[2], a[3]}, {}});
  unsigned& left = products_left[threadIdx.x];
  if (left == kMaxProducts) std::abort();
  Product& product = products[threadIdx.x][left++];
  for (unsigned k = 0; k < 16; ++k) {
    for (unsigned half = 0; half < 2; ++half) product.a[half][k] = operands.a(threadIdx.x % kWarp / 4 + 8 * half, k);
  }
  product.b = b;
  product.sums = sums;
  if (!late) finish(products[threadIdx.x][--left]);
}

template <int kGroups>
void wait_for_products(float (&)[kGroups][32]) {
  using namespace emulation;
  for (unsigned i = 0; i < products_left[threadIdx.x]; ++i) finish(products[threadIdx.x][i]);
  products_left[threadIdx.x] = 0;
}

}  // namespace infold

inline void __syncthreads() { infold::emulation::wait(infold::emulation::State::kWaitsForBlock); }
