// What all gates share: what they see of a token, what they give, and the forms of loss that several have.
// Torch-free; host and device; float and double.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "../scalar.h"

namespace tokenrl {

// d_s, d_logp: partials with respect to the statistic and to the own log-prob. low, high, dual: 1 where that bound is
// active.
template <class T>
struct Gated {
  T value = 0, d_s = 0, d_logp = 0;
  T low = 0, high = 0, dual = 0;
};

// What a gate sees of one token. x: its own log ratio; d_logp holds x's part of the derivative too. t_power: the
// position t to the power that the gate asks for. ratio: e^s, for callers that have it already.
template <class T>
struct GateInput {
  T s, x, logp, advantage, t_power, ratio;

  TRL_HD GateInput(T s, T x, T logp, T advantage, T t_power, T ratio)
      : s(s), x(x), logp(logp), advantage(advantage), t_power(t_power), ratio(ratio) {}
  TRL_HD GateInput(T s, T x, T logp, T advantage, T t_power)
      : GateInput(s, x, logp, advantage, t_power, exponential(s)) {}
};

// A gate's parameters: a struct of them, their names and their count. Names and order are those of the gate in
// tokenrl/objectives/gates/.
#define TRL_PARAMS(...)                                    \
  template <class T>                                       \
  struct Params {                                          \
    T __VA_ARGS__;                                         \
  };                                                       \
  static constexpr const char* param_names = #__VA_ARGS__; \
  static constexpr int num_params = sizeof(Params<char>)
template <class Gate, class T>
using ParamsOf = typename Gate::template Params<T>;

// The parameters from value(k) of the k-th.
template <class Gate, class T, class Value, size_t... k>
TRL_HD ParamsOf<Gate, T> params_from([[maybe_unused]] Value value, std::index_sequence<k...>) {
  return {value(k)...};
}
template <class Gate, class T, class Value>
TRL_HD ParamsOf<Gate, T> params_from(Value value) {
  return params_from<Gate, T>(value, std::make_index_sequence<Gate::num_params>());
}

template <class... Gate>
constexpr int most_params(std::tuple<Gate...>*) {
  int most = 0;
  ((most = Gate::num_params > most ? Gate::num_params : most), ...);
  return most;
}
// For gates that do not look at the position; the parameters of the others have its `power`.
struct AnyPosition {
  static constexpr bool positional = false;
};
template <class Gate, class T>
TRL_HD T position_power([[maybe_unused]] T t, [[maybe_unused]] const ParamsOf<Gate, T>& params) {
  if constexpr (Gate::positional) return power(t, params.power);
  else return T(1);
}
struct NoParams : AnyPosition {
  template <class T>
  struct Params {};
  static constexpr const char* param_names = "";
  static constexpr int num_params = 0;
};

// y of x with the larger loss -A y of x and clip(x), and at most -A dual where A < 0; low, high, dual: 1 where that
// bound is active.
template <class T>
struct Bounded {
  T y, low, high, dual;
};
template <class T>
TRL_HD Bounded<T> bounded(T advantage, T x, T low, T high, T dual) {
  const bool positive = advantage > 0, negative = advantage < 0;
  const T lower = select(positive, -infinity<T>(), low), upper = select(positive, high, dual);
  const bool above = x > upper;
  return {clamp(x, lower, upper), select(negative & (x < lower), T(1), T(0)), select(positive & above, T(1), T(0)),
          select(negative & above, T(1), T(0))};
}

// -A ratio, where the ratio's own bounds or those of its logarithm have been applied.
template <class T>
TRL_HD Gated<T> surrogate(T advantage, T ratio, const Bounded<T>& kept) {
  Gated<T> out;
  out.value = product(-advantage, ratio);
  out.d_s = select(kept.low + kept.high + kept.dual > 0, T(0), out.value);
  out.low = kept.low;
  out.high = kept.high;
  out.dual = kept.dual;
  return out;
}

// -w A logp for a weight w without a gradient.
template <class T>
TRL_HD Gated<T> weighted(const GateInput<T>& in, T weight) {
  Gated<T> out;
  out.d_logp = product(-in.advantage, weight);
  out.value = product(out.d_logp, in.logp);
  return out;
}

}  // namespace tokenrl
