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

// A bit for each lane of the warp, all of which take part; and all lanes together, what they have written included.
__device__ __forceinline__ uint32_t warp_ballot(bool vote) { return __ballot_sync(0xffffffff, vote); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// The value of another lane of the warp, all of which take part.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffff, value, lane);
}

__device__ __forceinline__ int count_bits(uint32_t word) { return __popc(word); }

// Adds to memory that several threads add to.
__device__ __forceinline__ void atomic_add(uint32_t* to, uint32_t value) { atomicAdd(to, value); }
__device__ __forceinline__ void atomic_add(unsigned long long* to, uint64_t value) { atomicAdd(to, value); }

__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }

// Ends the kernel and the context with it, as a failed assertion in PyTorch's own kernels does.
__device__ __forceinline__ void fail() { __trap(); }

}  // namespace infold

#else

#include "emulate.h"

#endif
