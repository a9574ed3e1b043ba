// One vector register of floats of the instruction set that a file is compiled for, and its 16-bit loads. Only for
// sources that are compiled once per instruction set: everything here is inlined.
#pragma once

#ifdef __x86_64__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // what GCC 12 says of its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "../vocabulary.h"

namespace tokenrl::cpu::TOKENRL_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// What one step of a loop takes: two chains in turns, because one is longer than the processor looks ahead. More of
// them would not leave registers for the sums.
constexpr int kUnroll = 2;
constexpr int64_t kStep = kLanes * kUnroll;

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));

// The same register of doubles, for loops that are written once for both.
using Doubles = double __attribute__((vector_size(4 * kLanes)));
template <class T>
using Vector = std::conditional_t<std::is_same_v<T, double>, Doubles, Floats>;
template <class T>
constexpr int kWidth = sizeof(Floats) / sizeof(T);
template <class T>
constexpr int64_t kStepOf = kWidth<T> * kUnroll;

#define TRL_INLINE inline __attribute__((always_inline))
#define TRL_INLINE_LAMBDA __attribute__((always_inline))

TRL_INLINE Floats all(float x) { return x - Floats{}; }
TRL_INLINE Doubles all(double x) { return x - Doubles{}; }

// b where a NaN is compared; and 16-bit words widened. The compilers of today find these instructions only by name.
#if defined(__AVX512F__)
TRL_INLINE Floats higher(Floats a, Floats b) { return _mm512_max_ps(a, b); }
TRL_INLINE Floats lower(Floats a, Floats b) { return _mm512_min_ps(a, b); }
TRL_INLINE Words load_bits(const void* x) {
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(x)));
}
#elif defined(__AVX2__)
TRL_INLINE Floats higher(Floats a, Floats b) { return _mm256_max_ps(a, b); }
TRL_INLINE Floats lower(Floats a, Floats b) { return _mm256_min_ps(a, b); }
TRL_INLINE Words load_bits(const void* x) {
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(x)));
}
#else
TRL_INLINE Floats higher(Floats a, Floats b) { return a > b ? a : b; }
TRL_INLINE Floats lower(Floats a, Floats b) { return a < b ? a : b; }
TRL_INLINE Words load_bits(const void* x) {
  uint16_t __attribute__((vector_size(2 * kLanes))) bits;
  std::memcpy(&bits, x, sizeof bits);
  return __builtin_convertvector(bits, Words);
}
#endif

TRL_INLINE Doubles lower(Doubles a, Doubles b) { return a < b ? a : b; }

TRL_INLINE Floats load(const float* x) {
  Floats lanes;
  std::memcpy(&lanes, x, sizeof lanes);
  return lanes;
}
TRL_INLINE Doubles load(const double* x) {
  Doubles lanes;
  std::memcpy(&lanes, x, sizeof lanes);
  return lanes;
}
TRL_INLINE Floats load(const BFloat16* x) { return (Floats)(load_bits(x) << 16); }
TRL_INLINE Floats load(const Half* x) {  // as widen(Half)
  const Words bits = load_bits(x), magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const Words special = (Words)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (Floats)((Words)((Floats)magnitude * 0x1p112f) | special | sign);
}

// Asks for what a later step will read, 4 KiB ahead: the processor's own foresight ends at a page's end.
template <class Stored>
TRL_INLINE void prefetch_after(const Stored* step) {
  const char* bytes = reinterpret_cast<const char*>(step);
  for (size_t line = 0; line < sizeof(Stored) * kStep; line += 64) __builtin_prefetch(bytes + 4096 + line);
}

// The last n of a block's numbers, filled up with -inf to a whole step.
template <class Stored>
struct LastStep {
  using T = decltype(widen(Stored{}));
  Stored numbers[kStepOf<T>];

  TRL_INLINE LastStep(const Stored* x, int64_t n) {
    for (int64_t k = 0; k < kStepOf<T>; ++k) numbers[k] = k < n ? x[k] : narrow<Stored>(-infinity<T>());
  }
};

