// What a pass over a row of logits, or over a part of it, finds: its softmax, and whatever else is asked for.
#pragma once

#include "vocabulary.cuh"

namespace tokenrl::cuda {

constexpr int kIdsPerPass = 2;  // of those whose place in the order is asked for

// Nothing but the softmax is asked for.
template <class T, class Reads = BlockReads>
struct SoftmaxOnly : Plain {
  using Who = Reads;
  static constexpr int blocks = sizeof(T) == 8 ? kBlocksAtOnce : 4;
  struct Part {
    T max = -infinity<T>(), sum = 0, weighted = 0;

    __device__ __forceinline__ Softmax<T> softmax() const { return {max, sum, weighted, T(0)}; }
  };
  __device__ __forceinline__ static Part part_of(const Softmax<T>& a) { return {a.max, a.sum, a.weighted}; }
  __device__ __forceinline__ static Part merge(const Part& a, const Part& b, T factor) {
    return part_of(tokenrl::merge(a.softmax(), b.softmax(), factor));
  }
  // All of some lanes' as one, in each of them: their largest maximum first, so that a lane rescales its own once.
  template <int kLanes>
  __device__ __forceinline__ static Part over_lanes(const Part& own, T factor) {
    T max = own.max;
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) max = larger(max, from_lane_beside(max, lanes));
    Part all = part_of(rescaled(own.softmax(), max, factor));
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      all.sum += from_lane_beside(all.sum, lanes);
      all.weighted += from_lane_beside(all.weighted, lanes);
    }
    return all;
  }
};

// All of it: the mean, and how many logits are above an id's, or equal to it and before it.
template <class T>
struct Everything : Transformed {
  static constexpr int blocks = kBlocksAtOnce;
  struct Part {
    Softmax<T> found = no_logits<T>();
    double total = 0;
    int32_t kept = 0;
    int32_t above[kIdsPerPass] = {}, equal_before[kIdsPerPass] = {};

    __device__ __forceinline__ const Softmax<T>& softmax() const { return found; }
  };
  __device__ __forceinline__ static Part merge(const Part& a, const Part& b, T factor) {
    Part both = a;
    both.found = tokenrl::merge(a.found, b.found, factor);
    both.total += b.total;
    both.kept += b.kept;
#pragma unroll
    for (int k = 0; k < kIdsPerPass; ++k) {
      both.above[k] += b.above[k];
      both.equal_before[k] += b.equal_before[k];
    }
    return both;
  }
  template <int kLanes>
  __device__ __forceinline__ static Part over_lanes(const Part& own, T factor) {
    return first_of_lanes<kLanes>(own, [=](const Part& a, const Part& b) { return merge(a, b, factor); });
  }
};

// One y into a state. The maximum moves rarely; until there is a finite one, 0 stands in for it. A NaN is no maximum,
// but goes into the sums.
template <class T>
__device__ __forceinline__ void take(Softmax<T>& state, T y, T factor) {
  if (y > state.max) state = rescaled(state, y, factor);
  const T max = state.max == -infinity<T>() ? T(0) : state.max;
  const T d = y - max, e = power_of_two(d * (factor * kLog2E<T>));
  state.sum += e;
  state.weighted += e * ::fmax(d, T(-1e30));  // finite, so that 0 * -inf is 0
  state.squares += e * e;
}

// The same of many y at once, in powers of two: the sums of 2^t and of 2^t t at t = scale y - anchor. The anchor is
// scale max, rounded; what rounding took of it is given back at the end, where the sums are known: of logits that are
// near 0, and of nothing but -inf.
template <class T>
struct PowersOfTwo {
  T scale, max = -infinity<T>(), anchor = -kFar<T>, sum = 0, weighted = 0;

  template <int kCount>
  __device__ __forceinline__ void take(const T (&y)[kCount], T highest) {
    const T moved = ::fmax(scale * highest, -kFar<T>), shift = anchor - moved, shrunk = power_of_two(shift);
    weighted = (weighted + sum * shift) * shrunk;
    sum *= shrunk;
    max = highest;
    anchor = moved;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const T t = ::fma(scale, y[k], -anchor), e = power_of_two(t);
      sum += e;
      weighted += e * ::fmax(t, kNoPower<T>);  // finite, so that 0 * -inf is 0
    }
  }
  __device__ __forceinline__ bool is_known() const { return is_near(scale, anchor) || max == -infinity<T>(); }
  // The largest logit itself is 1 of the sum and 0 of the other, exactly: of a sure row the entropy is 0, not below.
  __device__ __forceinline__ Softmax<T> softmax() const {
    if (max == -infinity<T>()) return {max, sum, weighted, T(0)};
    const T rest = ::fma(scale, max, -anchor), peak = power_of_two(rest);
    return {max, 1 + (sum - peak) / peak, smaller((weighted - sum * rest) / (peak * scale), T(0)), T(0)};
  }
};

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
    own.x[k] = known ? row.raw(own.id[k]) : infinity<T>();
  }
  return own;
}

template <class Logit, class T, class Who>
__device__ __forceinline__ typename SoftmaxOnly<T, Who>::Part visit(const LogprobArgs<Logit, T>&,
                                                                    const RowView<Logit, T, SoftmaxOnly<T, Who>>& row,
                                                                    int64_t begin, int64_t end, int64_t) {
  const T factor = row.transform.factor;
  PowersOfTwo<T> powers{factor * kLog2E<T>};
  for_packs<Who>(
      row.logits, begin, end,
      [&](const auto& packs, int64_t) {
        T y[sizeof packs / sizeof(Logit)];
        widen_packs(packs, y);
        powers.take(y, highest_of(powers.max, packs));
      },
      [&](int64_t v) {
        const T y[1] = {row.raw(v)};
        powers.take(y, ::fmax(powers.max, y[0]));
      });
  if (powers.is_known()) return SoftmaxOnly<T, Who>::part_of(powers.softmax());
  Softmax<T> one_by_one = no_logits<T>();
  const auto one = [&](T y, int64_t) { take(one_by_one, y, factor); };
  for_packs_in_one_loop<Who, 1>(
      row.logits, begin, end, [&](const auto& packs, int64_t first) { for_each_of<Who>(packs, first, one); },
      [&](int64_t v) { one(row.raw(v), v); });
  return SoftmaxOnly<T, Who>::part_of(one_by_one);
}

template <class Logit, class T>
__device__ __forceinline__ typename Everything<T>::Part visit(const LogprobArgs<Logit, T>& args,
                                                              const RowView<Logit, T, Everything<T>>& row,
                                                              int64_t begin, int64_t end, int64_t first_id) {
  typename Everything<T>::Part part;
  const OwnIds<T> own = own_ids(args, row, first_id);
  const T factor = row.transform.factor;
  const auto one = [&](T logit, int64_t v) {
    const T x = row.raw(logit, v), y = row.capped(x);
    take(part.found, y, factor);
    const bool kept = row.keeps(v);
    part.total += kept ? static_cast<double>(y) : 0.0;
    part.kept += kept;
#pragma unroll
    for (int k = 0; k < kIdsPerPass; ++k) {
      if (k >= own.count) break;
      part.above[k] += x > own.x[k];
      part.equal_before[k] += x == own.x[k] && v < own.id[k];
    }
  };
  for_packs_in_one_loop<BlockReads>(
      row.logits, begin, end, [&](const auto& packs, int64_t first) { for_each_of<BlockReads>(packs, first, one); },
      [&](int64_t v) { one(static_cast<T>(widen(row.logits[v])), v); });
  return part;
}

}  // namespace tokenrl::cuda
