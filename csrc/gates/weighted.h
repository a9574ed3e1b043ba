// Gates that weigh the policy gradient (tokenrl/objectives/gates/weighted.py).
#pragma once

#include "base.h"

namespace tokenrl {

struct Cispo : AnyPosition {
  static constexpr const char* name = "cispo";
  TRL_PARAMS(low, high);  // the bounds themselves, in ratio space
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    const T ratio = in.ratio;
    Gated<T> out = weighted(in, clamp(ratio, params.low, params.high));
    out.low = ratio < params.low;
    out.high = ratio > params.high;
    return out;
  }
};

struct Reinforce : AnyPosition {
  static constexpr const char* name = "reinforce";
  TRL_PARAMS(tau);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    return weighted(in, 1 / (1 + params.tau));
  }
};

struct Rec : AnyPosition {
  static constexpr const char* name = "rec";
  TRL_PARAMS(weight_low, weight_high, low, high, ring_low, ring_high);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    const T ratio = in.ratio;
    // In numbers: bools of several comparisons become branches, and loops over tokens do not vectorise.
    const T positive = in.advantage > 0 ? T(1) : T(0), negative = in.advantage < 0 ? T(1) : T(0);
    const T inner = ratio > params.ring_low ? T(1) : T(0), outer = ratio < params.ring_high ? T(1) : T(0);
    const T low = (ratio < params.low ? T(1) : T(0)) * (negative + positive * inner);
    const T high = (ratio > params.high ? T(1) : T(0)) * (positive + negative * outer);
    Gated<T> out = weighted(in, low + high > 0 ? T(0) : clamp(ratio, params.weight_low, params.weight_high));
    out.low = low;
    out.high = high;
    return out;
  }
};

struct Quadratic : AnyPosition {
  static constexpr const char* name = "quadratic";
  TRL_PARAMS(beta);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    Gated<T> out = weighted(in, T(1));
    out.d_s = product(params.beta, in.s);
    out.value += product(out.d_s, in.s / 2);
    return out;
  }
};

struct Topr : AnyPosition {
  static constexpr const char* name = "topr";
  TRL_PARAMS(ceiling, score);  // score: NaN where it is the advantage
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    const T ratio = in.ratio;
    const bool positive = (params.score == params.score ? params.score : in.advantage) > 0;
    Gated<T> out = weighted(in, positive ? T(1) : smaller(ratio, params.ceiling));
    out.low = !positive & (ratio > params.ceiling) ? T(1) : T(0);
    return out;
  }
};

struct Vespo : AnyPosition {
  static constexpr const char* name = "vespo";
  TRL_PARAMS(k_pos, lambda_pos, k_neg, lambda_neg, floor);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    const bool negative = in.advantage < 0;
    const T k = negative ? params.k_neg : params.k_pos, decay = negative ? params.lambda_neg : params.lambda_pos;
    const T log_ratio = clamp(in.s, params.floor, T(20));
    return weighted(in, exponential(decay + k * log_ratio - decay * exponential(log_ratio)));
  }
};

// -min(r, ceiling) A logp of the tokens that are kept. divergence(p, mu) of the probabilities under the current and the
// old policy.
template <class T, class Params, class Divergence>
TRL_HD Gated<T> dppo(const GateInput<T>& in, const Params& params, Divergence divergence) {
  const T p = smaller(exponential(in.logp), T(1)), mu = smaller(exponential(in.logp - in.s), T(1));
  const T far = divergence(p, mu);
  const bool positive = in.advantage > 0;
  const T low = select(!positive & (p < mu) & (far > params.eps_low), T(1), T(0));
  const T high = select(positive & (p > mu) & (far > params.eps_high), T(1), T(0));
  const T ratio = in.ratio;
  const bool dropped = low + high > 0;
  Gated<T> out = weighted(in, select(dropped, T(0), smaller(ratio, params.ceiling)));
  out.low = low;
  out.high = high;
  out.dual = select(!dropped & (ratio > params.ceiling), T(1), T(0));
  return out;
}

struct Dppo : AnyPosition {
  static constexpr const char* name = "dppo";
  TRL_PARAMS(eps_low, eps_high, ceiling, divergence);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    const T given = params.divergence;
    return dppo(in, params, [given](T, T) { return given; });
  }
};

struct DppoTv : AnyPosition {
  static constexpr const char* name = "dppo_tv";
  TRL_PARAMS(eps_low, eps_high, ceiling);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    return dppo(in, params, [](T p, T mu) { return larger(p - mu, mu - p); });
  }
};

struct DppoKl : AnyPosition {
  static constexpr const char* name = "dppo_kl";
  TRL_PARAMS(eps_low, eps_high, ceiling);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    const T s = in.s;
    return dppo(in, params, [s](T p, T mu) {
      const T tiny = static_cast<T>(1e-8);
      return (1 - mu) * logarithm((1 - mu + tiny) / (1 - p + tiny)) - product(mu, s);
    });
  }
};

}  // namespace tokenrl
