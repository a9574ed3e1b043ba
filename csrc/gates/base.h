// What all gates share: what they see of a token, what they give, and the forms of loss that several have.
// Torch-free; host and device; float and double.
#pragma once

#include "../scalar.h"

namespace tokenrl {

// d_s, d_logp: partials with respect to the statistic and to the own log-prob. low, high, dual: 1 where that bound is
// active.
template <class T>
struct Gated {
  T value = 0, d_s = 0, d_logp = 0;
  T low = 0, high = 0, dual = 0;
};

// What a gate sees of one token; p holds its parameters in the order of params() in tokenrl/objectives/gates/. x: its own log
// ratio; d_logp holds x's part of the derivative too. t_power: the position t to the power that the gate asks for.
template <class T>
struct GateInput {
  T s, x, logp, advantage, t_power;
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

}  // namespace tokenrl
