// The statistics along one sequence, a vector register at a time. Only for sources that are compiled once per
// instruction set; walk.h has the same for any precision and for segments.
#pragma once

#include "lanes.h"
#include "walk.h"

namespace tokenrl::cpu::TOKENRL_ISA {

// Lanes moved up by `distance`; `fill` enters below.
template <int distance>
TRL_INLINE Floats moved_up(Floats x, Floats fill) {
  Words from;
  for (int i = 0; i < kLanes; ++i) from[i] = static_cast<uint32_t>(i < distance ? kLanes + i : i - distance);
  return __builtin_shuffle(x, fill, from);
}

// combine(everything up to and including this lane), in log2(kLanes) steps.
template <class Combine>
TRL_INLINE Floats prefix_of(Floats x, Floats neutral, Combine combine) {
  x = combine(x, moved_up<1>(x, neutral));
  x = combine(x, moved_up<2>(x, neutral));
  if constexpr (kLanes > 4) x = combine(x, moved_up<4>(x, neutral));
  if constexpr (kLanes > 8) x = combine(x, moved_up<8>(x, neutral));
  return x;
}

// A running sum in double, added to vectors of floats without its lower half being lost. Each tile sums from 0, so that
// what lies before it may have been added up by another thread.
struct RunningSum {
  double before = 0, sum = 0;

  TRL_INLINE Floats through(Floats x) {
    const double so_far = before + sum;
    const float high = static_cast<float>(so_far);
    const float low = std::isfinite(high) ? static_cast<float>(so_far - static_cast<double>(high)) : 0.0f;
    const Floats within = prefix_of(x, Floats{}, [](Floats a, Floats b) { return a + b; });
    sum += static_cast<double>(within[kLanes - 1]);
    return high + (low + within);
  }
  TRL_INLINE void end_tile() { before += sum, sum = 0; }
};

// Before every token the smallest x of the valid tokens so far, infinity before the first.
struct RunningMinimum {
  float lowest = infinity<float>();

  TRL_INLINE Floats before(Floats x, Floats valid) {
    const Floats neutral = all(infinity<float>());
    const Floats within =
        prefix_of(valid != 0 ? x : neutral, neutral, [](Floats a, Floats b) { return b < a ? b : a; });
    const Floats earlier = moved_up<1>(within, neutral), so_far = earlier < lowest ? earlier : all(lowest);
    lowest = smaller(lowest, within[kLanes - 1]);
    return so_far;
  }
};

// least_before() of statistics.h.
template <Statistic kStatistic>
TRL_INLINE Floats counted(Floats least) {
  if constexpr (kStatistic == Statistic::prefix_min_capped) return least < 0 ? least : Floats{};
  return least == infinity<float>() ? Floats{} : least;
}

// What a sequence has seen so far, from one piece of it to the next.
struct Carry {
  RunningSum count, sum;
  RunningMinimum minimum;

  TRL_INLINE void end_tile() { count.end_tile(), sum.end_tile(); }
};

TRL_INLINE void put(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// s and t of whole vectors of tokens, n rounded up: x and valid are 0 beyond the last.
template <Statistic kStatistic>
inline void scan_lanes(const float* x, const float* valid, int64_t n, float* s, float* t, Carry& carry) {
  RunningSum count = carry.count, sum = carry.sum;
  RunningMinimum minimum = carry.minimum;
  for (int64_t k = 0; k < n; k += kLanes) {
    const Floats own = load(x + k), is_valid = load(valid + k), position = count.through(is_valid);
    put(t + k, position);
    if constexpr (kStatistic == Statistic::token) put(s + k, own);
    else if constexpr (is_minimum(kStatistic)) put(s + k, own + counted<kStatistic>(minimum.before(own, is_valid)));
    else if constexpr (kStatistic == Statistic::prefix_mean) put(s + k, sum.through(own) / higher(position, all(1.0f)));
    else put(s + k, sum.through(own));
  }
  carry = {count, sum, minimum};
}

// A piece of a sequence without segments, for span statistics all of it. The arrays have room for whole vectors.
inline void scan_lanes(Statistic statistic, const float* x, const float* valid, int64_t n, float* s, float* t,
                       Carry& carry) {
  switch (statistic) {
    case Statistic::token: return scan_lanes<Statistic::token>(x, valid, n, s, t, carry);
    case Statistic::prefix_sum: return scan_lanes<Statistic::prefix_sum>(x, valid, n, s, t, carry);
    case Statistic::prefix_mean: return scan_lanes<Statistic::prefix_mean>(x, valid, n, s, t, carry);
    case Statistic::prefix_min: return scan_lanes<Statistic::prefix_min>(x, valid, n, s, t, carry);
    case Statistic::prefix_min_capped: return scan_lanes<Statistic::prefix_min_capped>(x, valid, n, s, t, carry);
    case Statistic::span_sum:
    case Statistic::span_mean: break;
  }
  scan_lanes<Statistic::span_sum>(x, valid, n, s, t, carry);
  const float total = n == 0 ? 0 : statistic == Statistic::span_mean ? s[n - 1] / larger(t[n - 1], 1.0f) : s[n - 1];
  for (int64_t k = 0; k < n; ++k) s[k] = total;
}

}  // namespace tokenrl::cpu::TOKENRL_ISA
