// The decoders alone, for their rate: each lane decodes its share of the tiles and keeps a digest. `gpu_check.py`
// builds this on the GPU's machine.
#include <cuda_runtime.h>

#include "layouts.cuh"

namespace {

using namespace infold;

template <class Layout>
__device__ void decode(const InfoldWeight& w, uint32_t count, uint32_t* digests) {
  __shared__ uint32_t table[Layout::kSharedWords];
  const Layout layout(w, table);
  const int lane = threadIdx.x % kLanes;
  const uint32_t warp = (blockIdx.x * blockDim.x + threadIdx.x) / kLanes, warps = gridDim.x * blockDim.x / kLanes;
  uint32_t digest = 0;
  for (uint32_t index = warp; index < count; index += warps) {
    const typename Layout::Tile tile = Layout::load(w.tiles, index, lane);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const Fragment a = layout.step(tile, step);
      digest ^= a.registers[0] ^ a.registers[1] ^ a.registers[2] ^ a.registers[3];
    }
  }
  digests[blockIdx.x * blockDim.x + threadIdx.x] = digest;
}

}  // namespace

#define INFOLD_KERNEL(name, layout)                                           \
  extern "C" __global__ void __launch_bounds__(256)                           \
      infold_rate_##name(InfoldWeight w, uint32_t count, uint32_t* digests) { \
    decode<layout>(w, count, digests);                                        \
  }
INFOLD_KERNEL(window, WindowLayout)
INFOLD_KERNEL(codes4, CodesLayout<4>)
INFOLD_KERNEL(codes5, CodesLayout<5>)
INFOLD_KERNEL(codes8, CodesLayout<8>)
#undef INFOLD_KERNEL

// The weight's layout is one of 2 to 5, as in src/cuda/weight.rs.
extern "C" int infold_launch_rate(int layout, const InfoldWeight* weight, uint32_t count, uint32_t* digests, int blocks,
                                  cudaStream_t stream) {
  const auto launch = [&](auto kernel) { kernel<<<blocks, 256, 0, stream>>>(*weight, count, digests); };
  switch (layout) {
    case 2:
      launch(infold_rate_window);
      break;
    case 3:
      launch(infold_rate_codes4);
      break;
    case 4:
      launch(infold_rate_codes5);
      break;
    default:
      launch(infold_rate_codes8);
  }
  return cudaGetLastError();
}
