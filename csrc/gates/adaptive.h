// Gates whose bounds or advantages come from entropies, and those that mix two ratios (tokenrl/objectives/gates/adaptive.py).
#pragma once

#include "base.h"

namespace tokenrl {

// A ratio and its clipped self; slope: 1 where the clip passes a gradient.
template <class T>
struct Clipped {
  T ratio, kept, slope;
};
template <class T>
TRL_HD Clipped<T> clipped_ratio(T log_ratio, T eps_low, T eps_high) {
  const T ratio = exponential(log_ratio), low = 1 - eps_low, high = 1 + eps_high;
  return {ratio, clamp(ratio, low, high), (ratio >= low) & (ratio <= high) ? T(1) : T(0)};
}

struct Dhpo : AnyPosition {
  static constexpr const char* name = "dhpo";
  static constexpr int num_params = 5;  // mix, eps_low, eps_high, span_eps_low, span_eps_high
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    const Clipped<T> own = clipped_ratio(in.x, in.p[1], in.p[2]), span = clipped_ratio(in.s, in.p[3], in.p[4]);
    const T w = in.p[0], a = in.advantage;
    const T mixed = w * own.ratio + (1 - w) * span.ratio, kept = w * own.kept + (1 - w) * span.kept;
    const bool low = (a < 0) & (mixed < kept), high = (a > 0) & (mixed > kept), bound = low | high;
    Gated<T> out;
    out.value = -a * (bound ? kept : mixed);
    out.d_s = -a * (1 - w) * span.ratio * (bound ? span.slope : T(1));
    out.d_logp = -a * w * own.ratio * (bound ? own.slope : T(1));
    out.low = low;
    out.high = high;
    return out;
  }
};

struct DhpoBranch : AnyPosition {
  static constexpr const char* name = "dhpo_branch";
  static constexpr int num_params = 5;  // mix, eps_low, eps_high, span_eps_low, span_eps_high
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    const T w = in.p[0], a = in.advantage;
    const Bounded<T> own = bounded(a, exponential(in.x), 1 - in.p[1], 1 + in.p[2], infinity<T>());
    const Bounded<T> span = bounded(a, exponential(in.s), 1 - in.p[3], 1 + in.p[4], infinity<T>());
    Gated<T> out;
    out.value = -a * (w * own.y + (1 - w) * span.y);
    out.d_s = span.low + span.high > 0 ? T(0) : -a * (1 - w) * span.y;
    out.d_logp = own.low + own.high > 0 ? T(0) : -a * w * own.y;
    out.low = larger(own.low, span.low);
    out.high = larger(own.high, span.high);
    return out;
  }
};

struct Hapo : AnyPosition {
  static constexpr const char* name = "hapo";
  static constexpr int num_params = 6;  // eps_low, eps_high, dual, score, alpha, beta
  template <class T>
  TRL_HD static Gated<T> eval(const GateInput<T>& in) {
    const T score = in.p[3], wider = 1 + in.p[4] * larger(score, -score), ratio = exponential(in.s);
    const bool uncertain = score > 0;
    const T eps_low = uncertain ? in.p[0] : in.p[0] * wider, eps_high = uncertain ? in.p[1] * wider : in.p[1];
    const bool inside = (ratio > 1 - eps_low / 2) & (ratio < 1 + eps_high / 2);
    const T advantage = inside == uncertain ? in.advantage : in.advantage * (1 + in.p[5] * score);
    const Bounded<T> kept = bounded(advantage, ratio, 1 - eps_low, 1 + eps_high, in.p[2]);
    return surrogate(advantage, kept.y, kept);
  }
};

}  // namespace tokenrl
