// What gates that tokenrl/fusion/ writes call beside scalar.h: torch's functions at every number, as straight-line
// code.
#pragma once

#include "../scalar.h"

namespace tokenrl::fused {

// log x: -inf at 0, NaN below.
TRL_HD float log_of(float x) {
  const float y = logarithm(larger(x, 1.17549435e-38f));
  const float above = x < infinity<float>() ? y : x, nan = std::numeric_limits<float>::quiet_NaN();
  return x > 0 ? above : x == 0 ? -infinity<float>() : nan;
}
TRL_HD double log_of(double x) { return ::log(x); }

// log(1 + x): what 1 + x lost when it was rounded is put back as a factor.
TRL_HD float log1p_of(float x) {
  const float y = 1 + x, lost = y - 1, log = log_of(y);
  return (lost != 0) & (y < infinity<float>()) ? log * (x / lost) : lost == 0 ? x : log;
}
TRL_HD double log1p_of(double x) { return ::log1p(x); }

// e^x - 1.
TRL_HD float expm1_of(float x) { return (x > -0.5f) & (x < 0.5f) ? excess(x) + x : exponential(x) - 1; }
TRL_HD double expm1_of(double x) { return ::expm1(x); }

// 1 / (1 + e^-x).
template <class T>
TRL_HD T sigmoid_of(T x) {
  return 1 / (1 + exponential(-x));
}

template <class T>
TRL_HD T sign_of(T x) {
  return x > 0 ? T(1) : x < 0 ? T(-1) : x;
}

TRL_HD float sqrt_of(float x) { return ::sqrtf(x); }
TRL_HD double sqrt_of(double x) { return ::sqrt(x); }

}  // namespace tokenrl::fused
