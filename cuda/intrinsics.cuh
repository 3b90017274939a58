// What kernels ask of the device beyond C++. On the host, emulate.h does it.
#pragma once

#include <cstdint>

#include "both.h"

#ifdef __CUDACC__

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

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// A value that is the same in all lanes of a warp, so that the compiler knows.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffff, value, 0); }

// Brings the line that a word is in nearer, to the L2 cache.
__device__ __forceinline__ void prefetch(const void* word) { asm volatile("prefetch.global.L2 [%0];" ::"l"(word)); }

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

// The upper half of a float: a bfloat16, where that is what it holds.
__device__ __forceinline__ uint16_t upper_half(float value) { return __float_as_uint(value) >> 16; }

// Ends the kernel and the context with it, as a failed assertion in PyTorch's own kernels does.
__device__ __forceinline__ void fail() { __trap(); }

}  // namespace infold

#else

#include "emulate.h"

#endif
