// What the objective adds up over tokens, and then over tiles of sequences.
#pragma once

#include "../kernels.h"
#include "block.cuh"

namespace tokenrl::cuda {

// e^x beyond the range of floats: 2^n into the exponent of a double that is e^(x - n ln2).
__device__ __forceinline__ double ratio_of(double s) { return wide_exponential(s); }
__device__ __forceinline__ double ratio_of(float s) {
  const float shifted = ::fmaf(clamp(s, -708.0f, 709.0f), 1.44269504088896341f, 12582912.0f), n = shifted - 12582912.0f;
  const float rest = ::fmaf(n, 2.12194440e-4f, ::fmaf(n, -0.693359375f, clamp(s, -708.0f, 709.0f)));
  const auto exponent = static_cast<uint64_t>(same_bits<uint32_t>(shifted) << 20) << 32;
  const double ratio = same_bits<double>(same_bits<uint64_t>(static_cast<double>(exponential(rest))) + exponent);
  return s < -708.0f ? 0.0 : s > 709.0f ? infinity<double>() : s == s ? ratio : static_cast<double>(s);
}

// What a gate's bounds do to a token, two counts to a word: there are fewer than 2^16 tokens in a tile.
struct BoundCounts {
  uint32_t tokens_dual, low_high, low_high_positive;

  __device__ __forceinline__ static uint32_t both(bool first, bool second) {
    return (first ? 1u : 0u) | (second ? 1u << 16 : 0u);
  }
};

// Loss and metrics of some tokens of a tile; least and most are statistics. The sums of ratios are double, as floats
// end at e^88 and could not square what is beyond e^44: a few such operations per token hide behind its loads.
template <class T>
struct TileTotals {
  T loss, least, most, log_ratio_sum;
  double ratio_sum, kl_sum, ratio_squares;
  BoundCounts counts;
  uint32_t unused;

  __device__ __forceinline__ static TileTotals nothing() {
    return {T(0), infinity<T>(), -infinity<T>(), T(0), 0, 0, 0, {}, 0};
  }
  __device__ __forceinline__ void add(const TileTotals& other) {
    loss += other.loss;
    least = smaller(least, other.least);
    most = larger(most, other.most);
    log_ratio_sum += other.log_ratio_sum;
    ratio_sum += other.ratio_sum;
    kl_sum += other.kl_sum;
    ratio_squares += other.ratio_squares;
    counts.tokens_dual += other.counts.tokens_dual;
    counts.low_high += other.counts.low_high;
    counts.low_high_positive += other.counts.low_high_positive;
  }
};

// The metrics of many tiles; those of the ratios' logarithms become the ratios' at the end.
struct BatchTotals {
  double loss, metrics[kNumMetrics];

  __device__ __forceinline__ static BatchTotals nothing() {
    BatchTotals none{};
    none.metrics[kRatioMin] = infinity<double>(), none.metrics[kRatioMax] = -infinity<double>();
    return none;
  }
  __device__ __forceinline__ void add(const BatchTotals& other) {
    loss += other.loss;
#pragma unroll
    for (int m = 0; m < kNumMetrics; ++m)
      metrics[m] = m == kRatioMin   ? smaller(metrics[m], other.metrics[m])
                   : m == kRatioMax ? larger(metrics[m], other.metrics[m])
                                    : metrics[m] + other.metrics[m];
  }
  template <class T>
  __device__ __forceinline__ static BatchTotals of(const TileTotals<T>& tile) {
    const BoundCounts& counts = tile.counts;
    BatchTotals totals{};
    totals.loss = tile.loss;
    double* const m = totals.metrics;
    m[kTokens] = counts.tokens_dual & 0xffff, m[kDual] = counts.tokens_dual >> 16;
    m[kLow] = counts.low_high & 0xffff, m[kHigh] = counts.low_high >> 16;
    m[kLowPos] = counts.low_high_positive & 0xffff, m[kHighPos] = counts.low_high_positive >> 16;
    m[kRatioMin] = tile.least, m[kRatioMax] = tile.most, m[kLogRatioSum] = tile.log_ratio_sum;
    m[kRatioSum] = tile.ratio_sum, m[kKlSum] = tile.kl_sum, m[kRatioSquares] = tile.ratio_squares;
    return totals;
  }
  __device__ __forceinline__ double metric(int which) const {
    const bool is_logarithm = which == kRatioMin || (which == kRatioMax && metrics[kTokens] > 0);
    return is_logarithm ? wide_exponential(metrics[which]) : metrics[which];
  }
};

struct Add {
  template <class S>
  __device__ __forceinline__ S operator()(S a, const S& b) const {
    a.add(b);
    return a;
  }
};

}  // namespace tokenrl::cuda
