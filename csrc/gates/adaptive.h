// Gates whose bounds or advantages come from entropies, and those that mix two ratios: see
// tokenrl/objectives/gates/adaptive.py.
#pragma once

#include "base.h"

namespace tokenrl {

// A ratio and its clipped self; slope: 1 where the clip passes a gradient.
template <class T>
struct Clipped {
  T ratio, kept, slope;
};
template <class T>
TRL_HD Clipped<T> clipped_ratio(T ratio, T eps_low, T eps_high) {
  const T low = 1 - eps_low, high = 1 + eps_high;
  return {ratio, clamp(ratio, low, high), (ratio >= low) & (ratio <= high) ? T(1) : T(0)};
}

// Base of DHPO's.
struct DhpoGate : AnyPosition {
  TRL_PARAMS(mix, eps_low, eps_high, span_eps_low, span_eps_high);
};

struct Dhpo : DhpoGate {
  static constexpr const char* name = "dhpo";
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    const Clipped<T> own = clipped_ratio(exponential(in.x), params.eps_low, params.eps_high);
    const Clipped<T> span = clipped_ratio(in.ratio, params.span_eps_low, params.span_eps_high);
    const T w = params.mix, a = in.advantage;
    const T mixed = product(w, own.ratio) + product(1 - w, span.ratio);
    // Where neither ratio is clipped it is the same number, and not another rounding of it.
    const T kept = own.slope * span.slope != 0 ? mixed : w * own.kept + (1 - w) * span.kept;
    const bool positive = a > 0, bound = (positive ? mixed : kept) > (positive ? kept : mixed);
    Gated<T> out;
    out.value = product(-a, bound ? kept : mixed);
    out.d_s = product(-a * (1 - w) * (bound ? span.slope : T(1)), span.ratio);
    out.d_logp = product(-a * w * (bound ? own.slope : T(1)), own.ratio);
    out.low = (a < 0) & bound ? T(1) : T(0);
    out.high = positive & bound ? T(1) : T(0);
    return out;
  }
};

struct DhpoBranch : DhpoGate {
  static constexpr const char* name = "dhpo_branch";
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    const T w = params.mix, a = in.advantage, ratio = exponential(in.x), span_ratio = in.ratio;
    const T own = bounded(a, ratio, 1 - params.eps_low, 1 + params.eps_high, infinity<T>()).y;
    const T span = bounded(a, span_ratio, 1 - params.span_eps_low, 1 + params.span_eps_high, infinity<T>()).y;
    // In numbers: bools of several comparisons become branches, and loops over tokens do not vectorise.
    const T own_bound = own != ratio ? T(1) : T(0), span_bound = span != span_ratio ? T(1) : T(0);
    const T bound = larger(own_bound, span_bound);
    Gated<T> out;
    const T of_own = product(-a * w, own), of_span = product(-a * (1 - w), span);
    out.value = of_own + of_span;
    out.d_s = span_bound > 0 ? T(0) : of_span;
    out.d_logp = own_bound > 0 ? T(0) : of_own;
    out.low = a < 0 ? bound : T(0);
    out.high = a > 0 ? bound : T(0);
    return out;
  }
};

struct Hapo : AnyPosition {
  static constexpr const char* name = "hapo";
  TRL_PARAMS(eps_low, eps_high, dual, score, alpha, beta);
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in, const Params<T>& params) {
    const T score = params.score, wider = 1 + params.alpha * larger(score, -score), ratio = in.ratio;
    const bool uncertain = score > 0;
    const T eps_low = uncertain ? params.eps_low : params.eps_low * wider;
    const T eps_high = uncertain ? params.eps_high * wider : params.eps_high;
    const bool inside = (ratio > 1 - eps_low / 2) & (ratio < 1 + eps_high / 2);
    const T advantage = inside == uncertain ? in.advantage : in.advantage * (1 + params.beta * score);
    const Bounded<T> kept = bounded(advantage, ratio, 1 - eps_low, 1 + eps_high, params.dual);
    return surrogate(advantage, kept.y, kept);
  }
};

}  // namespace tokenrl
