// What the objective adds up over tokens, and then over sequences.
#pragma once

#include "../kernels.h"
#include "block.cuh"

namespace tokenrl::cuda {

// Loss and metrics of some tokens; least and most are statistics. The sums of ratios are double, as floats end at e^88
// and could not square what is beyond e^44: a few such operations per token hide behind its loads.
template <class T, class Count>
struct Totals {
  T loss, least, most, log_ratio_sum;
  double ratio_sum, kl_sum, ratio_squares;
  Count tokens, low, high, dual, low_pos, high_pos;

  __device__ __forceinline__ static Totals nothing() {
    return {T(0), infinity<T>(), -infinity<T>(), T(0), 0, 0, 0, 0, 0, 0, 0, 0, 0};
  }

  template <class U, class C>
  __device__ __forceinline__ void add(const Totals<U, C>& other) {
    loss += other.loss;
    least = smaller(least, T(other.least));
    most = larger(most, T(other.most));
    log_ratio_sum += other.log_ratio_sum;
    ratio_sum += other.ratio_sum;
    kl_sum += other.kl_sum;
    ratio_squares += other.ratio_squares;
    tokens += other.tokens;
    low += other.low;
    high += other.high;
    dual += other.dual;
    low_pos += other.low_pos;
    high_pos += other.high_pos;
  }

  __device__ __forceinline__ double metric(int which) const {
    switch (which) {
      case kTokens: return double(tokens);
      case kRatioSum: return ratio_sum;
      case kRatioMin: return wide_exponential(least);
      case kRatioMax: return tokens ? wide_exponential(most) : double(most);
      case kLow: return double(low);
      case kHigh: return double(high);
      case kDual: return double(dual);
      case kKlSum: return kl_sum;
      case kRatioSquares: return ratio_squares;
      case kLogRatioSum: return double(log_ratio_sum);
      case kLowPos: return double(low_pos);
      default: return double(high_pos);
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
