// The table of divergences of p from r over a vocabulary, one functor each: what an entry adds to the sum, and p, r
// times its partials. Formulas and sources: tokenrl/objectives/divergences.py. Each derivative stands on the line after
// its value. Torch-free; host and device; V is float, double or a vector of them, and T of its numbers; straight-line
// code.
#pragma once

#include <tuple>
#include <type_traits>

#include "gates/base.h"

namespace tokenrl {

// log_p, log_r may be -inf, where p, r are then 0.
template <class V>
struct Pair {
  V log_p, log_r, p, r;
};
// by_p = p df/dp, by_r = r df/dr.
template <class V>
struct Diverged {
  V value, by_p, by_r;
};

// A kind with a `weight` is that one of p and r times a sum of the logs, in which the other's has the factor -1: it can
// be summed before p and r have been normalised.
enum class Weight { p, r };
template <class Kind, class = void>
inline constexpr bool kWeighsLogs = false;
template <class Kind>
inline constexpr bool kWeighsLogs<Kind, std::void_t<decltype(Kind::weight)>> = true;

// weight (log_weight - other), 0 where the weight is, whatever the logs are.
template <class V>
TRL_HD V weighed(V weight, V log_weight, V other) {
  return weight > 0 ? weight * (log_weight - other) : V{};
}
// A mixture of p and r, and its logarithm; of nothing 0.
template <class V>
struct Mixture {
  V m, log_m;
};
template <class V, class T>
TRL_HD Mixture<V> mixed(const Pair<V>& of, T share_of_r) {
  const V m = (1 - share_of_r) * of.p + share_of_r * of.r, some = m > 0 ? m : V{} + 1;
  return {some, logarithm(some)};
}

struct ForwardKl : NoParams {
  static constexpr const char* name = "forward_kl";
  static constexpr Weight weight = Weight::r;
  template <class V, class T>
  TRL_HD static Diverged<V> eval(const Pair<V>& of, const Params<T>&) {
    Diverged<V> out;
    out.value = weighed(of.r, of.log_r, of.log_p);
    out.by_p = -of.r;
    out.by_r = out.value + of.r;
    return out;
  }
};

struct ReverseKl : NoParams {
  static constexpr const char* name = "reverse_kl";
  static constexpr Weight weight = Weight::p;
  template <class V, class T>
  TRL_HD static Diverged<V> eval(const Pair<V>& of, const Params<T>&) {
    Diverged<V> out;
    out.value = weighed(of.p, of.log_p, of.log_r);
    out.by_p = out.value + of.p;
    out.by_r = -of.p;
    return out;
  }
};

struct CrossEntropy : NoParams {
  static constexpr const char* name = "cross_entropy";
  static constexpr Weight weight = Weight::r;
  template <class V, class T>
  TRL_HD static Diverged<V> eval(const Pair<V>& of, const Params<T>&) {
    Diverged<V> out;
    out.value = weighed(of.r, V{}, of.log_p);
    out.by_p = -of.r;
    out.by_r = out.value;
    return out;
  }
};

struct Jsd : AnyPosition {
  static constexpr const char* name = "jsd";
  TRL_PARAMS(beta);
  template <class V, class T>
  TRL_HD static Diverged<V> eval(const Pair<V>& of, const Params<T>& params) {
    Diverged<V> out;
    const Mixture<V> mix = mixed(of, params.beta);
    const V from_p = (1 - params.beta) * weighed(of.p, of.log_p, mix.log_m);
    const V from_r = params.beta * weighed(of.r, of.log_r, mix.log_m);
    out.value = from_p + from_r;
    out.by_p = from_p;
    out.by_r = from_r;
    return out;
  }
};

struct SkewForwardKl : AnyPosition {
  static constexpr const char* name = "skew_forward_kl";
  TRL_PARAMS(share);
  template <class V, class T>
  TRL_HD static Diverged<V> eval(const Pair<V>& of, const Params<T>& params) {
    Diverged<V> out;
    const Mixture<V> mix = mixed(of, params.share);
    out.value = weighed(of.r, of.log_r, mix.log_m);
    out.by_p = -of.r * ((1 - params.share) * of.p / mix.m);
    out.by_r = out.value + of.r * (1 - params.share * of.r / mix.m);
    return out;
  }
};

struct SkewReverseKl : AnyPosition {
  static constexpr const char* name = "skew_reverse_kl";
  TRL_PARAMS(share);
  template <class V, class T>
  TRL_HD static Diverged<V> eval(const Pair<V>& of, const Params<T>& params) {
    Diverged<V> out;
    const Mixture<V> mix = mixed(of, 1 - params.share);
    out.value = weighed(of.p, of.log_p, mix.log_m);
    out.by_p = out.value + of.p * (1 - params.share * of.p / mix.m);
    out.by_r = -of.p * ((1 - params.share) * of.r / mix.m);
    return out;
  }
};

struct TotalVariation : NoParams {
  static constexpr const char* name = "total_variation";
  template <class V, class T>
  TRL_HD static Diverged<V> eval(const Pair<V>& of, const Params<T>&) {
    Diverged<V> out;
    const V zero{}, half_sign = of.p > of.r ? zero + T(0.5) : of.p < of.r ? zero - T(0.5) : zero;
    out.value = half_sign * (of.p - of.r);
    out.by_p = half_sign * of.p;
    out.by_r = -half_sign * of.r;
    return out;
  }
};

struct Bhattacharyya : NoParams {
  static constexpr const char* name = "bhattacharyya";
  template <class V, class T>
  TRL_HD static Diverged<V> eval(const Pair<V>& of, const Params<T>&) {
    Diverged<V> out;
    out.value = exponential((of.log_p + of.log_r) / 2);
    out.by_p = out.value / 2;
    out.by_r = out.value / 2;
    return out;
  }
};

struct SquaredHellinger : NoParams {
  static constexpr const char* name = "squared_hellinger";
  template <class V, class T>
  TRL_HD static Diverged<V> eval(const Pair<V>& of, const Params<T>&) {
    Diverged<V> out;
    const V root_p = exponential(of.log_p / 2), root_r = exponential(of.log_r / 2), apart = root_p - root_r;
    out.value = apart * apart / 2;
    out.by_p = root_p * apart / 2;
    out.by_r = -root_r * apart / 2;
    return out;
  }
};

struct AlphaBeta : AnyPosition {
  static constexpr const char* name = "alpha_beta";
  TRL_PARAMS(alpha, beta);
  template <class V, class T>
  TRL_HD static Diverged<V> eval(const Pair<V>& of, const Params<T>& params) {
    Diverged<V> out;
    const T a = params.alpha, b = params.beta;
    const V both = exponential(a * of.log_r + b * of.log_p);
    const V of_p = exponential((a + b) * of.log_p), of_r = exponential((a + b) * of.log_r);
    out.value = (a / (a + b) * of_r + b / (a + b) * of_p - both) / (a * b);
    out.by_p = (of_p - both) / a;
    out.by_r = (of_r - both) / b;
    return out;
  }
};

// The sum of a kind's values of weights whose logarithms shift by log_p and log_r: by scale the weights that it sums,
// of the sum `weights`. What no longer has a weight is selected away.
template <class Kind, class T>
TRL_HD T shifted(T value, T weights, T scale, T log_p, T log_r) {
  const T of_one = Kind::eval(Pair<T>{log_p, log_r, 1, 1}, ParamsOf<Kind, T>{}).value;
  return scale > 0 ? (value + product(weights, of_one)) * scale : T(0);
}
// All three sums of a row from its value: those of one entry.
template <class Kind, class T>
TRL_HD Diverged<T> of_value(T value) {
  const bool by_p = Kind::weight == Weight::p;
  return Kind::eval(Pair<T>{by_p ? T(0) : -value, by_p ? -value : T(0), 1, 1}, ParamsOf<Kind, T>{});
}

using Divergences = std::tuple<ForwardKl, ReverseKl, CrossEntropy, Jsd, SkewForwardKl, SkewReverseKl, TotalVariation,
                               Bhattacharyya, SquaredHellinger, AlphaBeta>;
inline constexpr int kMaxDivergenceParams = most_params(static_cast<Divergences*>(nullptr));

}  // namespace tokenrl
