// Gates that bound a ratio (tokenrl/objectives/gates/bounded.py).
#pragma once

#include "base.h"

namespace tokenrl {

struct Ratio : NoParams {
  static constexpr const char* name = "ratio";
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>&) {
    Gated<T> out;
    out.value = product(-in.advantage, in.ratio);
    out.d_s = out.value;
    return out;
  }
};

struct PpoClip : AnyPosition {
  static constexpr const char* name = "ppo_clip";
  TRL_PARAMS(eps_low, eps_high, dual);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    const Bounded<T> kept = bounded(in.advantage, in.ratio, T(1) - params.eps_low, T(1) + params.eps_high, params.dual);
    return surrogate(in.advantage, kept.y, kept);
  }
};

struct PpoNtp : AnyPosition {
  static constexpr const char* name = "ppo_ntp";
  TRL_PARAMS(eps_low, eps_high, dual, ntp);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    Gated<T> out = PpoClip::eval(in, {params.eps_low, params.eps_high, params.dual});
    out.value -= product(params.ntp, in.logp);
    out.d_logp = -params.ntp;
    return out;
  }
};

struct LogBand {
  static constexpr const char* name = "log_band";
  TRL_PARAMS(eps_low, eps_high, eps_dual, power);
  static constexpr bool positional = true;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    const T width = in.t_power;
    const Bounded<T> kept =
        bounded(in.advantage, in.s, -params.eps_low * width, params.eps_high * width, params.eps_dual * width);
    return surrogate(in.advantage, exponential(kept.y), kept);
  }
};

struct Sapo : AnyPosition {
  static constexpr const char* name = "sapo";
  TRL_PARAMS(tau_pos, tau_neg);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    Gated<T> out;
    const T ratio = in.ratio, tau = in.advantage > 0 ? params.tau_pos : params.tau_neg;
    // sigmoid(z) = e^-|z| or 1 over 1 + e^-|z|: no overflow on either side.
    const T z = tau * (ratio - 1), small = exponential(z < 0 ? z : -z), p = (z < 0 ? small : T(1)) / (1 + small);
    out.value = T(-4) / tau * p * in.advantage;
    out.d_s = product(T(-4) * (small / ((1 + small) * (1 + small))) * in.advantage, ratio);
    return out;
  }
};

struct Cfpo : AnyPosition {
  static constexpr const char* name = "cfpo";
  TRL_PARAMS(eps);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    Gated<T> out;
    const T a = in.advantage, size = larger(a, -a), towards = a < 0 ? -params.eps : params.eps;
    // Around the vertex: of an infinite ratio -A r and the square would be opposite infinities.
    const T ratio = in.ratio, from_vertex = ratio - 1 - towards, slope = size / params.eps;
    out.value = product(slope, from_vertex * from_vertex / 2) - (a + size * params.eps / 2);
    out.d_s = product(slope, from_vertex * ratio);
    return out;
  }
};

struct SppoToken : AnyPosition {
  static constexpr const char* name = "sppo_token";
  TRL_PARAMS(eps);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    Gated<T> out;
    const T ratio = in.ratio;
    out.low = ratio < 1 / (1 + params.eps) ? T(1) : T(0);
    out.high = ratio > 1 + params.eps ? T(1) : T(0);
    const bool dropped = out.low + out.high > 0;
    out.value = dropped ? T(0) : product(-in.advantage, in.s);
    out.d_s = dropped ? T(0) : -in.advantage;
    return out;
  }
};

struct PrimeRl : AnyPosition {
  static constexpr const char* name = "prime_rl";
  TRL_PARAMS(eps_low, eps_high, eps_back, kl_tau);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    Gated<T> out;
    const T moved = smaller(exponential(in.logp), T(1)) - smaller(exponential(in.logp - in.s), T(1));
    const bool positive = in.advantage > 0;
    out.low = moved < -(positive ? params.eps_back : params.eps_low) ? T(1) : T(0);
    out.high = moved > (positive ? params.eps_high : params.eps_back) ? T(1) : T(0);
    const T kept = out.low + out.high > 0 ? T(0) : product(-in.advantage, in.ratio);
    const T pull = product(params.kl_tau, in.s);
    out.value = kept + product(pull, in.s);
    out.d_s = kept + 2 * pull;
    return out;
  }
};

struct Identity : NoParams {
  static constexpr const char* name = "identity";
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>&) {
    Gated<T> out;
    out.value = in.logp;
    out.d_logp = 1;
    return out;
  }
};

}  // namespace tokenrl
