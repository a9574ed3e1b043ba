// One functor per gate: the loss of one token and its partials. Formulas and sources: tokenrl/gates.py.
// Each derivative stands on the line after its value. Torch-free; host and device; float and double.
#pragma once

#include <tuple>

#include "scalar.h"

namespace tokenrl {

// d_s, d_logp: partials with respect to the statistic and to the own log-prob. low, high, dual: 1 where that bound is active.
template <class T>
struct Gated {
  T value = 0, d_s = 0, d_logp = 0;
  T low = 0, high = 0, dual = 0;
};

// What a gate sees of one token; p holds its parameters in the order of params() in tokenrl/gates.py.
template <class T>
struct GateInput {
  T s, logp, advantage, t;
  const T* p;
};

// max(-A r, -A clip(r)) with the dual ceiling for A < 0, where r = e^s and low/high/above tell on which side of the bounds s lies.
template <class T>
TRL_HD Gated<T> surrogate(T advantage, T ratio, T clipped, T ceiling, bool low, bool high, bool above) {
  Gated<T> out;
  // & and selections, no branches: loops over tokens vectorise.
  const bool positive = advantage > 0, negative = advantage < 0;
  const T bounded = larger(-advantage * ratio, -advantage * clipped);
  out.value = negative ? smaller(bounded, -advantage * ceiling) : bounded;
  out.d_s = (negative & (low | above)) | (positive & high) ? T(0) : -advantage * ratio;
  out.low = negative & low ? T(1) : T(0);
  out.high = positive & high ? T(1) : T(0);
  out.dual = negative & above ? T(1) : T(0);
  return out;
}

struct PpoClip {
  static constexpr const char* name = "ppo_clip";
  static constexpr int num_params = 3;  // eps_low, eps_high, dual
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    const T low = T(1) - in.p[0], high = T(1) + in.p[1], dual = in.p[2], ratio = exponential(in.s);
    return surrogate(in.advantage, ratio, clamp(ratio, low, high), dual, ratio < low, ratio > high, ratio > dual);
  }
};

struct LogBand {
  static constexpr const char* name = "log_band";
  static constexpr int num_params = 4;  // eps_low, eps_high, eps_dual, power
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    const T width = power(in.t, in.p[3]);
    const T low = -in.p[0] * width, high = in.p[1] * width, dual = in.p[2] * width;
    return surrogate(in.advantage, exponential(in.s), exponential(clamp(in.s, low, high)), exponential(dual), in.s < low,
                     in.s > high, in.s > dual);
  }
};

struct Cispo {
  static constexpr const char* name = "cispo";
  static constexpr int num_params = 2;  // low, high: the bounds themselves, in ratio space
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out;
    const T ratio = exponential(in.s), weight = clamp(ratio, in.p[0], in.p[1]);
    out.value = -weight * in.advantage * in.logp;
    out.d_logp = -weight * in.advantage;
    out.low = ratio < in.p[0];
    out.high = ratio > in.p[1];
    return out;
  }
};

struct Sapo {
  static constexpr const char* name = "sapo";
  static constexpr int num_params = 2;  // tau_pos, tau_neg
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out;
    const T ratio = exponential(in.s), tau = in.advantage > 0 ? in.p[0] : in.p[1];
    // sigmoid(z) = e^-|z| or 1 over 1 + e^-|z|: no overflow on either side.
    const T z = tau * (ratio - 1), small = exponential(z < 0 ? z : -z), p = (z < 0 ? small : T(1)) / (1 + small);
    out.value = T(-4) / tau * p * in.advantage;
    out.d_s = T(-4) * ratio * (small / ((1 + small) * (1 + small))) * in.advantage;
    return out;
  }
};

struct KlK1 {
  static constexpr const char* name = "kl_k1";
  static constexpr int num_params = 0;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out;
    out.value = in.s;
    out.d_s = 1;
    return out;
  }
};

struct KlK2 {
  static constexpr const char* name = "kl_k2";
  static constexpr int num_params = 0;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out;
    out.value = in.s * in.s / 2;
    out.d_s = in.s;
    return out;
  }
};

struct KlK3 {
  static constexpr const char* name = "kl_k3";
  static constexpr int num_params = 1;  // ceiling
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out;
    const T k3 = excess(-in.s);
    out.value = smaller(k3, in.p[0]);
    out.d_s = k3 > in.p[0] ? T(0) : in.s - k3;
    return out;
  }
};

struct KlK1Unbiased {
  static constexpr const char* name = "kl_k1_unbiased";
  static constexpr int num_params = 0;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out = KlK1::eval(in);
    out.d_s = in.s;
    return out;
  }
};

struct KlK3Unbiased {
  static constexpr const char* name = "kl_k3_unbiased";
  static constexpr int num_params = 1;  // ceiling
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out = KlK3::eval(in);
    out.d_s = in.s;
    return out;
  }
};

struct Identity {
  static constexpr const char* name = "identity";
  static constexpr int num_params = 0;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out;
    out.value = in.logp;
    out.d_logp = 1;
    return out;
  }
};

using Gates = std::tuple<PpoClip, LogBand, Cispo, Sapo, KlK1, KlK2, KlK3, KlK1Unbiased, KlK3Unbiased, Identity>;
inline constexpr int kMaxParams = 4;

}  // namespace tokenrl
