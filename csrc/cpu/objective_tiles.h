// The stretches of tokens that threads share: whole sequences, or pieces of fixed length where a token's coefficient
// depends on nothing behind it. Only for sources that are compiled once per instruction set.
#pragma once

#include "scratch.h"
#include "walk.h"

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

// Tokens of a tile. Where tiles begin depends on a sequence's first valid token alone, and each sums up from 0: neither
// the batch nor the number of threads changes a bit.
constexpr int64_t kTile = 4096;

// Tokens q of a sequence; cells: with the padding before its first tile and behind its last. earlier: how many tiles of
// the sequence lie before it.
struct Tile {
  int64_t sequence, earlier;
  Sequence q, cells;
  Spans spans;
};

// The tiles of all sequences in their order, at least one of each; `streams` of those without segments.
struct Tiles {
  int64_t count = 0;
  Scratch<Tile> at;

  Tiles(const Spans& spans, bool streams) : at(most(spans)) {
    for (int64_t i = 0; i < spans.num_sequences; ++i) {
      const Sequence cells = sequence_of(spans, i), q = without_padding(spans, cells);
      Spans own = spans;
      if (!is_segmented(spans, q)) own.starts = nullptr;  // and has the bits of one without segments
      add(i, q, cells, own, streams && !own.starts ? kTile : larger(q.end - q.begin, int64_t{1}));
    }
  }

 private:
  static int64_t most(const Spans& spans) {
    int64_t tiles = 0;
    for (int64_t i = 0; i < spans.num_sequences; ++i) {
      const Sequence q = sequence_of(spans, i);
      tiles += 1 + larger(q.end - q.begin, int64_t{0}) / kTile;
    }
    return tiles;
  }
  void add(int64_t sequence, Sequence q, Sequence cells, const Spans& spans, int64_t length) {
    int64_t begin = q.begin, earlier = 0;
    do {
      const Sequence own{begin, smaller(begin + length, q.end)};
      const bool last = own.end >= q.end;
      at.at[count++] = {sequence, earlier, own, {earlier ? begin : cells.begin, last ? cells.end : own.end}, spans};
      begin = own.end, ++earlier;
    } while (begin < q.end);
  }
};

}  // namespace
}  // namespace tokenrl::cpu::TOKENRL_ISA
