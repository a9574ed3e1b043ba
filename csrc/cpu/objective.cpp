// The objective: a walk along each sequence for the statistic, then vector loops over its tokens for the gate.
// Compiled once per instruction set (TOKENRL_ISA): nothing here may leave a linkable copy of a shared function behind.
#include "objective_loops.h"
#include "objective_tiles.h"

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

// Whether a token's coefficient depends on nothing behind it, so that a sequence without segments can be worked off in
// pieces that stay in the first-level cache.
template <class T>
inline bool streams(Statistic statistic, bool through) {
  return sizeof(T) == sizeof(float) && !over_span(statistic) && (!through || statistic == Statistic::token);
}

inline void scan_tokens(const Spans& spans, Sequence q, Statistic statistic, const Lanes<double>& lanes, Carry&) {
  statistic_of(spans, q, statistic, lanes.x, lanes.s, lanes.t);
}
inline void scan_tokens(const Spans& spans, Sequence q, Statistic statistic, const Lanes<float>& lanes, Carry& carry) {
  if (spans.starts) statistic_of(spans, q, statistic, lanes.x, lanes.s, lanes.t);
  else scan_lanes(statistic, lanes.x, lanes.valid, q.end - q.begin, lanes.s, lanes.t, carry);
}

// One call.
template <class T>
struct Run {
  const ObjectiveArgs<T>& args;
  Statistic statistic;
  bool through, positional;
  GateBlock<T> gate_block;

  inline Run(const ObjectiveArgs<T>& given, Statistic of, bool flows, const GateBlocks<T>& gate)
      : args(given), statistic(of), through(flows), positional(gate.positional), gate_block(gate.of_numbers) {
    for (int j = 0; j < gate.num_params; ++j)
      if (args.params[j].tensor) gate_block = gate.of_tensors;
  }
  inline bool scans() const { return statistic != Statistic::token || positional; }
  inline bool own() const { return statistic == Statistic::token && args.cap >= args.clamp; }

  // x and s of tokens q of a tile.
  inline Lanes<T> load_piece(const Tile& tile, Sequence q, T* memory, Carry& carry) const {
    Lanes<T> lanes(memory, q.end - q.begin);
    load(args, q, tile.sequence, through, lanes);
    prefetch_after(args, q);
    if (scans()) scan_tokens(tile.spans, q, statistic, lanes, carry);
    else lanes.s = lanes.x;
    return lanes;
  }

  inline void loops(Sequence q, const Lanes<T>& lanes, Totals& totals) const {
    const int64_t n = q.end - q.begin;
    for (int64_t first = 0; first < n; first += kBlock) {
      const int64_t last = smaller(first + kBlock, n);
      if (own()) ratio_loop<true>(args.cap, first, last, lanes, totals);
      else ratio_loop<false>(args.cap, first, last, lanes, totals);
      gate_block(args, q.begin, first, last, lanes, totals);
    }
  }

  inline void piece(const Tile& tile, Sequence q, T* memory, Carry& carry, Totals& totals) const {
    const Lanes<T> lanes = load_piece(tile, q, memory, carry);
    loops(q, lanes, totals);
    if (through && statistic != Statistic::token) adjoint_of(tile.spans, q, statistic, lanes.t, lanes.shared);
    store_coefficients(args, q, through, lanes);
  }

  // Tokens that are worked off at a time.
  inline int64_t length(const Tile& tile) const {
    const bool in_pieces = streams<T>(statistic, through) && !tile.spans.starts;
    return in_pieces ? kBlock : larger(tile.q.end - tile.q.begin, int64_t{1});
  }
  template <class F>
  inline void each_piece(const Tile& tile, F&& f) const {
    for (int64_t begin = tile.q.begin; begin < tile.q.end; begin += length(tile))
      f(Sequence{begin, smaller(begin + length(tile), tile.q.end)});
  }

  // What the tiles of the sequence before this one leave to it.
  inline Carry carry_to(const Tile& tile, T* memory) const {
    Carry carry;
    for (const Tile* before = &tile - tile.earlier; scans() && before < &tile; ++before) {
      each_piece(*before, [&](Sequence q) { load_piece(*before, q, memory, carry); });
      carry.end_tile();
    }
    return carry;
  }

  inline void tiles(const Tile* begin, const Tile* end, Totals* totals) const {
    int64_t longest = kBlock;
    for (const Tile* tile = begin; tile < end; ++tile) longest = larger(longest, length(*tile));
    const Scratch<T> memory(Lanes<T>::room(longest) * Lanes<T>::kArrays);
    Carry carry;
    for (const Tile* tile = begin; tile < end; ++tile, ++totals) {
      if (tile == begin || !tile->earlier) carry = carry_to(*tile, memory.at);
      for (int64_t token = tile->cells.begin; token < tile->q.begin; ++token) args.coef[token] = 0;
      for (int64_t token = tile->q.end; token < tile->cells.end; ++token) args.coef[token] = 0;
      *totals = Totals::nothing();
      each_piece(*tile, [&](Sequence q) { piece(*tile, q, memory.at, carry, *totals); });
      carry.end_tile();
    }
  }
};

template <class T, class... Gate>
const GateBlocks<T>* find_gate(const char* name, std::tuple<Gate...>*) {
  const GateBlocks<T>* found = nullptr;
  ((std::strcmp(Gate::name, name) == 0 && (found = &kGateBlocks<T, Gate>)) || ...);
  return found;
}

template <class T>
void add_up(const ObjectiveArgs<T>& args, const Totals* totals, int64_t count) {
  Totals sum = Totals::nothing();
  for (int64_t i = 0; i < count; ++i) sum.add(totals[i]);
  args.loss[0] = static_cast<T>(sum.loss);
  for (int k = 0; k < kNumMetrics; ++k) args.metrics[k] = sum.metrics[k];
}

}  // namespace

template <class T>
bool objective(const ObjectiveArgs<T>& args, Statistic statistic, bool through, const char* gate,
               const Threads& threads) {
  const GateBlocks<T>* found = find_gate<T>(gate, static_cast<TOKENRL_GATES*>(nullptr));
  if (!found) return false;
  clear_outside(args.spans, args.coef);
  const Tiles tiles(args.spans, streams<T>(statistic, through));
  const Scratch<Totals> totals(tiles.count);
  const Run<T> run(args, statistic, through, *found);
  const int64_t grain = larger(int64_t{1}, kTile * tiles.count / larger(args.spans.num_tokens, int64_t{1}));
  parallel(threads, tiles.count, grain,
           [&](int64_t begin, int64_t end) { run.tiles(tiles.at.at + begin, tiles.at.at + end, totals.at + begin); });
  add_up(args, totals.at, tiles.count);
  return true;
}

template bool objective(const ObjectiveArgs<float>&, Statistic, bool, const char*, const Threads&);
template bool objective(const ObjectiveArgs<double>&, Statistic, bool, const char*, const Threads&);

}  // namespace tokenrl::cpu::TOKENRL_ISA
