// What kernels ask of the device beyond C++. On the host, emulate.h does it.
#pragma once

#include <cstdint>

#include "both.h"

namespace infold {

// The descriptor of an operand in shared memory that is K-major and swizzled by 128 bytes: its address, and the bytes
// from eight columns to the next eight, both in units of 16 bytes. (The other stride has no meaning here.)
INFOLD_BOTH uint64_t operand_descriptor(uint32_t address) {
  constexpr uint64_t kEightColumns = 1024, kSwizzle128 = 1;
  return (address >> 4 & 0x3fff) | uint64_t{1} << 16 | (kEightColumns >> 4) << 32 | kSwizzle128 << 62;
}

}  // namespace infold

#ifdef __CUDACC__

// What only Hopper's own code can do; other architectures' kernels of the same name are never launched.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define INFOLD_HOPPER(...) __VA_ARGS__
#else
#define INFOLD_HOPPER(...) infold::fail()
#endif

namespace infold {

// The shared memory that a launch asks for, at a multiple of 1,024 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return bytes;
}

// Four words that nobody reads again: they shall not push other data out of the cache.
__device__ __forceinline__ uint4 load_streaming(const uint32_t* words) {
  return __ldcs(reinterpret_cast<const uint4*>(words));
}

// Four words, or a half, of an input that stays as it is while the kernel runs.
__device__ __forceinline__ uint4 load_quad(const void* words) { return __ldg(static_cast<const uint4*>(words)); }
__device__ __forceinline__ uint16_t load_half(const uint16_t* half) { return __ldg(half); }

// Sixteen bytes on their way to shared memory, which `wait_for_copies` waits for: a warp for all that its lanes sent.
__device__ __forceinline__ void copy_quad(uint32_t* shared, const uint32_t* words) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(words) : "memory");
}
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}

// A value that is the same in all lanes of a warp, so that the compiler knows.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffff, value, 0); }

// sums += a · b by mma.m16n8k16 in bfloat16, for the warp together.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }

// Rounded to nearest, ties to even.
__device__ __forceinline__ uint16_t to_bf16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ float from_f16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ uint16_t to_f16(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Of an angle in turns.
__device__ __forceinline__ float cosine_of_turns(float turns) { return cospif(2 * turns); }
__device__ __forceinline__ float sine_of_turns(float turns) { return sinpif(2 * turns); }

__device__ __forceinline__ float square_root(float value) { return sqrtf(value); }

// A line on its way to the L2 cache.
__device__ __forceinline__ void prefetch(const void* line) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(line)));
}

__device__ __forceinline__ bool is_nan(float value) { return value != value; }

// The upper half of a float: a bfloat16, where that is what it holds.
__device__ __forceinline__ uint16_t upper_half(float value) { return __float_as_uint(value) >> 16; }

// A bit for each lane of the warp, all of which take part; and all lanes together, what they have written included.
__device__ __forceinline__ uint32_t warp_ballot(bool vote) { return __ballot_sync(0xffffffff, vote); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// The value of another lane of the warp, all of which take part.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffff, value, lane);
}

// An 8 x 8 matrix of halves, a row of which four lanes hold, transposed by the warp together.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// The lowest bit that is set, of some.
__device__ __forceinline__ int first_bit(uint32_t word) { return __ffs(static_cast<int>(word)) - 1; }

__device__ __forceinline__ int count_bits(uint32_t word) { return __popc(word); }

// Adds to memory that several threads add to.
__device__ __forceinline__ void atomic_add(uint32_t* to, uint32_t value) { atomicAdd(to, value); }
__device__ __forceinline__ void atomic_add(unsigned long long* to, uint64_t value) { atomicAdd(to, value); }
// A barrier in shared memory that counts arrivals and the bytes of copies on their way. Its phases are numbered from 0;
// it goes on to the next one when all that was expected has come.
using Barrier = uint64_t;

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void init_barrier(Barrier& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// After barriers are made, before the block meets: what copies sees them.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// An arrival that announces copies.
__device__ __forceinline__ void expect_bytes(Barrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// Until a phase is over, which is this one or the one before it.
__device__ __forceinline__ void wait_for(Barrier& barrier, int phase) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(phase & 1)
      : "memory");
}

// Copies to shared memory; addresses and size are multiples of 16 bytes.
__device__ __forceinline__ void copy_async(void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

// What a warpgroup's mma finds in shared memory: 64 columns of sixteen bfloat16s each, a step of tiles of 128 bytes a
// column that are swizzled by 128 bytes, where eight columns take 1,024 bytes.
__device__ __forceinline__ uint64_t swizzled_operand(const void* shared) {
  return operand_descriptor(shared_address(shared));
}

// Between the decoder's registers and the mma that reads them.
template <int kGroups>
__device__ __forceinline__ void begin_products(float (&sums)[kGroups][32]) {
#pragma unroll
  for (int i = 0; i < kGroups * 32; ++i) asm volatile("" : "+f"(sums[i / 32][i % 32])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all products that were begun are in their sums.
template <int kGroups>
__device__ __forceinline__ void wait_for_products(float (&sums)[kGroups][32]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < kGroups * 32; ++i) asm volatile("" : "+f"(sums[i / 32][i % 32])::"memory");
}

// sums += a · b by wgmma.m64n64k16 in bfloat16, for the warpgroup together, of whose rows each warp has sixteen: `a` is
// as an mma.m16n8k16's, and sums those of eight such side by side.
__device__ __forceinline__ void multiply_add_async(float (&sums)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
      "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, "
      "%35}, %36, 1, 1, 1, 0;"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]), "+f"(sums[4]), "+f"(sums[5]), "+f"(sums[6]),
        "+f"(sums[7]), "+f"(sums[8]), "+f"(sums[9]), "+f"(sums[10]), "+f"(sums[11]), "+f"(sums[12]), "+f"(sums[13]),
        "+f"(sums[14]), "+f"(sums[15]), "+f"(sums[16]), "+f"(sums[17]), "+f"(sums[18]), "+f"(sums[19]), "+f"(sums[20]),
        "+f"(sums[21]), "+f"(sums[22]), "+f"(sums[23]), "+f"(sums[24]), "+f"(sums[25]), "+f"(sums[26]), "+f"(sums[27]),
        "+f"(sums[28]), "+f"(sums[29]), "+f"(sums[30]), "+f"(sums[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }

// Ends the kernel and the context with it, as a failed assertion in PyTorch's own kernels does.
__device__ __forceinline__ void fail() { __trap(); }

}  // namespace infold

#else

#include "emulate.h"

#endif
