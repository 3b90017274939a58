// The decoder alone behind a C interface, for `gpu_check.py`, which builds this on the GPU's machine.
#include <cuda_runtime.h>

#include "linear_window.cu"

extern "C" int infold_launch_window_rate(const uint32_t* tiles, uint32_t count, uint32_t base, uint32_t* digests,
                                         int blocks, cudaStream_t stream) {
  infold_window_rate<<<blocks, kWarps * kLanes, 0, stream>>>(tiles, count, base, digests);
  return cudaGetLastError();
}
