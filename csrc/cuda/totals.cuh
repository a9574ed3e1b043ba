// What the objective adds up over tokens, and then over sequences.
#pragma once

#include "../kernels.h"
#include "block.cuh"

namespace tokenrl::cuda {

// Loss and metrics of some tokens.
template <class T, class Count>
struct Totals {
  T loss, ratio_sum, ratio_min, ratio_max, kl_sum, ratio_squares;
  Count tokens, low, high, dual;

  __device__ __forceinline__ static Totals nothing() {
    return {T(0), T(0), infinity<T>(), -infinity<T>(), T(0), T(0), 0, 0, 0, 0};
  }

  template <class U, class C>
  __device__ __forceinline__ void add(const Totals<U, C>& other) {
    loss += other.loss;
    ratio_sum += other.ratio_sum;
    ratio_min = smaller(ratio_min, T(other.ratio_min));
    ratio_max = larger(ratio_max, T(other.ratio_max));
    kl_sum += other.kl_sum;
    ratio_squares += other.ratio_squares;
    tokens += other.tokens;
    low += other.low;
    high += other.high;
    dual += other.dual;
  }

  __device__ __forceinline__ T metric(int which) const {
    switch (which) {
      case kTokens: return T(tokens);
      case kRatioSum: return ratio_sum;
      case kRatioMin: return ratio_min;
      case kRatioMax: return ratio_max;
      case kLow: return T(low);
      case kHigh: return T(high);
      case kDual: return T(dual);
      case kKlSum: return kl_sum;
      default: return ratio_squares;
    }
  }
};

template <class T>
using SequenceTotals = Totals<T, int32_t>;
using BatchTotals = Totals<double, int64_t>;

struct Add {
  template <class S>
  __device__ __forceinline__ S operator()(S a, const S& b) const {
    a.add(b);
    return a;
  }
};

}  // namespace tokenrl::cuda
