// Scalar functions that gates and statistics are written in, for host and device, float and double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __CUDACC__
#define TRL_HD __host__ __device__ inline
#else
#define TRL_HD \
  inline __attribute__((always_inline))  // no copy of one instruction set is ever linked into another's code
#endif

namespace tokenrl {

template <class T>
TRL_HD constexpr T infinity() {
  return std::numeric_limits<T>::infinity();
}

// Selections instead of fmin/fmax: they vectorise, and the first argument wins where a NaN is compared.
template <class T>
TRL_HD T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
TRL_HD T larger(T a, T b) {
  return b > a ? b : a;
}
template <class T>
TRL_HD T clamp(T x, T low, T high) {
  return smaller(larger(x, low), high);
}

// a where c, else b. Of floats on a CPU by their bits: what the compiler sees as choices it joins to branches, which
// loops over tokens cannot have, or can only by several times the instructions.
template <class T>
TRL_HD T select(bool c, T a, T b) {
#ifndef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, float>) {
    uint32_t yes, no;
    std::memcpy(&yes, &a, sizeof a);
    std::memcpy(&no, &b, sizeof b);
    const uint32_t chosen = 0u - uint32_t{c}, bits = (yes & chosen) | (no & ~chosen);
    std::memcpy(&a, &bits, sizeof a);
    return a;
  }
#endif
  return c ? a : b;
}

// a b, where a factor a of 0 hides even an infinite b.
template <class T>
TRL_HD T product(T a, T b) {
  return select(a == 0, T(0), a * b);
}

// Functions of F take a float or, where a file is compiled for an instruction set, a vector of them.
// Words as wide as F; those of vectors are signed.
template <class F>
struct WordsOf {
  using type = decltype(F{} < F{});
  using with_sign = type;
};
template <>
struct WordsOf<float> {
  using type = uint32_t;
  using with_sign = int32_t;
};
template <class To, class From>
TRL_HD To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// e^x in straight-line code, so that loops over tokens and vocabularies vectorise: x = n ln2 + r, |r| <= ln2 / 2, a
// degree-6 polynomial for e^r (below 1.5 ulp together), and n added to its exponent's bits. What is below the normal
// numbers is 0.
template <class F>
TRL_HD F straight_exponential(F x) {
  // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, which the sum's lowest bits then are.
  const F rounded = x * 1.44269504088896341f + 12582912.0f, n = rounded - 12582912.0f;
  F r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  using Words = typename WordsOf<F>::type;
  F y = same_bits<F>(same_bits<Words>(p) + (same_bits<Words>(rounded) << 23));
  y = x < -87.3f ? F{} : y;
  return x > 88.7f ? F{} + infinity<float>() : y;
}
TRL_HD double exponential(double x) { return ::exp(x); }
#ifdef __CUDA_ARCH__
TRL_HD float exponential(float x) { return ::expf(x); }
#else
TRL_HD float exponential(float x) { return straight_exponential(x); }
#endif
// Of a vector: of floats all at once, of doubles one after another.
template <class V>
TRL_HD V exponential(V x) {
  if constexpr (sizeof(x[0]) == sizeof(float)) return straight_exponential(x);
  for (size_t k = 0; k < sizeof x / sizeof x[0]; ++k) x[k] = exponential(x[k]);
  return x;
}

