// What one logit does to a row's log-prob, entropy and gradient; 16-bit logits and their conversions. Host and device.
#pragma once

#include "scalar.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace tokenrl {

inline constexpr int64_t kIgnoredId = -100;

// Storage of 16-bit logits; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

TRL_HD float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
TRL_HD uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

TRL_HD float widen(float x) { return x; }
TRL_HD double widen(double x) { return x; }
TRL_HD float widen(BFloat16 x) { return float_of_bits(uint32_t{x.bits} << 16); }
TRL_HD float widen(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // The exponent's bias differs by 112; the product also makes subnormals normal. All ones stay all ones: inf and NaN.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return float_of_bits(bits_of_float(float_of_bits(magnitude) * 0x1p112f) | special | sign);
#endif
}

// Rounds to nearest, ties to even.
template <class Logit>
TRL_HD Logit narrow(float x) {
  return x;
}
template <class Logit>
TRL_HD Logit narrow(double x) {
  return static_cast<Logit>(x);
}
template <>
TRL_HD BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
TRL_HD Half narrow<Half>(float x) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  uint32_t half;
  if (magnitude > 0x7f800000u)
    half = 0x7e00u;
  else if (magnitude >= 0x47800000u)
    half = 0x7c00u;
  // Below the smallest normal half, adding 0.5 lines the bits up with a subnormal's and rounds them.
  else if (magnitude < 0x38800000u)
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  else
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  return {static_cast<uint16_t>(sign | half)};
#endif
}

// Online softmax of some logits z: their maximum m, sum e^(z - m), and sum e^(z - m) (z - m).
template <class T>
struct Softmax {
  T max, sum, weighted;
};

template <class T>
TRL_HD Softmax<T> no_logits() {
  return {-infinity<T>(), T(0), T(0)};
}

// The same state relative to another, not smaller maximum. A state of nothing but -inf stays empty. Logits masked by
// the lowest finite number shift so far that sum * shift overflows: what no longer has a weight is selected away, not
// multiplied by 0.
template <class T>
TRL_HD Softmax<T> rescaled(const Softmax<T>& a, T max) {
  const T shift = a.sum > 0 ? a.max - max : T(0), scale = exponential(shift);
  return {max, a.sum * scale, scale > 0 ? (a.weighted + a.sum * shift) * scale : T(0)};
}

template <class T>
TRL_HD Softmax<T> merge(const Softmax<T>& a, const Softmax<T>& b) {
  const T max = larger(a.max, b.max);
  const Softmax<T> x = rescaled(a, max), y = rescaled(b, max);
  return {max, x.sum + y.sum, x.weighted + y.weighted};
}

// z = -inf has no weight; NaN goes through to the sums.
template <class T>
TRL_HD void take(Softmax<T>& state, T z) {
  if (z > state.max) state = rescaled(state, z);
  if (z == -infinity<T>()) return;
  const T shift = z - state.max, e = exponential(shift);
  state.sum += e;
  state.weighted += e * shift;
}

template <class T>
TRL_HD T log_sum(const Softmax<T>& a) {
  return a.max + ::log(a.sum);
}
template <class T>
TRL_HD T entropy_of(const Softmax<T>& a) {
  return ::log(a.sum) - a.weighted / a.sum;
}

// d/dz of g_logp logp + g_entropy H at one logit: g_logp (1[z is the id's] - p) - g_entropy p (log p + H).
template <class T>
TRL_HD T logit_gradient(T z, T lse, T entropy, T grad_logp, T grad_entropy, bool own) {
  const T log_p = z - lse, p = exponential(log_p);
  const T through_entropy = p > 0 ? grad_entropy * p * (log_p + entropy) : T(0);
  return grad_logp * ((own ? T(1) : T(0)) - p) - through_entropy;
}

}  // namespace tokenrl
