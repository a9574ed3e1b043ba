// Where the tokens of a block lie, and walks over them, forwards or backwards, with a running state that restarts at
// every span. A sequence is cut into tiles from its first valid token on, whatever padding lies around it: one block
// walks them all in turn, or each has a block of its own, and the states are combined in the same order.
#pragma once

#include "../kernels.h"
#include "block.cuh"

namespace tokenrl::cuda {

constexpr int kItems = 4;  // consecutive tokens of a thread
constexpr int64_t kChunk = kThreads * kItems, kTile = 4 * kChunk;

// Values of consecutive tokens, loaded and stored at once where they lie so.
template <class V>
struct alignas(sizeof(V) * kItems > 16 ? 16 : sizeof(V) * kItems) Items {
  V of[kItems];
};
template <class V>
__device__ __forceinline__ Items<V> all_of(V value) {
  Items<V> items;
#pragma unroll
  for (V& item : items.of) item = value;
  return items;
}

// The first of some items goes, the others move up, and one follows.
template <class V>
__device__ __forceinline__ V turn(Items<V>& items, V last = V(0)) {
  const V first = items.of[0];
#pragma unroll
  for (int k = 1; k < kItems; ++k) items.of[k - 1] = items.of[k];
  items.of[kItems - 1] = last;
  return first;
}

// The tokens of a thread, of which the first `live` are there; whether they lie aligned in every array.
struct Place {
  int64_t first;
  int live;
  bool together;
};
__device__ __forceinline__ Place place_at(int64_t first, int live, bool aligned) {
  return {first, live, aligned && live == kItems && static_cast<unsigned>(first) % kItems == 0};
}
// Those from `first` on, before the end.
__device__ __forceinline__ Place place_between(int64_t first, int64_t end, bool aligned) {
  return place_at(first, static_cast<int>(clamp(end - first, int64_t{0}, int64_t{kItems})), aligned);
}
// Of the last `left` tokens before the end.
__device__ __forceinline__ Place place_before(int64_t end, int left, bool aligned) {
  return place_at(end - left, smaller(left, kItems), aligned);
}
// Whether tokens that lie together from a multiple of kItems on are aligned in all of these arrays.
template <class... V>
bool are_aligned(const Spans& spans, const V*... arrays) {
  const auto is = [](auto* array) {
    return reinterpret_cast<uintptr_t>(array) %
               alignof(Items<std::remove_cv_t<std::remove_pointer_t<decltype(array)>>>) ==
           0;
  };
  return is(spans.mask) && is(spans.starts) && (is(arrays) && ...);
}

template <class V>
struct Source {
  const V* from;
  Items<V>& to;
};
template <class V>
__device__ __forceinline__ Source<V> source(const V* from, Items<V>& to) {
  return {from, to};
}
// Of several arrays at once, so that they share what it takes to know how: at once; one by one; or, at the end of a
// tile, in one copy of the code, the last one there in place of those that are not. Not at all where none is there.
template <class... V>
__device__ __forceinline__ void load_items(const Place& place, Source<V>... sources) {
  ((sources.from += place.first), ...);
  if (place.together) {
    ((sources.to = *reinterpret_cast<const Items<V>*>(sources.from)), ...);
  } else if (place.live == kItems) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) ((sources.to.of[k] = sources.from[k]), ...);
  } else if (place.live > 0) {
#pragma unroll 1
    for (int k = 0; k < kItems; ++k) (turn(sources.to, sources.from[smaller(k, place.live - 1)]), ...);
  }
}
template <class V>
__device__ __forceinline__ void store_items(const Place& place, V* at, Items<V> items) {
  at += place.first;
  if (place.together) {
    *reinterpret_cast<Items<V>*>(at) = items;
  } else if (place.live == kItems) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) at[k] = items.of[k];
  } else {
#pragma unroll 1
    for (int k = 0; k < place.live; ++k) at[k] = turn(items);
  }
}

