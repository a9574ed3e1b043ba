// What the objective adds up: over a thread's tokens of a tile, over a tile, over all of them.
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

// x up to `high`, and from `low` on; a NaN stays one. In one instruction each.
__device__ __forceinline__ float at_most(float x, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(high));
  return y;
#else
  return smaller(x, high);
#endif
}
__device__ __forceinline__ double at_most(double x, double high) { return smaller(x, high); }
__device__ __forceinline__ float within(float x, float low, float high) { return -at_most(-at_most(x, high), -low); }
__device__ __forceinline__ double within(double x, double low, double high) { return clamp(x, low, high); }

// t^p of a count, in straight-line code for each kind of p: power() of scalar.h, whose roots are also those of
// subnormal numbers.
__device__ __forceinline__ double power_of_count(double t, double p) { return power(t, p); }
__device__ __forceinline__ float power_of_count(float t, float p) {
#ifdef __CUDA_ARCH__
  const float inverse = ::rsqrtf(t), rough = t * inverse;
  const float root = ::fmaf(::fmaf(-rough, rough, t), 0.5f * inverse, rough);  // rounded as sqrtf is
  if (p == 0.5f) return root;
  return p == -0.5f ? __frcp_rn(root) : exponential(p * logarithm(t));
#else
  return power(t, p);
#endif
}
template <class Gate, class T>
__device__ __forceinline__ T power_at([[maybe_unused]] T position, [[maybe_unused]] const ParamsOf<Gate, T>& params) {
  if constexpr (Gate::positional) return power_of_count(position, params.power);
  else return T(1);
}

// Sums over tokens of the ratio, of the own ratio's k3, and of the ratio's square.
template <class T>
struct RatioSums {
  T sum, excess, squares;

  template <class Other>
  __device__ __forceinline__ void add(const RatioSums<Other>& other) {
    sum += other.sum, excess += other.excess, squares += other.squares;
  }
};

// Within +-40 a ratio's square, as a float, has all its digits; floats end at e^88.
template <class T>
__device__ __forceinline__ bool are_near(T least, T most) {
  return sizeof(T) == 8 || (least >= -40 && most <= 40);
}

// What a gate does to the tokens of one thread: five counts of five bits, as a thread has 16 tokens of a tile at most.
struct Marks {
  static constexpr uint32_t kLow = 1, kHigh = 1 << 5, kDual = 1 << 10, kPositive = 1 << 15;
  uint32_t word = 0;

  template <class T>
  __device__ __forceinline__ void add(const Gated<T>& gated, bool positive) {
    const uint32_t bounds = (gated.low > 0 ? kLow : 0) | (gated.high > 0 ? kHigh : 0);
    word += bounds * (positive ? 1 + kPositive : 1);
    word += gated.dual > 0 ? kDual : 0;
  }
  __device__ __forceinline__ uint32_t count(uint32_t of) const { return word / of & 31; }
};

// Ratios of a thread's tokens of a tile, few enough for sums of T; least and most are statistics, largest a log ratio.
template <class T>
struct alignas(16) RatioTotals {
  T least, most, largest, log_ratio_sum;
  RatioSums<T> near;
  uint32_t tokens;

  __device__ __forceinline__ static RatioTotals nothing() {
    return {infinity<T>(), -infinity<T>(), -infinity<T>(), T(0), {}, 0};
  }
  // Of one token; power: e^x
  __device__ __forceinline__ void add(T s, T ratio, T x, T power, RatioSums<T>& ratios) {
    least = ::fmin(least, s), most = ::fmax(most, s), largest = ::fmax(largest, x);
    log_ratio_sum += x;
    ratios.sum += ratio;
    ratios.excess += excess(x, power);
    ratios.squares = ::fma(ratio, ratio, ratios.squares);
  }
  __device__ __forceinline__ bool are_near() const { return cuda::are_near<T>(least, ::fmax(most, largest)); }
};

// What a thread keeps in shared memory, as its registers are the gate's. far: of those tokens that near is without,
// and of use where are_near() is not.
template <class T>
struct ThreadRatios {
  RatioTotals<T> totals;
  RatioSums<double> far;
  int64_t tile, end;  // the tile that it works on, and where that ends
};

// Those of many threads. The sums of ratios are double.
template <class T>
struct TileTotals {
  T loss, least, most, log_ratio_sum;
  RatioSums<double> ratios;
  uint32_t tokens_dual, low_high, low_high_positive;  // two counts each: there are fewer than 2^16 tokens in a tile
  uint32_t unused;

  __device__ __forceinline__ static TileTotals of(T loss, const Marks& marks, const ThreadRatios<T>& of_thread) {
    const RatioTotals<T> own = of_thread.totals;
    TileTotals totals{loss, own.least, own.most, own.log_ratio_sum, {}, 0, 0, 0, 0};
    totals.ratios.add(own.near);
    if (!own.are_near()) totals.ratios.add(of_thread.far);
    totals.tokens_dual = own.tokens | marks.count(Marks::kDual) << 16;
    totals.low_high = marks.count(Marks::kLow) | marks.count(Marks::kHigh) << 16;
    totals.low_high_positive =
        marks.count(Marks::kLow * Marks::kPositive) | marks.count(Marks::kHigh * Marks::kPositive) << 16;
    return totals;
  }
  __device__ __forceinline__ void add(const TileTotals& other) {
    loss += other.loss;
    least = ::fmin(least, other.least), most = ::fmax(most, other.most);
    log_ratio_sum += other.log_ratio_sum;
    ratios.add(other.ratios);
    tokens_dual += other.tokens_dual;
    low_high += other.low_high;
    low_high_positive += other.low_high_positive;
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
    BatchTotals totals{};
    totals.loss = tile.loss;
    double* const m = totals.metrics;
    m[kTokens] = tile.tokens_dual & 0xffff, m[kDual] = tile.tokens_dual >> 16;
    m[kLow] = tile.low_high & 0xffff, m[kHigh] = tile.low_high >> 16;
    m[kLowPos] = tile.low_high_positive & 0xffff, m[kHighPos] = tile.low_high_positive >> 16;
    m[kRatioMin] = tile.least, m[kRatioMax] = tile.most, m[kLogRatioSum] = tile.log_ratio_sum;
    m[kRatioSum] = tile.ratios.sum, m[kKlSum] = tile.ratios.excess, m[kRatioSquares] = tile.ratios.squares;
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
