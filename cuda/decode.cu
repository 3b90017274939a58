// From the canonical form to codes, a row after the other: a warp for each stream of a tile, whose lanes are rows. A
// block of 64 columns goes through shared memory, where escapes are put in their places, and leaves it row by row.
#include "decode.cuh"
#include "intrinsics.cuh"

namespace {

using namespace infold;
using namespace infold::canonical;

constexpr int kWarps = 4;
// From a column of a block to the next one: rows and columns both are in different banks.
constexpr int kStride = kGroup + 1;

// The number of the lowest bit that is set.
__device__ int lowest(uint32_t word) { return count_bits(~word & (word - 1)); }

// Plain bits: any block can be read first.
struct PlainCoder {
  __device__ PlainCoder(const InfoldDecode&, const Payload&, const Stream&, int, int) {}

  __device__ void decode(const InfoldDecode& p, const Payload& payload, const Stream& stream, const Tile& tile,
                         const Block& block, int lane, int32_t* values) {
    const InfoldPlane& plane = p.own;
    const uint64_t start = stream.states + plain_start(tile, block, plane.width);
    const int step = step_bytes(block.lanes, plane.width);
    if (lane >= block.lanes) return;
    for (int col = 0; col < block.cols; ++col) {
      const uint32_t symbol = plain_symbol(payload, start + static_cast<uint64_t>(col) * step, lane, plane.width);
      values[col * kStride + lane] = plane.lo + symbol;
    }
  }
};

// rANS: the lanes that need a word take the next ones in their order.
template <class Lane>
struct LaneCoder {
  Lane coder;
  // The next word.
  uint64_t at;

  __device__ LaneCoder(const InfoldDecode&, const Payload& payload, const Stream& stream, int lane, int lanes)
      : coder{lane < lanes ? payload.word<Lane::kStateBytes>(stream.states + lane * Lane::kStateBytes) : 0},
        at(stream.words) {}

  __device__ void decode(const InfoldDecode& p, const Payload& payload, const Stream&, const Tile&, const Block& block,
                         int lane, int32_t* values) {
    const int32_t lo = p.own.lo;
    const bool is_there = lane < block.lanes;
    for (int col = 0; col < block.cols; ++col) {
      uint32_t symbol = 0;
      const bool short_of = is_there && coder.step(p.slots, symbol);
      const uint32_t takers = warp_ballot(short_of);
      if (short_of) {
        const int before = count_bits(takers & ((1u << lane) - 1));
        coder.refill(payload.word<Lane::kWord>(at + before * Lane::kWord));
      }
      at += count_bits(takers) * Lane::kWord;
      if (is_there) values[col * kStride + lane] = lo + symbol;
    }
  }
};

// A plane's escapes in a tile, in the order of blocks, from the next one on.
struct Escapes {
  uint64_t at;
  uint32_t count, next;

  __device__ uint32_t position(const Payload& payload, uint32_t index) const {
    return payload.word<4>(at + uint64_t{index} * kEscapeBytes);
  }
  __device__ uint32_t value(const Payload& payload, uint32_t index) const {
    return payload.word<4>(at + uint64_t{index} * kEscapeBytes + 4);
  }

  // Those before the first one that lies in a block before its predecessor's: a reader who goes from block to block
  // never comes to the others. One that lies in no block is never reached, and comes after all blocks.
  __device__ Escapes(const Payload& payload, const Stream& stream, const Tile& tile, int lane)
      : at(stream.escapes), count(stream.escape_count), next(0) {
    for (uint32_t first = 0; first < count; first += kGroup) {
      const uint32_t index = first + lane;
      bool is_lost = false;
      if (index < count) {
        const uint32_t block = tile.block_of(position(payload, index));
        const uint32_t before = index == 0 ? 0 : tile.block_of(position(payload, index - 1));
        is_lost = block < before;
      }
      const uint32_t lost = warp_ballot(is_lost);
      if (lost != 0) {
        count = first + lowest(lost);
        break;
      }
    }
  }

