// Coding pairs on the host, and decoding them, by the device's own functions. A stripe at a time: sixteen rows, whose
// ends are padded to whole tiles.
#include <cstddef>
#include <cstdint>

#include "pairs.cuh"

using namespace infold;
using namespace infold::pairs;

namespace {

// Calls `visit(step, reg, row, col)` for each pair of a lane in a tile, in the order of its stream: the weights at
// `col` and beside it.
template <class Visit>
void for_pairs(int lane, int tile, const Visit& visit) {
  for (int step = 0; step < kSteps; ++step) {
    for (int reg = 0; reg < kRegisters; ++reg) {
      visit(step, reg, row_of(lane, reg), tile * kCols + col_of(lane, step, reg, 0));
    }
  }
}

// A pair's code: its length in the upper half, the bits in the lower, the first of them lowest.
uint32_t length_of(uint32_t code) { return code >> 16; }

uint32_t code_of(const uint8_t* symbols, int width, const uint32_t* codes, int row, int col) {
  const uint8_t* pair = symbols + static_cast<size_t>(row) * width + col;
  return codes[pair[0] << 8 | pair[1]];
}

// Quads of words that a run takes.
int quads_of(const uint8_t* symbols, int width, const uint32_t* codes, Run run) {
  uint32_t bits = 32 * kStartWords;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int tile = run.begin; tile < run.end; ++tile) {
      for_pairs(lane, tile,
                [&](int, int, int row, int col) { bits += length_of(code_of(symbols, width, codes, row, col)); });
    }
  }
  return static_cast<int>((bits + 32 * kQuadWords - 1) / (32 * kQuadWords));
}

// Writes a run's streams, and where they begin, to words that were zero.
void encode_run(const uint8_t* symbols, int width, const uint32_t* codes, Run run, uint32_t* words) {
  uint32_t bit = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    words[lane / 2] |= bit << 16 * (lane % 2);
    for (int tile = run.begin; tile < run.end; ++tile) {
      for_pairs(lane, tile, [&](int, int, int row, int col) {
        const uint32_t code = code_of(symbols, width, codes, row, col);
        const uint64_t bits = static_cast<uint64_t>(code & 0xffff) << bit % 32;
        uint32_t* at = words + kStartWords + bit / 32;
        at[0] |= static_cast<uint32_t>(bits);
        if (bits >> 32 != 0) at[1] |= static_cast<uint32_t>(bits >> 32);
        bit += length_of(code);
      });
    }
  }
}

}  // namespace

extern "C" int infold_pairs_most_runs(int across) { return most_runs(across); }

// Words of a stripe at most.
extern "C" size_t infold_pairs_most_words(int across) { return static_cast<size_t>(kRunWords) * most_runs(across); }

// The entry of two exponents, or of two levels' values as bfloat16.
extern "C" uint32_t infold_pairs_exponent_entry(uint32_t first, uint32_t second, uint32_t length) {
  return exponent_entry(first, second, length);
}
extern "C" uint32_t infold_pairs_level_entry(uint32_t first, uint32_t second, uint32_t uppers, uint32_t length) {
  return level_entry(first, second, uppers, length);
}

// Codes a stripe's symbols by the codes of pairs (first symbol · 256 + second). Signs and mantissas, where there are
// any, go to `tiles`, which were zero, as `words` were. Fills the stripe's part of the directory, from quad 0 on, and
// returns how many quads of words there are.
extern "C" size_t infold_pairs_encode(const uint8_t* symbols, const uint16_t* rests, int across, const uint32_t* codes,
                                      uint32_t* tiles, uint32_t* words, uint32_t* directory) {
  const int width = across * kCols;
  size_t quads = 0;
  int begin = 0;
  for (int run = 0; run <= most_runs(across); ++run) {
    directory[run_place(0, run, across)] = static_cast<uint32_t>(quads);
    directory[run_place(0, run, across) + 1] = static_cast<uint32_t>(begin);
    if (begin == across) continue;
    const int most = run_tiles(across);
    int end = begin + most < across ? begin + most : across;
    while (quads_of(symbols, width, codes, {begin, end}) * kQuadWords > kRunWords) --end;
    encode_run(symbols, width, codes, {begin, end}, words + quads * kQuadWords);
    quads += static_cast<size_t>(quads_of(symbols, width, codes, {begin, end}));
    begin = end;
  }
  if (rests == nullptr) return quads;
  for (int tile = 0; tile < across; ++tile, tiles += kTileWords) {
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t lane_words[kRestWords] = {};
      for_pairs(lane, tile, [&](int step, int reg, int row, int col) {
        const uint16_t* pair = rests + static_cast<size_t>(row) * width + col;
        for (int half = 0; half < 2; ++half) put_rest(pair[half], step, reg, half, lane_words);
      });
      for (int word = 0; word < kRestWords; ++word) tiles[word_index(lane, word)] = lane_words[word];
    }
  }
  return quads;
}

// Decodes a stripe: bfloat16s, or, where there are no tiles, for each weight the index that its pair has in the table.
// Of damaged words anything; reads so many quads of them.
extern "C" void infold_pairs_decode(const uint32_t* table, const uint32_t* tiles, const uint32_t* words, size_t quads,
                                    const uint32_t* directory, int across, uint16_t* out) {
  constexpr int kShift = 2;
  const int width = across * kCols;
  for (int run = 0; run < most_runs(across); ++run) {
    const uint32_t* place = directory + run_place(0, run, across);
    const size_t first = place[0] < quads ? place[0] : quads, end = place[2] < quads ? place[2] : quads;
    // A run's words, and those that a stream reads behind them.
    uint32_t held[kRunWords + Stream<kShift>::kBehind] = {};
    for (size_t i = 0; i < kRunWords && first * kQuadWords + i < end * kQuadWords; ++i) {
      held[i] = words[first * kQuadWords + i];
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      Stream<kShift> stream;
      stream.begin(held, lane);
      for (int tile = static_cast<int>(place[1]); tile >= 0 && tile < static_cast<int>(place[3]) && tile < across;
           ++tile) {
        stream.begin_tile(held);
        uint32_t entries[2], offsets[2], registers[2];
        for_pairs(lane, tile, [&](int step, int reg, int row, int col) {
          if (reg % 2 == 0) {
            stream.decode(reinterpret_cast<const unsigned char*>(table), 0, held, entries, offsets);
            if (tiles != nullptr) {
              const uint32_t* rests = tiles + static_cast<size_t>(tile) * kTileWords;
              assemble(rests[word_index(lane, 2 * step + reg / 2)], entries, registers);
            }
          }
          for (int half = 0; half < 2; ++half) {
            const uint32_t value = tiles == nullptr ? offsets[reg % 2] >> kShift : registers[reg % 2] >> 16 * half;
            out[static_cast<size_t>(row) * width + col + half] = static_cast<uint16_t>(value);
          }
        });
      }
    }
  }
}