// Each vector is stored on its own: as one piece of memory, the array would lie there during the loop before.
TRL_INLINE void store(const Floats (&x)[kUnroll], float (&lanes)[kStep]) {
#pragma GCC unroll 4
  for (int u = 0; u < kUnroll; ++u) std::memcpy(lanes + u * kLanes, &x[u], sizeof x[u]);
}
TRL_INLINE double sum_of(const Doubles (&x)[kUnroll]) {
  double lanes[kStepOf<double>], sum = 0;
  std::memcpy(lanes, x, sizeof lanes);
  for (const double lane : lanes) sum += lane;
  return sum;
}
TRL_INLINE float sum_of(const Floats (&x)[kUnroll]) {
  float lanes[kStep], sum = 0;
  store(x, lanes);
  for (const float lane : lanes) sum += lane;
  return sum;
}
TRL_INLINE float highest_of(const Floats (&x)[kUnroll]) {
  float lanes[kStep], highest = -infinity<float>();
  store(x, lanes);
  for (const float lane : lanes) highest = larger(highest, lane);
  return highest;
}

// e^(factor d), factor d up to 88: leaner than exponential(), which takes any argument.
template <class T>
struct Exponential;

template <>
struct Exponential<double> {
  double factor;

  explicit Exponential(double given) : factor(given) {}
  TRL_INLINE double operator()(double d) const { return exponential(factor * d); }
  TRL_INLINE double bounded(double d) const { return d < -1e300 ? -1e300 : d; }
  TRL_INLINE void operator()(const Doubles (&d)[kUnroll], Doubles (&e)[kUnroll]) const {
    double lanes[kStepOf<double>];
    std::memcpy(lanes, d, sizeof lanes);
    for (double& lane : lanes) lane = exponential(factor * lane);
    std::memcpy(e, lanes, sizeof lanes);
  }
  TRL_INLINE Doubles bounded(Doubles d) const { return d < -1e300 ? all(-1e300) : d; }
};

// 2^t for t = d factor log2(e), whose constant is kept in two pieces: t = n + r, 2^r = 1 + r q(r) within 1e-7, and n
// goes straight into the exponent's bits. Below 2^-125, where n = -126 would leave a subnormal number, d is held: -inf
// then weighs 2e-38.
template <>
struct Exponential<float> {
  float high, low, least;

  explicit Exponential(double factor)
      : high(static_cast<float>(factor * 1.4426950408889634)),
        low(static_cast<float>(factor * 1.4426950408889634 - static_cast<double>(high))),
        least(static_cast<float>(-125 / (factor * 1.4426950408889634))) {}
  // For each vector of d: every step for all of them before the next.
  TRL_INLINE void operator()(const Floats (&d)[kUnroll], Floats (&e)[kUnroll]) const {
    Floats shifted[kUnroll], r[kUnroll];
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      // Adding and taking away 1.5 * 2^23 rounds; the sum's lowest bits are the integer.
      shifted[u] = d[u] * high + 12582912.0f;
      r[u] = (d[u] * high - (shifted[u] - 12582912.0f)) + d[u] * low;
      e[u] = r[u] * 0.001326472731f + 0.009671512991f;
    }
    horner(e, r, 0.05550733581f);
    horner(e, r, 0.2402224243f);
    horner(e, r, 0.6931470037f);
    horner(e, r, 1.0f);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) e[u] = (Floats)((Words)e[u] + ((Words)shifted[u] << 23));
  }
  TRL_INLINE Floats bounded(Floats d) const { return higher(all(least), d); }

 private:
  TRL_INLINE static void horner(Floats (&e)[kUnroll], const Floats (&r)[kUnroll], float coefficient) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) e[u] = e[u] * r[u] + coefficient;
  }
};

}  // namespace tokenrl::cpu::TOKENRL_ISA
