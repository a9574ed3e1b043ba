// Gates that bound a ratio (tokenrl/objectives/gates/bounded.py).
#pragma once

#include "base.h"

namespace tokenrl {

struct Ratio : AnyPosition {
  static constexpr const char* name = "ratio";
  static constexpr int num_params = 0;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out;
    out.value = -in.advantage * exponential(in.s);
    out.d_s = out.value;
    return out;
  }
};

struct PpoClip : AnyPosition {
  static constexpr const char* name = "ppo_clip";
  static constexpr int num_params = 3;  // eps_low, eps_high, dual
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    const Bounded<T> kept = bounded(in.advantage, exponential(in.s), T(1) - in.p[0], T(1) + in.p[1], in.p[2]);
    return surrogate(in.advantage, kept.y, kept);
  }
};

struct PpoNtp : AnyPosition {
  static constexpr const char* name = "ppo_ntp";
  static constexpr int num_params = 4;  // eps_low, eps_high, dual, ntp
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out = PpoClip::eval(in);
    out.value -= in.p[3] * in.logp;
    out.d_logp = -in.p[3];
    return out;
  }
};

struct LogBand {
  static constexpr const char* name = "log_band";
  static constexpr int num_params = 4, power_param = 3;  // eps_low, eps_high, eps_dual, power
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    const T width = in.t_power;
    const Bounded<T> kept = bounded(in.advantage, in.s, -in.p[0] * width, in.p[1] * width, in.p[2] * width);
    return surrogate(in.advantage, exponential(kept.y), kept);
  }
};

struct Sapo : AnyPosition {
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

struct Identity : AnyPosition {
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

}  // namespace tokenrl
