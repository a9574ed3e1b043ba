// The statistics by name, for host and device: which tokens' log ratios make up the s of one token
// (tokenrl/statistics.py).
#pragma once

#include <cstring>

#include "scalar.h"

namespace tokenrl {

enum class Statistic { token, prefix_sum, prefix_mean, prefix_min, span_sum, span_mean };
inline constexpr const char* kStatistics[] = {"token",      "prefix_sum", "prefix_mean",
                                              "prefix_min", "span_sum",   "span_mean"};

// What aggregation_weights puts on a sequence, and what its normaliser counts (tokenrl/aggregate.py).
enum class Span { one, inverse_length, group, balanced };
inline constexpr const char* kSpans[] = {"one", "inverse_length", "group", "balanced"};
enum class Unit { tokens, rows, groups };
inline constexpr const char* kUnits[] = {"tokens", "rows", "groups"};

// The entry of one of the name lists above; -1 where there is none.
template <int kCount>
inline int find_name(const char* const (&names)[kCount], const char* name) {
  for (int i = 0; i < kCount; ++i)
    if (std::strcmp(names[i], name) == 0) return i;
  return -1;
}

}  // namespace tokenrl
