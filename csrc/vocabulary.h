// What one logit does to a row's log-prob, entropy and gradient; 16-bit logits and their conversions. Host and device.
#pragma once

#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
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
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = bits_of_float(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}
template <>
TRL_HD Half narrow<Half>(float x) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  uint32_t half;
  if (magnitude > 0x7f800000u) half = 0x7e00u;
  else if (magnitude >= 0x47800000u) half = 0x7c00u;
  // Below the smallest normal half, adding 0.5 lines the bits up with a subnormal's and rounds them.
  else if (magnitude < 0x38800000u) half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  else half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  return {static_cast<uint16_t>(sign | half)};
#endif
}

// Online softmax of z = factor y over some logits, y relative to the largest: max y, sum e^(z - max z), the sum of
// those times (y - max y), and of their squares.
template <class T>
struct Softmax {
  T max, sum, weighted, squares;
};

template <class T>
TRL_HD Softmax<T> no_logits() {
  return {-infinity<T>(), T(0), T(0), T(0)};
}

// The same state relative to another, not smaller maximum. A state of nothing but -inf stays empty. Logits masked by
// the lowest finite number shift so far that sum * shift overflows: what no longer has a weight is selected away, not
// multiplied by 0.
template <class T>
TRL_HD Softmax<T> rescaled(const Softmax<T>& a, T max, T factor) {
  const T shift = a.sum > 0 ? a.max - max : T(0), scale = exponential(factor * shift);
  return {max, a.sum * scale, scale > 0 ? (a.weighted + a.sum * shift) * scale : T(0), a.squares * scale * scale};
}

template <class T>
TRL_HD Softmax<T> merge(const Softmax<T>& a, const Softmax<T>& b, T factor) {
  const T max = larger(a.max, b.max);
  const Softmax<T> x = rescaled(a, max, factor), y = rescaled(b, max, factor);
  return {max, x.sum + y.sum, x.weighted + y.weighted, x.squares + y.squares};
}

// z = factor y for one row.
template <class T>
struct RowTransform {
  T softcap, logit_scale, factor;
  bool capped;

  TRL_HD RowTransform(const Transform<T>& transform, int64_t row)
      : softcap(transform.softcap), logit_scale(transform.logit_scale), capped(transform.softcap < infinity<T>()) {
    const T temperature = transform.temperatures ? transform.temperatures[row] : transform.temperature;
    factor = (capped ? T(1) : logit_scale) / temperature;
  }
  // A logit of -inf was taken out of the vocabulary, and stays out under a softcap.
  TRL_HD T cap(T x) const {
    const T y = softcap * hyperbolic_tangent(x * (logit_scale / softcap));
    return x == -infinity<T>() ? x : y;
  }
  // d z / d x over factor, where y = cap(x).
  TRL_HD T slope(T y) const {
    const T t = y / softcap;
    return y == -infinity<T>() ? T(0) : logit_scale * (1 - t * t);
  }
};

// The statistics of a row.
template <class T>
TRL_HD T lse_of(const Softmax<T>& a, T factor) {
  return factor * a.max + ::log(a.sum);
}
// What is missing from the rounded lse. Of large logits the rounding takes digits that log p = z - lse and its sum with
// the entropy need.
template <class T>
TRL_HD T lse_rest_of(const Softmax<T>& a, T factor, T lse) {
  return ::fma(factor, a.max, -lse) + ::log(a.sum);
}
// y - max first: exact, where z - lse would round twice at large offsets.
template <class T>
TRL_HD T logp_of(const Softmax<T>& a, T y, T factor) {
  return factor * (y - a.max) - ::log(a.sum);
}
template <class T>
TRL_HD T entropy_of(const Softmax<T>& a, T factor) {
  return ::log(a.sum) - factor * a.weighted / a.sum;
}
template <class T>
TRL_HD T log_sum_sq_probs_of(const Softmax<T>& a) {
  return ::log(a.squares) - 2 * ::log(a.sum);
}

template <class T>
TRL_HD T max_prob_of(const Softmax<T>& a) {
  return a.sum > 0 ? 1 / a.sum : std::numeric_limits<T>::quiet_NaN();
}

// The gradient with respect to z of everything that a row's upstream gradients weigh: p (constant + slope log p +
// square p), and each id's own gradient on top of it.
template <class T>
struct RowGradient {
  T constant, slope, square;

  template <class Logit>
  TRL_HD RowGradient(const LogprobArgs<Logit, T>& args, int64_t row) {
    T own = 0;
    for (int64_t k = 0; k < args.num_ids; ++k) own += own_gradient(args, row, k);
    const T entropy = args.grad_entropy ? args.grad_entropy[row] : T(0);
    const T squares = args.grad_log_sum_sq_probs ? args.grad_log_sum_sq_probs[row] : T(0);
    constant = (args.grad_lse ? args.grad_lse[row] : T(0)) - own - (entropy != 0 ? entropy * args.entropy[row] : T(0)) -
               2 * squares;
    slope = -entropy;
    square = squares != 0 ? 2 * squares * exponential(-args.log_sum_sq_probs[row]) : T(0);
  }
  template <class Logit>
  TRL_HD static T own_gradient(const LogprobArgs<Logit, T>& args, int64_t row, int64_t k) {
    const int64_t at = row * args.num_ids + k;
    return args.grad_logp && args.ids[at] != kIgnoredId ? args.grad_logp[at] : T(0);
  }
  // Nothing of the row's logits is needed: no id, or no gradient.
  template <class Logit>
  TRL_HD static bool is_zero(const LogprobArgs<Logit, T>& args, int64_t row) {
    bool used = false, zero = true;
    for (int64_t k = 0; k < args.num_ids; ++k) {
      used = used || args.ids[row * args.num_ids + k] != kIgnoredId;
      zero = zero && own_gradient(args, row, k) == 0;
    }
    return !used || (zero && is_zero(args.grad_entropy, row) && is_zero(args.grad_lse, row) &&
                     is_zero(args.grad_log_sum_sq_probs, row));
  }
  TRL_HD static bool is_zero(const T* upstream, int64_t row) { return !upstream || upstream[row] == 0; }
  template <class V>  // T, or a vector of them
  TRL_HD V at(V log_p, V p) const {
    return p * (constant + slope * log_p + square * p);
  }
};

template <class Logit, class T>
TRL_HD bool is_ignored(const LogprobArgs<Logit, T>& args, int64_t row) {
  for (int64_t k = 0; k < args.num_ids; ++k)
    if (args.ids[row * args.num_ids + k] != kIgnoredId) return false;
  return true;
}

}  // namespace tokenrl