// One bit for each of a thread's tokens.
__device__ __forceinline__ unsigned bits_of(const bool* flags, const Place& place) {
  Items<uint8_t> items;
  load_items(place, source(reinterpret_cast<const uint8_t*>(flags), items));
  uint32_t word;
  std::memcpy(&word, &items, sizeof word);
  return (word * 0x10204080u) >> 28;  // each is a byte, 0 or 1: their lowest bits meet in the product's highest
}
__device__ __forceinline__ unsigned valid_bits(const Spans& spans, const Place& place) {
  const unsigned there = (1u << place.live) - 1;
  return spans.mask ? bits_of(spans.mask, place) & there : there;
}
// Segments that start at these tokens; that of a sequence starts by itself.
__device__ __forceinline__ unsigned start_bits(const Spans& spans, const Place& place, unsigned valid) {
  return spans.starts ? bits_of(spans.starts, place) & valid : 0;
}

struct Sequence {
  int64_t begin, end;
  __host__ __device__ int64_t tiles() const { return (end - begin + kTile - 1) / kTile; }
};
__device__ __forceinline__ Sequence sequence_of(const Spans& spans, int64_t i) {
  const int64_t begin = clamp(__ldg(spans.cu_seqlens + i), int64_t{0}, spans.num_tokens);
  return {begin, larger(begin, clamp(__ldg(spans.cu_seqlens + i + 1), int64_t{0}, spans.num_tokens))};
}
__device__ __forceinline__ bool is_valid(const Spans& spans, int64_t token) { return !spans.mask || spans.mask[token]; }

// Each tile of each sequence has a slot; there are some without a tile.
__device__ __forceinline__ int64_t slot_of(const Spans& spans, int64_t i) {
  return clamp(__ldg(spans.cu_seqlens + i), int64_t{0}, spans.num_tokens) / kTile + i;
}
inline int64_t num_slots(const Spans& spans) {
  return spans.num_tokens / kTile + larger(spans.num_sequences, int64_t{1});
}
// Whether each tile is to have a block: where sequences are few and long.
inline bool are_tiles_apart(const Spans& spans) {
  return spans.num_sequences < 2 * num_multiprocessors() && spans.num_tokens > kTile * spans.num_sequences;
}
inline int64_t blocks_of(const Spans& spans, bool apart) {
  return apart ? num_slots(spans) : larger(spans.num_sequences, int64_t{1});
}

// What a block works on: tiles [first, last) of a sequence whose valid tokens are within [begin, end); all of its
// tiles, or one. Those behind `end` are empty.
struct TileRange {
  int64_t sequence, begin, end, tiles, first, last, slot;

  __device__ __forceinline__ Sequence tile(int64_t which) const {
    const int64_t from = smaller(begin + which * kTile, end);
    return {from, smaller(from + kTile, end)};
  }
};

// The tokens of a sequence from its first valid one to the last. A thread stops at the first that it finds from either
// end.
__device__ __forceinline__ Sequence without_padding(const Spans& spans, Sequence q) {
  if (!spans.mask) return q;
  TRL_SHARED(Sequence, memory, kWarps);
  int64_t first = q.begin + threadIdx.x, last = q.end - 1 - threadIdx.x;
  while (first < q.end && !spans.mask[first]) first += kThreads;
  while (last >= q.begin && !spans.mask[last]) last -= kThreads;
  const auto hull = [](Sequence a, Sequence b) { return Sequence{smaller(a.begin, b.begin), larger(a.end, b.end)}; };
  const Sequence valid = reduce(Sequence{smaller(first, q.end), last + 1}, hull, memory);
  return {valid.begin, larger(valid.begin, valid.end)};
}

// The sequence with the slot of this block.
__device__ __forceinline__ int64_t sequence_at(const Spans& spans, int64_t slot) {
  int64_t low = 0, high = spans.num_sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (slot_of(spans, middle) <= slot ? low : high) = middle;
  }
  return low;
}

// Clears the tokens that no tile has: those around all sequences, and those around the valid ones of each.
template <class Clear>
__device__ __forceinline__ TileRange tile_range(const Spans& spans, bool apart, Clear clear) {
  const auto clear_all = [&](int64_t from, int64_t to) {
    for (int64_t token = from + threadIdx.x; token < to; token += kThreads) clear(token);
  };
  if (spans.num_sequences == 0) {
    if (blockIdx.x == 0) clear_all(0, spans.num_tokens);
    return {};
  }
  const int64_t i = apart ? sequence_at(spans, blockIdx.x) : blockIdx.x;
  const Sequence q = sequence_of(spans, i);
  TileRange share{i, q.begin, q.end, q.tiles(), 0, q.tiles(), slot_of(spans, i)};
  if (apart) share.first = blockIdx.x - share.slot, share.last = smaller(share.first + 1, share.tiles);
  if (share.first == 0 && i == 0) clear_all(0, q.begin);
  if (share.first == 0 && i == spans.num_sequences - 1) clear_all(q.end, spans.num_tokens);
  if (share.first >= share.last) return share;
  const Sequence valid = without_padding(spans, q);
  share.begin = valid.begin, share.end = valid.end;
  if (share.first == 0) clear_all(q.begin, valid.begin);
  if (share.first == 0) clear_all(valid.end, q.end);
  return share;
}

