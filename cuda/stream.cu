// The product of few columns on Hopper: each warp's tiles come as one stream, stripe after stripe, by bulk copies into
// a ring of its own in shared memory, so that memory is never idle while a stripe's sums are added up. A block takes
// every gridDim.xth stripe; all else is as in linear.cu, sums in the same order included.
#include "narrow.cuh"

namespace {

using namespace infold;
using narrow::kWarps;

// Tiles on their way to a warp.
constexpr int kStages = 8;

// A warp's tiles.
template <class Layout>
struct Ring {
  const InfoldWeight& w;
  uint32_t (*slots)[Layout::kTileWords];
  Barrier* full;
  int across;
  // The next tile to be copied, and how many have been copied and taken.
  int stripe, tile;
  int sent = 0, taken = 0;

  // Begins to copy the next tile, if there is one; its slot has to be free.
  __device__ void fetch() {
    if (stripe * kRows >= w.rows) return;
    if (threadIdx.x % kLanes == 0) {
      const size_t index = static_cast<size_t>(stripe) * across + tile;
      const int slot = sent % kStages;
      expect_bytes(full[slot], sizeof slots[0]);
      copy_async(slots[slot], w.tiles + index * Layout::kTileWords, sizeof slots[0], full[slot]);
    }
    ++sent;
    tile += kWarps;
    if (tile >= across) {
      stripe += gridDim.x;
      tile = threadIdx.x / kLanes;
    }
  }

  // The next tile, in registers.
  __device__ typename Layout::Tile take() {
    const int slot = taken % kStages;
    wait_for(full[slot], taken / kStages);
    const typename Layout::Tile result = Layout::template read<FromShared>(slots[slot], threadIdx.x % kLanes);
    ++taken;
    // All lanes have read it.
    sync_warp();
    fetch();
    return result;
  }
};

template <class Layout, int kGroups>
__device__ void stream(const InfoldLinear& p) {
  __shared__ uint32_t table[Layout::kSharedWords];
  __shared__ Barrier full[kWarps][kStages];
  const InfoldWeight& w = p.weight;
  Layout layout(w, table);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWarps * kStages; ++i) init_barrier(full[i / kStages][i % kStages], 1);
    publish_barriers();
  }
  __syncthreads();
  const int warp = threadIdx.x / kLanes, across = (w.cols + kCols - 1) / kCols;
  auto* slots = reinterpret_cast<uint32_t (*)[Layout::kTileWords]>(dynamic_shared()) + warp * kStages;
  // A warp that has no tile in a stripe has none in any.
  const int first = warp < across ? static_cast<int>(blockIdx.x) : w.rows;
  Ring<Layout> ring{w, slots, full[warp], across, first, warp};
  for (int i = 0; i < kStages; ++i) ring.fetch();
  const bool grouped = is_grouped(w);
  for (int stripe = blockIdx.x; stripe * kRows < w.rows; stripe += gridDim.x) {
    narrow::Sums<kGroups> sums;
    for (int tile = warp; tile < across; tile += kWarps) {
      sums.add(p, layout, ring.take(), stripe, tile, grouped);
    }
    if (!grouped) sums.scale(w, stripe, 0);
    narrow::finish<Layout>(p, sums, stripe);
  }
}

}  // namespace

#define INFOLD_KERNEL(name, layout, groups)                                                              \
  extern "C" __global__ void __launch_bounds__(kWarps* kLanes, 2) infold_stream_##name(InfoldLinear p) { \
    INFOLD_HOPPER(stream<layout, groups>(p));                                                            \
  }
#define INFOLD_KERNELS(name, layout) INFOLD_KERNEL(name##_8, layout, 1) INFOLD_KERNEL(name##_16, layout, 2)
INFOLD_FOR_LAYOUTS(INFOLD_KERNELS)
#undef INFOLD_KERNELS
#undef INFOLD_KERNEL
