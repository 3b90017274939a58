// The pair prefix table: neighbours in a row are coded together, by a prefix code of at most ten bits, in a stream of
// bits for each lane. The next ten bits of a stream pick an entry, which holds both weights and the length of their
// code. The streams begin anew with each run of tiles, one behind the other, and a run's are few enough for a warp to
// keep them in shared memory. What has no code is listed apart, and the weight's filler stands in its place.
#pragma once

#include <cstddef>

#include "fragment.cuh"
#include "window.cuh"

namespace infold {
namespace pairs {

constexpr int kIndexBits = 10;
constexpr int kEntries = 1 << kIndexBits;
// Copies of the table, so that lanes seldom meet in a bank.
constexpr int kCopies = 16;

// Words of a lane in a tile, of bfloat16: signs and mantissas, two registers' each, as in a window.
constexpr int kRestWords = window::kRestWords;
constexpr int kTileWords = kLanes * kRestWords;
constexpr uint32_t kRestMask = window::kRestMask;

// Words that come in one load. A run begins with where each lane's stream does, in bits behind these numbers.
constexpr int kQuadWords = 4;
constexpr int kStartWords = kLanes / 2;

// A run's words at most; and its tiles at least, but at a stripe's end: so many always fit.
constexpr int kRunWords = 832;
constexpr int kRunTiles = 5;
constexpr int kTileBits = kLanes * kSteps * kRegisters * kIndexBits;
static_assert(kRunTiles * kTileBits <= 32 * (kRunWords - kStartWords) && kRunWords % kQuadWords == 0, "a run's words");

// Runs of a stripe of `across` tiles at most. The directory has so many places for each stripe and one for the end,
// each of two words: the quad of words and the tile that a run begins with.
INFOLD_BOTH int most_runs(int across) { return (across + kRunTiles - 1) / kRunTiles; }
INFOLD_BOTH size_t run_place(int stripe, int run, int across) {
  return 2 * (static_cast<size_t>(stripe) * (most_runs(across) + 1) + run);
}

// Tiles of a run at most, where its words allow: as many as give eight warps as many runs each. Long runs begin less
// often, short ones divide the work.
INFOLD_BOTH int run_tiles(int across) {
  constexpr int kWarps = 8, kLeast = 8, kMost = 16;
  const int turns = (across + kWarps * kMost - 1) / (kWarps * kMost);
  const int tiles = (across + kWarps * turns - 1) / (kWarps * turns);
  return tiles < kLeast ? kLeast : tiles;
}

// The tiles of a run.
struct Run {
  int begin, end;
};

// The low word of `high:low` shifted right by `count` modulo 32.
INFOLD_BOTH uint32_t shift_right(uint32_t low, uint32_t high, uint32_t count) {
#ifdef __CUDA_ARCH__
  return __funnelshift_r(low, high, count);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (count & 31));
#endif
}

// Four bytes of `high:low`, by a selector's lowest four nibbles, which are below eight where it matters.
INFOLD_BOTH uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef __CUDA_ARCH__
  // What the compiler knows masks the nibbles first.
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
#else
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
#endif
}

// (a & mask) | (b & ~mask), and (bits & mask) | rest: an instruction each, which compilers do not find.
INFOLD_BOTH uint32_t select(uint32_t a, uint32_t b, uint32_t mask) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(result) : "r"(a), "r"(b), "r"(mask));
  return result;
#else
  return (a & mask) | (b & ~mask);
#endif
}
INFOLD_BOTH uint32_t and_or(uint32_t bits, uint32_t mask, uint32_t rest) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(bits), "r"(mask), "r"(rest));
  return result;
#else
  return (bits & mask) | rest;
#endif
}

// An entry's code takes its lowest five bits, which is all that a shift reads. Of bfloat16 the exponents lie where they
// belong in a register, in bits 7 to 14 and 23 to 30.
INFOLD_BOTH uint32_t exponent_entry(uint32_t first, uint32_t second, uint32_t length) {
  return length | first << 7 | second << 23;
}

// Registers of bfloat16 from two entries and a word of signs and mantissas; a window's words are like these.
INFOLD_BOTH void assemble(uint32_t rest, const uint32_t (&entries)[2], uint32_t (&registers)[2]) {
  registers[0] = select(rest, entries[0], kRestMask);
  registers[1] = select(window::rotate_right_8(rest), entries[1], kRestMask);
}

