// The decoders alone, for their rate: each lane decodes its share of the tiles and keeps a digest. `gpu_check.py`
// builds this on the GPU's machine.
#include <cuda_runtime.h>

#include "pairs_layout.cuh"

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

// The same of layouts whose tiles come in runs.
template <class Layout>
__device__ void decode_runs(const InfoldWeight& w, uint32_t* digests) {
  Layout layout(w, reinterpret_cast<uint32_t*>(dynamic_shared()));
  const int lane = threadIdx.x % kLanes;
  const int across = (w.cols + kCols - 1) / kCols, runs = pairs::most_runs(across);
  const int stripes = (w.rows + kRows - 1) / kRows;
  const int warps = gridDim.x * blockDim.x / kLanes;
  uint32_t digest = 0;
  for (int index = uniform((blockIdx.x * blockDim.x + threadIdx.x) / kLanes); index < stripes * runs; index += warps) {
    const int stripe = index / runs;
    const pairs::Run tiles = layout.enter(w, stripe, index % runs, across);
    layout.begin_run();
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
      const typename Layout::Tile rests = Layout::load(w.tiles, static_cast<size_t>(stripe) * across + tile, lane);
      layout.begin_tile();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const Fragment a = layout.step(rests, step);
        digest ^= a.registers[0] ^ a.registers[1] ^ a.registers[2] ^ a.registers[3];
      }
    }
  }
  digests[blockIdx.x * blockDim.x + threadIdx.x] = digest;
}

using Pairs = PairsLayout<false, pairs::kCopies>;
using PairsOfLevels = PairsLayout<true, pairs::kCopies>;

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
#define INFOLD_KERNEL(name, layout)                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) infold_rate_##name(InfoldWeight w, uint32_t, uint32_t* digests) { \
    decode_runs<layout>(w, digests);                                                                                  \
  }
INFOLD_KERNEL(pairs, Pairs)
INFOLD_KERNEL(pairs_of_levels, PairsOfLevels)
#undef INFOLD_KERNEL

// The weight's layout is one of 2 to 7, as in src/cuda/weight.rs.
extern "C" int infold_launch_rate(int layout, const InfoldWeight* weight, uint32_t count, uint32_t* digests, int blocks,
                                  cudaStream_t stream) {
  const auto launch = [&](auto kernel, int shared = 0) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    kernel<<<blocks, 256, shared, stream>>>(*weight, count, digests);
  };
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
    case 5:
      launch(infold_rate_codes8);
      break;
    case 6:
      launch(infold_rate_pairs, Pairs::kSharedBytes);
      break;
    default:
      launch(infold_rate_pairs_of_levels, PairsOfLevels::kSharedBytes);
  }
  return cudaGetLastError();
}
