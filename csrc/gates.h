// One functor per gate: the loss of one token and its partials. Formulas and sources: tokenrl/gates*.py.
// Each derivative stands on the line after its value. Torch-free; host and device; float and double.
#pragma once

#include <tuple>

#include "scalar.h"

namespace tokenrl {

// d_s, d_logp: partials with respect to the statistic and to the own log-prob. low, high, dual: 1 where that bound is
// active.
template <class T>
struct Gated {
  T value = 0, d_s = 0, d_logp = 0;
  T low = 0, high = 0, dual = 0;
};

// What a gate sees of one token; p holds its parameters in the order of params() in tokenrl/gates.py. t_power: the
// position t to the power that the gate asks for.
template <class T>
struct GateInput {
  T s, logp, advantage, t_power;
  const T* p;
};

// For gates that do not look at the position; the others say which parameter is its power.
struct AnyPosition {
  static constexpr int power_param = -1;
};
template <class Gate, class T>
TRL_HD T position_power(T t, const T* p) {
  if constexpr (Gate::power_param < 0) return T(1);
  else return power(t, p[Gate::power_param]);
}

// y of x with the larger loss -A y of x and clip(x), and at most -A dual where A < 0; low, high, dual: 1 where that
// bound is active.
template <class T>
struct Bounded {
  T y, low, high, dual;
};
template <class T>
TRL_HD Bounded<T> bounded(T advantage, T x, T low, T high, T dual) {
  // & and selections, no branches: loops over tokens vectorise.
  const bool positive = advantage > 0, negative = advantage < 0;
  const T clipped = clamp(x, low, high), above = smaller(larger(x, clipped), dual);
  return {positive ? smaller(x, clipped) : above, negative & (x < low) ? T(1) : T(0),
          positive & (x > high) ? T(1) : T(0), negative & (x > dual) ? T(1) : T(0)};
}

// -A ratio, where the ratio's own bounds or those of its logarithm have been applied.
template <class T>
TRL_HD Gated<T> surrogate(T advantage, T ratio, const Bounded<T>& kept) {
  Gated<T> out;
  out.value = -advantage * ratio;
  out.d_s = kept.low + kept.high + kept.dual > 0 ? T(0) : out.value;
  out.low = kept.low;
  out.high = kept.high;
  out.dual = kept.dual;
  return out;
}

// -w A logp for a weight w without a gradient.
template <class T>
TRL_HD Gated<T> weighted(const GateInput<T>& in, T weight) {
  Gated<T> out;
  out.value = -weight * in.advantage * in.logp;
  out.d_logp = -weight * in.advantage;
  return out;
}

struct PpoClip : AnyPosition {
  static constexpr const char* name = "ppo_clip";
  static constexpr int num_params = 3;  // eps_low, eps_high, dual
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    const Bounded<T> kept = bounded(in.advantage, exponential(in.s), T(1) - in.p[0], T(1) + in.p[1], in.p[2]);
    return surrogate(in.advantage, kept.y, kept);
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

struct KlK1 : AnyPosition {
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

struct KlK2 : AnyPosition {
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

struct KlK3 : AnyPosition {
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

struct KlK1Unbiased : AnyPosition {
  static constexpr const char* name = "kl_k1_unbiased";
  static constexpr int num_params = 0;
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out = KlK1::eval(in);
    out.d_s = in.s;
    return out;
  }
};

struct KlK3Unbiased : AnyPosition {
  static constexpr const char* name = "kl_k3_unbiased";
  static constexpr int num_params = 1;  // ceiling
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    Gated<T> out = KlK3::eval(in);
    out.d_s = in.s;
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

using Gates = std::tuple<PpoClip, LogBand, Cispo, Sapo, Reinforce, Quadratic, Topr, Vespo, DppoTv, DppoKl, KlK1, KlK2,
                         KlK3, KlK1Unbiased, KlK3Unbiased, Identity>;
inline constexpr int kMaxParams = 4;

}  // namespace tokenrl
