// One block walks the tokens of one sequence, forwards or backwards, with a running state that restarts at every span.
#pragma once

#include "../kernels.h"
#include "block.cuh"

namespace tokenrl::cuda {

constexpr int kItems = 4;  // tokens of a thread in one chunk of a walk

struct Sequence {
  int64_t begin, end;
};

__device__ __forceinline__ Sequence sequence_of(const Spans& spans, int64_t i) {
  return {clamp(__ldg(spans.cu_seqlens + i), int64_t{0}, spans.num_tokens),
          clamp(__ldg(spans.cu_seqlens + i + 1), int64_t{0}, spans.num_tokens)};
}

__device__ __forceinline__ bool is_valid(const Spans& spans, int64_t token) { return !spans.mask || spans.mask[token]; }

// Whether a span starts at this token; `q` is the token's sequence.
__device__ __forceinline__ bool is_start(const Spans& spans, Sequence q, int64_t token) {
  return token == q.begin || (spans.starts && spans.starts[token] && is_valid(spans, token));
}
__device__ __forceinline__ bool is_end(const Spans& spans, Sequence q, int64_t token) {
  return token + 1 == q.end || is_start(spans, q, token + 1);
}

enum class Fold { add, least, copy };

// What a walk has gathered since its last fresh token: the count of valid tokens, and a sum, a minimum or a copy.
template <class T>
struct Running {
  int32_t fresh, count;
  T value;
};

template <class T>
struct Combine {
  Fold fold;

  __device__ __forceinline__ Running<T> nothing() const { return {0, 0, fold == Fold::least ? infinity<T>() : T(0)}; }

  __device__ __forceinline__ Running<T> operator()(Running<T> earlier, Running<T> later) const {
    if (later.fresh) return later;
    if (fold == Fold::copy) return earlier;
    const T value = fold == Fold::add ? earlier.value + later.value : smaller(earlier.value, later.value);
    return {earlier.fresh, earlier.count + later.count, value};
  }
};

// Passes over the tokens of q in the given direction: element(token) -> Running is what a token adds to the state, and
// visit(token, before, after) sees the state on both sides of it. A thread visits the tokens whose elements it asked
// for, and asks again right before each visit. After the walk every thread sees what all others have written.
template <class T, class Element, class Visit>
__device__ __forceinline__ void walk(Sequence q, bool backwards, Combine<T> combine, Element element, Visit visit,
                                     Running<T>* memory) {
  const int64_t n = q.end - q.begin;
  Running<T> carry = combine.nothing();
  for (int64_t chunk = 0; chunk < n; chunk += kThreads * kItems) {
    const int64_t first = chunk + threadIdx.x * kItems, last = smaller(first + kItems, n);
    Running<T> own = combine.nothing();
#pragma unroll 1
    for (int64_t i = first; i < last; ++i) own = combine(own, element(backwards ? q.end - 1 - i : q.begin + i));
    Running<T> state = scan_before(own, carry, combine, memory);
#pragma unroll 1
    for (int64_t i = first; i < last; ++i) {
      const int64_t token = backwards ? q.end - 1 - i : q.begin + i;
      const Running<T> before = state;
      state = combine(state, element(token));
      visit(token, before, state);
    }
  }
  __syncthreads();
}

// The tokens of a sequence from the first valid one to the last, the others cleared: whatever padding lies around them,
// each falls to the same thread of a walk.
template <class Clear>
__device__ __forceinline__ Sequence without_padding(const Spans& spans, Sequence q, Clear clear) {
  if (!spans.mask) return q;
  TRL_SHARED(Sequence, memory, kWarps);
  Sequence valid{q.end, q.begin};
#pragma unroll 4
  for (int64_t token = q.begin + threadIdx.x; token < q.end; token += kThreads)
    if (spans.mask[token]) valid = {smaller(valid.begin, token), token + 1};
  const auto hull = [](Sequence a, Sequence b) { return Sequence{smaller(a.begin, b.begin), larger(a.end, b.end)}; };
  valid = reduce(valid, hull, memory);
  valid.end = larger(valid.begin, valid.end);
  for (int64_t token = q.begin + threadIdx.x; token < valid.begin; token += kThreads) clear(token);
  for (int64_t token = valid.end + threadIdx.x; token < q.end; token += kThreads) clear(token);
  return valid;
}

// One block per sequence, and one that clears the tokens if there are no sequences.
inline int64_t blocks_of(const Spans& spans) { return larger(spans.num_sequences, int64_t{1}); }

// The program of the first sequence answers for the tokens before it, that of the last for those behind it.
template <class Clear>
__device__ __forceinline__ void clear_outside(const Spans& spans, int64_t i, Clear clear) {
  const bool none = spans.num_sequences == 0;
  const int64_t first = none ? spans.num_tokens : sequence_of(spans, 0).begin;
  const int64_t last = none ? 0 : sequence_of(spans, spans.num_sequences - 1).end;
  if (i == 0)
    for (int64_t token = threadIdx.x; token < first; token += kThreads) clear(token);
  if (i == spans.num_sequences - 1)
    for (int64_t token = last + threadIdx.x; token < spans.num_tokens; token += kThreads) clear(token);
}

}  // namespace tokenrl::cuda
