// What a pass over a row of logits, or over a part of it, finds: its softmax, and whatever else is asked for.
#pragma once

#include "vocabulary.cuh"

namespace tokenrl::cuda {

constexpr int kIdsPerPass = 2;  // of those whose place in the order is asked for

// Nothing but the softmax is asked for.
template <class T>
struct SoftmaxOnly : Plain {
  struct Part {
    Softmax<T> softmax = no_logits<T>();
  };
  __device__ __forceinline__ static Part merge(const Part& a, const Part& b, T factor) {
    return {tokenrl::merge(a.softmax, b.softmax, factor)};
  }
};

// All of it: the mean, and how many logits are above an id's, or equal to it and before it.
template <class T>
struct Everything : Transformed {
  struct Part {
    Softmax<T> softmax = no_logits<T>();
    double total = 0;
    int32_t kept = 0;
    int32_t above[kIdsPerPass] = {}, equal_before[kIdsPerPass] = {};
  };
  __device__ __forceinline__ static Part merge(const Part& a, const Part& b, T factor) {
    Part both = a;
    both.softmax = tokenrl::merge(a.softmax, b.softmax, factor);
    both.total += b.total;
    both.kept += b.kept;
#pragma unroll
    for (int k = 0; k < kIdsPerPass; ++k) {
      both.above[k] += b.above[k];
      both.equal_before[k] += b.equal_before[k];
    }
    return both;
  }
};

// Some y into a state. The maximum moves rarely; until there is a finite one, 0 stands in for it. A NaN is no maximum,
// but goes into the sums.
template <class T, bool kSquares, int kCount>
__device__ __forceinline__ void take(Softmax<T>& state, const T (&y)[kCount], T factor) {
  T highest = state.max;
#pragma unroll
  for (int k = 0; k < kCount; ++k) highest = ::fmax(highest, y[k]);
  if (highest > state.max) state = rescaled(state, highest, factor);
  const T max = state.max == -infinity<T>() ? T(0) : state.max, scale = factor * kLog2E<T>;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const T d = y[k] - max, e = power_of_two(d * scale);
    state.sum += e;
    state.weighted += e * ::fmax(d, T(-1e30));  // finite, so that 0 * -inf is 0
    if (kSquares) state.squares += e * e;
  }
}

// The raw logits and places of the ids of one pass; the first `count` are asked for.
template <class T>
struct OwnIds {
  T x[kIdsPerPass];
  int64_t id[kIdsPerPass];
  int count = 0;
};

template <class Logit, class T>
__device__ __forceinline__ OwnIds<T> own_ids(const LogprobArgs<Logit, T>& args,
                                             const RowView<Logit, T, Everything<T>>& row, int64_t first) {
  OwnIds<T> own;
  if (!args.is_top1 && !args.rank) return own;
  own.count = static_cast<int>(smaller(static_cast<int64_t>(kIdsPerPass), args.num_ids - first));
#pragma unroll
  for (int k = 0; k < kIdsPerPass; ++k) {
    own.id[k] = k < own.count ? args.ids[row.index * args.num_ids + first + k] : -1;
    const bool known = own.id[k] >= 0 && own.id[k] < args.vocab;
    own.x[k] = known ? row.raw(row.logits[own.id[k]], own.id[k]) : infinity<T>();
  }
  return own;
}

template <class Logit, class T>
__device__ __forceinline__ typename SoftmaxOnly<T>::Part visit(const LogprobArgs<Logit, T>&,
                                                               const RowView<Logit, T, SoftmaxOnly<T>>& row,
                                                               int64_t begin, int64_t end, int64_t) {
  typename SoftmaxOnly<T>::Part part;
  const T factor = row.transform.factor;
  for_packs(
      row.logits, begin, end,
      [&](const Pack<Logit>& pack, int64_t) {
        T y[Pack<Logit>::size];
#pragma unroll
        for (int k = 0; k < Pack<Logit>::size; ++k) y[k] = static_cast<T>(widen(pack.of[k]));
        take<T, false>(part.softmax, y, factor);
      },
      [&](int64_t v) {
        const T y[1] = {static_cast<T>(widen(row.logits[v]))};
        take<T, false>(part.softmax, y, factor);
      });
  return part;
}

template <class Logit, class T>
__device__ __forceinline__ typename Everything<T>::Part visit(const LogprobArgs<Logit, T>& args,
                                                              const RowView<Logit, T, Everything<T>>& row,
                                                              int64_t begin, int64_t end, int64_t first_id) {
  typename Everything<T>::Part part;
  const OwnIds<T> own = own_ids(args, row, first_id);
  const T factor = row.transform.factor;
  const auto one = [&](Logit logit, int64_t v) {
    const T x = row.raw(logit, v), y[1] = {row.capped(x)};
    take<T, true>(part.softmax, y, factor);
    const bool kept = row.keeps(v);
    part.total += kept ? static_cast<double>(y[0]) : 0.0;
    part.kept += kept;
#pragma unroll
    for (int k = 0; k < kIdsPerPass; ++k) {
      if (k >= own.count) break;
      part.above[k] += x > own.x[k];
      part.equal_before[k] += x == own.x[k] && v < own.id[k];
    }
  };
  for_packs(
      row.logits, begin, end,
      [&](const Pack<Logit>& pack, int64_t first) {
#pragma unroll
        for (int k = 0; k < Pack<Logit>::size; ++k) one(pack.of[k], first + k);
      },
      [&](int64_t v) { one(row.logits[v], v); });
  return part;
}

}  // namespace tokenrl::cuda
