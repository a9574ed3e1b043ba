// The statistics by name, for host and device: which tokens' log ratios make up the s of one token
// (tokenrl/objectives/statistics.py).
#pragma once

#include <cstring>

#include "scalar.h"

namespace tokenrl {

enum class Statistic { token, prefix_sum, prefix_mean, prefix_min, prefix_min_capped, span_sum, span_mean };
inline constexpr const char* kStatistics[] = {
    "token", "prefix_sum", "prefix_mean", "prefix_min", "prefix_min_capped", "span_sum", "span_mean"};
TRL_HD constexpr bool is_minimum(Statistic statistic) {
  return statistic == Statistic::prefix_min || statistic == Statistic::prefix_min_capped;
}
// What the smallest log ratio of the tokens before counts for; `least` where there are some.
template <class T>
TRL_HD T least_before(Statistic statistic, bool some, T least) {
  if (!some) return T(0);
  return statistic == Statistic::prefix_min_capped ? smaller(least, T(0)) : least;
}

// What aggregation_weights puts on a sequence, and what its normaliser counts (tokenrl/losses/aggregation.py).
enum class Span { one, inverse_length, group, balanced };
inline constexpr const char* kSpans[] = {"one", "inverse_length", "group", "balanced"};
enum class Unit { one, tokens, rows, groups };
inline constexpr const char* kUnits[] = {"one", "tokens", "rows", "groups"};

// The entry of one of the name lists above; -1 where there is none.
template <int kCount>
inline int find_name(const char* const (&names)[kCount], const char* name) {
  for (int i = 0; i < kCount; ++i)
    if (std::strcmp(names[i], name) == 0) return i;
  return -1;
}

}  // namespace tokenrl