// Puts a sign and a mantissa into a lane's words, which were zero.
INFOLD_BOTH void put_rest(uint32_t bits, int step, int reg, int half, uint32_t (&words)[kRestWords]) {
  const uint32_t rest = (bits & 0x807f) << 16 * half;
  words[2 * step + reg / 2] |= reg % 2 == 0 ? rest : rest << 8 | rest >> 24;
}

// Of levels an entry has the lower bytes of both values, as bfloat16, in its upper half; which of the weight's eight
// upper bytes they have, in two nibbles; and the length. So any values are exact that have only so many upper bytes.
INFOLD_BOTH uint32_t level_entry(uint32_t first, uint32_t second, uint32_t uppers, uint32_t length) {
  return length | uppers << 8 | (first & 0xff) << 16 | (second & 0xff) << 24;
}

// The register of two levels. The selector's lower nibbles, which are the length, pick bytes that nobody takes.
INFOLD_BOTH uint32_t assemble_levels(uint32_t entry, uint32_t low_uppers, uint32_t high_uppers) {
  return pick_bytes(entry, pick_bytes(low_uppers, high_uppers, entry), 0x7362);
}

// Where in a lane's stream its decoder is: the next bits are `next:current` from `position` on, whose lower five bits
// alone count, but for `kShift` of them, which make an index an offset into a table of so wide entries. `ahead` is a
// word that nobody waits for.
template <int kShift>
struct Stream {
  static constexpr uint32_t kMask = (kEntries - 1) << kShift;
  uint32_t current, next, ahead, position;
  // Of the word after `ahead`, in bytes: on the device its address in shared memory, else its place in the run.
  uint32_t place;

  INFOLD_BOTH static uint32_t address(const uint32_t* run) {
#ifdef __CUDA_ARCH__
    return static_cast<uint32_t>(__cvta_generic_to_shared(run));
#else
    return static_cast<void>(run), 0;
#endif
  }

  // From where a lane's stream of a run begins, or before the run's end whatever is said of it.
  INFOLD_BOTH void begin(const uint32_t* run, int lane) {
    const uint32_t start = reinterpret_cast<const uint16_t*>(run)[lane];
    const uint32_t from = (start < 32 * kRunWords ? start : 32 * kRunWords) + 32 - kShift;
    const uint32_t word = kStartWords - 1 + from / 32;
    current = run[word];
    next = run[word + 1];
    ahead = run[word + 2];
    place = address(run) + (word + 3) * sizeof(uint32_t);
    position = from % 32;
  }

  // Whatever the bits are: a tile reads no farther than kBehind words behind the run's.
  static constexpr int kBehind = 32;
  INFOLD_BOTH void begin_tile(const uint32_t* run) {
    const uint32_t last = address(run) + (kRunWords + kBehind - kSteps * kRegisters / 2) * sizeof(uint32_t);
    place = place < last ? place : last;
  }

  // The entries of the next two codes, and their offsets in the table, to which `copy`, this lane's copy, belongs.
  INFOLD_BOTH void decode(const unsigned char* table, uint32_t copy, const uint32_t* run, uint32_t (&entries)[2],
                          uint32_t (&offsets)[2]) {
    uint32_t bits = shift_right(current, next, position);
    offsets[0] = and_or(bits, kMask, copy);
    entries[0] = *reinterpret_cast<const uint32_t*>(table + offsets[0]);
    bits = shift_right(bits, 0, entries[0]);
    offsets[1] = and_or(bits, kMask, copy);
    entries[1] = *reinterpret_cast<const uint32_t*>(table + offsets[1]);
    position += entries[0] + entries[1];
    refill(run);
  }

  // Goes on to the next word where the position has passed one: by predicates, for lanes differ.
  INFOLD_BOTH void refill(const uint32_t* run) {
#ifdef __CUDA_ARCH__
    asm volatile(
        "{\n"
        ".reg .pred passed;\n"
        ".reg .b32 bit;\n"
        "and.b32 bit, %0, 32;\n"
        "setp.ne.u32 passed, bit, 0;\n"
        "@passed xor.b32 %0, %0, 32;\n"
        "@passed mov.b32 %1, %2;\n"
        "@passed mov.b32 %2, %3;\n"
        "@passed ld.shared.b32 %3, [%4];\n"
        "@passed add.u32 %4, %4, %5;\n"
        "}"
        : "+r"(position), "+r"(current), "+r"(next), "+r"(ahead), "+r"(place)
        : "n"(sizeof(uint32_t)));
#else
    if ((position & 32) == 0) return;
    position ^= 32;
    current = next;
    next = ahead;
    ahead = run[place / sizeof(uint32_t)];
    place += sizeof(uint32_t);
#endif
  }
};

}  // namespace pairs
}  // namespace infold