enum class Fold { add, least, copy };

// What a walk has gathered since its last fresh token: the count of valid tokens, and a sum, a minimum or a copy.
template <class T>
struct Running {
  int32_t fresh, count;
  T value;
};

template <class T, Fold fold>
struct Combine {
  __device__ __forceinline__ static Running<T> nothing() { return {0, 0, fold == Fold::least ? infinity<T>() : T(0)}; }

  __device__ __forceinline__ Running<T> operator()(Running<T> earlier, Running<T> later) const {
    if (later.fresh) return later;
    if (fold == Fold::copy) return earlier;
    const T value = fold == Fold::add ? earlier.value + later.value : smaller(earlier.value, later.value);
    return {earlier.fresh, earlier.count + later.count, value};
  }
};

// A walk over one tile after `carry`; the state that it alone leaves, in every thread. For each chunk of it:
// pass.load(place) by tokens of this thread, pass.element(k) of the k-th, pass.visit(k, before, after) with the state
// on both sides of it, pass.store(place); pass.aligned() says whether tokens are, in all of its arrays. memory: [kWarps
// + 1].
template <bool kBackwards, class T, Fold fold, class Pass>
__device__ __forceinline__ Running<T> walk_tile(Sequence tile, Running<T> carry, Combine<T, fold> combine, Pass& pass,
                                                Running<T>* memory) {
  const int place = kBackwards ? kThreads - 1 - threadIdx.x : threadIdx.x;
  const int64_t chunks = (tile.end - tile.begin + kChunk - 1) / kChunk;
  Running<T> passed = combine.nothing();
  for (int64_t turn = 0; turn < chunks; ++turn) {
    const int64_t first = tile.begin + (kBackwards ? chunks - 1 - turn : turn) * kChunk + place * kItems;
    const Place place = place_between(first, tile.end, pass.aligned());
    const auto item = [](int k) { return kBackwards ? kItems - 1 - k : k; };
    Running<T> own[kItems], all = combine.nothing();
    pass.load(place);
#pragma unroll
    for (int k = 0; k < kItems; ++k) all = combine(all, own[k] = pass.element(item(k)));
    Running<T> state = scan_before(all, passed, combine, memory), after = combine(carry, state);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const Running<T> before = after;
      after = combine(carry, state = combine(state, own[k]));
      pass.visit(item(k), before, after);
    }
    pass.store(place);
    if (threadIdx.x == kThreads - 1) memory[kWarps] = state;
    __syncthreads();
    passed = memory[kWarps];
  }
  return passed;
}

// The states of all tiles before one in the direction of a walk.
template <bool kBackwards, class T, Fold fold>
__device__ __forceinline__ Running<T> carry_into(const TileRange& share, Combine<T, fold> combine,
                                                 const Running<T>* sums) {
  Running<T> carry = combine.nothing();
#pragma unroll 4
  for (int64_t k = kBackwards ? share.tiles - 1 : 0; kBackwards ? k > share.first : k < share.first;
       k += kBackwards ? -1 : 1)
    carry = combine(carry, sums[share.slot + k]);
  return carry;
}

// Over the tiles of a share in turn. sums: what each tile leaves, where its sequence has several blocks.
template <bool kBackwards, class T, Fold fold, class Pass>
__device__ __forceinline__ void walk(const TileRange& share, const Running<T>* sums, Combine<T, fold> combine,
                                     Pass& pass, Running<T>* memory) {
  Running<T> carry = sums ? carry_into<kBackwards>(share, combine, sums) : combine.nothing();
  for (int64_t turn = share.first; turn < share.last; ++turn) {
    const int64_t which = kBackwards ? share.first + share.last - 1 - turn : turn;
    carry = combine(carry, walk_tile<kBackwards>(share.tile(which), carry, combine, pass, memory));
  }
}

}  // namespace tokenrl::cuda
