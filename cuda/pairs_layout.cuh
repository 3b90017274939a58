// How kernels read the pair prefix table: see pairs.cuh.
#pragma once

#include "layouts.cuh"
#include "pairs.cuh"

namespace infold {

// `kCopies` of the table keep lanes out of each other's banks; `kLevels` tells levels from bfloat16.
template <bool kLevels, int kCopies>
struct PairsLayout {
  static constexpr bool kInRuns = true;
  static constexpr int kSharedWords = 1;
  // Of a block.
  static constexpr int kWarps = 8;
  // An index times the bytes of an entry's copies.
  static constexpr int kShift = kCopies == pairs::kCopies ? 6 : 2;
  static_assert(kCopies << 2 == 1 << kShift, "copies");

  // Signs and mantissas; none of levels.
  using Tile = Quads<kLevels ? 1 : pairs::kRestWords / 4>;

  // A decoded tile, of levels the places of their values.
  struct Decoded {
    uint32_t words[kSteps * kRegisters];
  };

  // Of this warp: a run's words. Then come the table's copies.
  static constexpr int kStreamWords = kWarps * pairs::kRunWords;
  static constexpr int kSharedBytes = sizeof(uint32_t) * (kStreamWords + pairs::kEntries * kCopies);

  uint32_t* shared;
  // The offset of this lane's copy.
  uint32_t copy;
  // All words, and how many quads of them there are.
  const uint32_t* words;
  uint32_t quads;
  // Of the run.
  uint32_t first_quad, end_quad;
  uint32_t upper_bytes[2];
  pairs::Stream<kShift> stream;

  // Fills the table, for all threads of a block.
  __device__ PairsLayout(const InfoldWeight& w, uint32_t* shared) : shared(shared) {
    copy = threadIdx.x % kCopies * sizeof(uint32_t);
    upper_bytes[0] = w.head->upper_bytes[0];
    upper_bytes[1] = w.head->upper_bytes[1];
    // The words begin after the escapes; whatever is said of these, within the payload.
    const uint32_t* payload = reinterpret_cast<const uint32_t*>(w.head);
    const size_t end = w.payload_bytes / sizeof(uint32_t);
    size_t first = reinterpret_cast<const uint32_t*>(w.escapes) - payload;
    first += sizeof(InfoldEscape) / sizeof(uint32_t) * static_cast<size_t>(w.escape_starts[w.rows]);
    first = (first + pairs::kQuadWords - 1) / pairs::kQuadWords * pairs::kQuadWords;
    first = first < end ? first : end;
    words = payload + first;
    quads = static_cast<uint32_t>((end - first) / pairs::kQuadWords);

    const uint32_t* entries = reinterpret_cast<const uint32_t*>(w.values) + (kLevels ? 2 * pairs::kEntries : 0);
    for (int i = threadIdx.x; i < pairs::kEntries * kCopies; i += blockDim.x) {
      shared[kStreamWords + i] = entries[i / kCopies];
    }
    __syncthreads();
  }

  __device__ const unsigned char* table() const { return reinterpret_cast<unsigned char*>(shared + kStreamWords); }

  // This warp's run.
  __device__ uint32_t* run() const { return shared + threadIdx.x / kLanes * pairs::kRunWords; }

  // Goes to a run of a stripe, and says which tiles are its.
  __device__ pairs::Run enter(const InfoldWeight& w, int stripe, int run, int across) {
    const uint32_t* place = w.escape_starts + w.rows + 1 + pairs::run_place(stripe, run, across);
    const uint32_t begin = place[1], end = place[3], last = across;
    first_quad = place[0] < quads ? place[0] : quads;
    end_quad = place[2] < quads ? place[2] : quads;
    return {static_cast<int>(begin < last ? begin : last), static_cast<int>(end < last ? end : last)};
  }

  // Brings a run's words to shared memory; for a warp together.
  __device__ void begin_run() {
    const int count = static_cast<int>(end_quad - first_quad) * pairs::kQuadWords;
    // Nobody reads the last run's any more.
    sync_warp();
#pragma unroll 1
    for (int i = threadIdx.x % kLanes * pairs::kQuadWords; i < count && i < pairs::kRunWords;
         i += kLanes * pairs::kQuadWords) {
      copy_quad(run() + i, words + static_cast<size_t>(first_quad) * pairs::kQuadWords + i);
    }
    wait_for_copies();
    stream.begin(run(), threadIdx.x % kLanes);
  }

  // Before a tile's steps, which come in order.
  __device__ void begin_tile() { stream.begin_tile(run()); }

  __device__ static Tile load(const uint32_t* tiles, size_t tile, int lane) {
    Tile result = {};
    if constexpr (!kLevels) {
#pragma unroll
      for (int quad = 0; quad < pairs::kRestWords / 4; ++quad) {
        result.quads[quad] = load_streaming(tiles + tile * pairs::kTileWords + word_index(lane, 4 * quad));
      }
    }
    return result;
  }

  __device__ Fragment step(const Tile& tile, int step) {
    Fragment result;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t entries[2], offsets[2], registers[2];
      stream.decode(table(), copy, run(), entries, offsets);
      if constexpr (kLevels) {
        registers[0] = pairs::assemble_levels(entries[0], upper_bytes[0], upper_bytes[1]);
        registers[1] = pairs::assemble_levels(entries[1], upper_bytes[0], upper_bytes[1]);
      } else {
        pairs::assemble(tile.word(2 * step + half), entries, registers);
      }
      result.registers[2 * half] = registers[0];
      result.registers[2 * half + 1] = registers[1];
    }
    return result;
  }

  __device__ Decoded decode(const Tile& tile) {
    Decoded result;
    begin_tile();
#pragma unroll
    for (int i = 0; i < kSteps * kRegisters; i += 2) {
      uint32_t entries[2], offsets[2], registers[2];
      stream.decode(table(), copy, run(), entries, offsets);
      if constexpr (!kLevels) pairs::assemble(tile.word(i / 2), entries, registers);
#pragma unroll
      for (int reg = 0; reg < 2; ++reg) result.words[i + reg] = kLevels ? offsets[reg] >> kShift : registers[reg];
    }
    return result;
  }

  __device__ static float filler(const InfoldWeight& w) { return from_bf16(w.head->base); }

  // Two values of a row, before their scale.
  __device__ void values(const Decoded& tile, const InfoldWeight& w, int step, int reg, float (&out)[2]) const {
    const uint32_t word = tile.words[kRegisters * step + reg];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      out[half] = kLevels ? w.values[2 * word + half] : from_bf16(word >> 16 * half & 0xffff);
    }
  }

  __device__ static uint16_t to_bf16(float value) { return kLevels ? infold::to_bf16(value) : upper_half(value); }
};

}  // namespace infold
