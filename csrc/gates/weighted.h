// Gates that weigh the policy gradient (tokenrl/objectives/gates/weighted.py).
#pragma once

#include "base.h"

namespace tokenrl {

struct Cispo : AnyPosition {
  static constexpr const char* name = "cispo";
  static constexpr int num_params = 2;  // low, high: the bounds themselves, in ratio space
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    const T ratio = exponential(in.s);
    Gated<T> out = weighted(in, clamp(ratio, in.p[0], in.p[1]));
    out.low = ratio < in.p[0];
    out.high = ratio > in.p[1];
    return out;
  }
};

struct Reinforce : AnyPosition {
  static constexpr const char* name = "reinforce";
  static constexpr int num_params = 0;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    return weighted(in, T(1));
  }
};

struct Quadratic : AnyPosition {
  static constexpr const char* name = "quadratic";
  static constexpr int num_params = 1;  // beta
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out = weighted(in, T(1));
    out.value += in.p[0] / 2 * in.s * in.s;
    out.d_s = in.p[0] * in.s;
    return out;
  }
};

struct Topr : AnyPosition {
  static constexpr const char* name = "topr";
  static constexpr int num_params = 1;  // ceiling
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    const T ratio = exponential(in.s);
    const bool positive = in.advantage > 0;
    Gated<T> out = weighted(in, positive ? T(1) : smaller(ratio, in.p[0]));
    out.low = !positive & (ratio > in.p[0]) ? T(1) : T(0);
    return out;
  }
};

struct Vespo : AnyPosition {
  static constexpr const char* name = "vespo";
  static constexpr int num_params = 4;  // k_pos, lambda_pos, k_neg, lambda_neg
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    const bool negative = in.advantage < 0;
    const T k = negative ? in.p[2] : in.p[0], decay = negative ? in.p[3] : in.p[1];
    const T log_ratio = larger(in.s, static_cast<T>(-18.420680743952367));  // log 1e-8
    return weighted(in, exponential(decay + k * log_ratio - decay * exponential(log_ratio)));
  }
};

// -min(r, ceiling) A logp of the tokens that are kept; parameters eps_low, eps_high, ceiling. divergence(p, mu) of the
// probabilities under the current and the old policy.
template <class T, class Divergence>
TRL_HD Gated<T> dppo(const GateInput<T>& in, Divergence divergence) {
  const T p = smaller(exponential(in.logp), T(1)), mu = smaller(exponential(in.logp - in.s), T(1));
  const T far = divergence(p, mu);
  const bool positive = in.advantage > 0;
  const T low = !positive & (p < mu) & (far > in.p[0]) ? T(1) : T(0);
  const T high = positive & (p > mu) & (far > in.p[1]) ? T(1) : T(0);
  Gated<T> out = weighted(in, low + high > 0 ? T(0) : smaller(exponential(in.s), in.p[2]));
  out.low = low;
  out.high = high;
  return out;
}

struct Dppo : AnyPosition {
  static constexpr const char* name = "dppo";
  static constexpr int num_params = 4;  // and divergence
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    const T given = in.p[3];
    return dppo(in, [given](T, T) { return given; });
  }
};

struct DppoTv : AnyPosition {
  static constexpr const char* name = "dppo_tv";
  static constexpr int num_params = 3;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    return dppo(in, [](T p, T mu) { return larger(p - mu, mu - p); });
  }
};

struct DppoKl : AnyPosition {
  static constexpr const char* name = "dppo_kl";
  static constexpr int num_params = 3;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    const T s = in.s;
    return dppo(in, [s](T p, T mu) {
      const T tiny = static_cast<T>(1e-8);
      return (1 - mu) * logarithm((1 - mu + tiny) / (1 - p + tiny)) - mu * s;
    });
  }
};

}  // namespace tokenrl