// e^x - 1 - x, what k3 is made of, without cancellation near 0: its series there, the direct form elsewhere. power:
// e^x.
TRL_HD float excess(float x, float power) {
  float p = 2.75573192e-6f;
  p = p * x + 2.48015873e-5f;
  p = p * x + 1.98412698e-4f;
  p = p * x + 1.38888889e-3f;
  p = p * x + 8.33333333e-3f;
  p = p * x + 4.16666667e-2f;
  p = p * x + 1.66666667e-1f;
  p = p * x + 0.5f;
  const float direct = power - (x < 40.0f ? 1.0f + x : 0.0f);  // beyond: nothing to e^x, or inf - inf
  return select((x > -0.5f) & (x < 0.5f), p * x * x, direct);
}
TRL_HD float excess(float x) { return excess(x, exponential(x)); }
TRL_HD double excess(double x) {
  constexpr double inverse_factorials[] = {
      1 / 1307674368000.0, 1 / 87178291200.0, 1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0,
      1 / 3628800.0,       1 / 362880.0,      1 / 40320.0,      1 / 5040.0,      1 / 720.0,
      1 / 120.0,           1 / 24.0,          1 / 6.0,          1 / 2.0};
  double p = 1 / 20922789888000.0;
  for (const double coefficient : inverse_factorials) p = p * x + coefficient;
  return (x > -0.5) & (x < 0.5) ? p * x * x : ::expm1(x) - (x < 40 ? x : 0.0);
}
TRL_HD double excess(double x, double) { return excess(x); }

// e^x beyond the range of floats: of a float's precision, with a double's exponent.
TRL_HD double wide_exponential(double x) { return exponential(x); }
TRL_HD double wide_exponential(float x) {
  const float bounded = clamp(x == x ? x : 0.0f, -708.0f, 709.0f);
  const float shifted = bounded * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;
  float r = bounded - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  const int64_t bits = static_cast<int64_t>(static_cast<int32_t>(n) + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  const double y = static_cast<double>(exponential(r)) * power;
  return x < -708.0f ? 0.0 : x > 709.0f ? infinity<double>() : x == x ? y : static_cast<double>(x);
}
template <class T>
TRL_HD double wide_excess(T x) {
  return x < 60 ? static_cast<double>(excess(x)) : wide_exponential(x);
}

// m / (m + 2) with m = e^2x - 1, exact near 0; beyond 20 it is 1.
TRL_HD double hyperbolic_tangent(double x) {
  const double m = ::expm1(clamp(2 * x, -40.0, 40.0));
  return m / (m + 2);
}
// 1 - 2 / (e^2|x| + 1), an odd polynomial near 0: straight-line code.
TRL_HD float hyperbolic_tangent(float x) {
  const float size = larger(x, -x), square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float far = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  return size < 0.625f ? p * square * x + x : x < 0 ? -far : far;
}

// log x for normal x > 0, as straight-line code: x = 2^n m with m in [sqrt(1/2), sqrt(2)), a polynomial for log m.
template <class F>
TRL_HD F straight_logarithm(F x) {
  using Words = typename WordsOf<F>::with_sign;
  const Words bits = same_bits<Words>(x), n = (bits - 0x3f3504f3) >> 23;
  const F m = same_bits<F>(bits - n * (1 << 23)) - 1.0f;
  F p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const F square = m * m, k = same_bits<F>(n + 0x4b400000) - 12582912.0f;  // the float of n
  return k * 0.693359375f + (m + (p * m * square - 0.5f * square - k * 2.12194440e-4f));
}
TRL_HD double logarithm(double x) { return ::log(x); }
#ifdef __CUDA_ARCH__
TRL_HD float logarithm(float x) { return ::logf(x); }
#else
TRL_HD float logarithm(float x) { return straight_logarithm(x); }
#endif
template <class V>
TRL_HD V logarithm(V x) {
  if constexpr (sizeof(x[0]) == sizeof(float)) return straight_logarithm(x);
  for (size_t k = 0; k < sizeof x / sizeof x[0]; ++k) x[k] = logarithm(x[k]);
  return x;
}

// 1 where a == b, else 0, by arithmetic: a comparison of what a loop does not change becomes a branch, and the loop
// does not vectorise.
TRL_HD float same(float a, float b) { return larger(0.0f, 1.0f - 1e30f * ::fabsf(a - b)); }

// t^p for a count t >= 1; the powers that methods use are exact.
TRL_HD double power(double t, double p) { return p == 0.5 ? ::sqrt(t) : ::pow(t, p); }
TRL_HD float power(float t, float p) {
  const float up = same(p, 0.5f), down = same(p, -0.5f), root = ::sqrtf(t);
  return up * root + down / root + (1.0f - up - down) * exponential(p * logarithm(t));
}

}  // namespace tokenrl