  // Puts those of a block in their places, in their order.
  __device__ void patch(const Payload& payload, const Tile& tile, uint32_t index, const Block& block, bool is_any,
                        int32_t lo, int lane, int32_t* values) {
    for (bool all = true; all && next < count;) {
      const uint32_t own = next + lane;
      const uint32_t at = own < count ? position(payload, own) : 0;
      const uint32_t found = own < count ? tile.block_of(at) : kNoBlock;
      const uint32_t passed = warp_ballot(found <= index);
      for (uint32_t here = warp_ballot(found == index); here != 0; here &= here - 1) {
        if (lane == lowest(here)) {
          const int row = at & ((1 << kEscapeRowBits) - 1), col = static_cast<int>(at >> kEscapeRowBits);
          values[(col - block.col) * kStride + row - block.row] = escaped(is_any, lo, value(payload, own));
        }
        sync_warp();
      }
      next += count_bits(passed);
      all = passed == ~0u;
    }
  }
};

struct Bf16 {
  using Code = uint16_t;
  static constexpr bool kFirstHoldsAny = false;
  __device__ static uint32_t place(const InfoldDecode& p, uint32_t value) { return place_bf16(p.plane, value); }
};

struct Level {
  using Code = uint32_t;
  static constexpr bool kFirstHoldsAny = true;
  __device__ static uint32_t place(const InfoldDecode& p, uint32_t value) {
    return place_level(p.plane, p.low_bits, value);
  }
};

// Writes a block's values to the codes of its rows.
template <class Element>
__device__ void store(const InfoldDecode& p, const Block& block, size_t first_row, int lane, const int32_t* values) {
  for (int row = 0; row < block.lanes; ++row) {
    typename Element::Code* out =
        static_cast<typename Element::Code*>(p.codes) + (first_row + block.row + row) * p.cols + block.col;
    for (int col = lane; col < block.cols; col += kGroup) {
      const uint32_t code = Element::place(p, values[col * kStride + row]);
      out[col] = p.plane == 0 ? code : out[col] | code;
    }
  }
}

template <class Coder, class Element>
__device__ void decode(const InfoldDecode& p) {
  __shared__ int32_t shared[kWarps][kChunk * kStride];
  const int lane = threadIdx.x % kGroup, warp = threadIdx.x / kGroup;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const int index = static_cast<int>(task / p.workers), worker = static_cast<int>(task % p.workers);
  const int tiles = (p.rows + p.tile_rows - 1) / p.tile_rows;
  if (index >= tiles) return;
  const size_t first_row = static_cast<size_t>(index) * p.tile_rows;
  const int rows = p.rows - static_cast<int>(first_row);
  const Tile tile = {rows < p.tile_rows ? rows : p.tile_rows, p.cols};
  const Payload payload = {p.payload, p.payload_bytes};

  Rest rest = open(payload, p.directory, index, tiles);
  take_plane(rest, payload, p.before, tile, 0);
  const Stream stream = take_plane(rest, payload, p.own, tile, worker);
  if (!rest.fits) {
    if (lane == 0) *p.damage = 1;
    return;
  }
  int32_t* values = shared[warp];
  Coder coder(p, payload, stream, lane, tile.lanes());
  Escapes escapes(payload, stream, tile, lane);
  for (int i = worker; i < tile.blocks(); i += p.workers) {
    const Block block = tile.block(i);
    coder.decode(p, payload, stream, tile, block, lane, values);
    sync_warp();
    const bool is_any = Element::kFirstHoldsAny && p.plane == 0;
    escapes.patch(payload, tile, i, block, is_any, p.own.lo, lane, values);
    store<Element>(p, block, first_row, lane, values);
    sync_warp();
  }
}

}  // namespace

#define INFOLD_KERNEL(name, coder, element)                                                           \
  extern "C" __global__ void __launch_bounds__(kWarps* kGroup) infold_decode_##name(InfoldDecode p) { \
    decode<coder, element>(p);                                                                        \
  }
INFOLD_KERNEL(plain_bf16, PlainCoder, Bf16)
INFOLD_KERNEL(rans_bf16, LaneCoder<RansLane>, Bf16)
INFOLD_KERNEL(alias_bf16, LaneCoder<AliasLane>, Bf16)
INFOLD_KERNEL(plain_levels, PlainCoder, Level)
INFOLD_KERNEL(rans_levels, LaneCoder<RansLane>, Level)
INFOLD_KERNEL(alias_levels, LaneCoder<AliasLane>, Level)
#undef INFOLD_KERNEL
