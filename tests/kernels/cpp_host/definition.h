// The statistics by their definition, one product per pair of tokens: the truth of the tests on the CPU and on its
// simulation of CUDA.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include "../../../csrc/statistics.h"

namespace tokenrl {

// ds_k / dx_j in a span of n tokens; for the minimum only what its derivative sees.
inline double entry(Statistic statistic, size_t k, size_t j, size_t n) {
  switch (statistic) {
    case Statistic::prefix_sum: return j <= k;
    case Statistic::prefix_mean: return j <= k ? 1.0 / static_cast<double>(k + 1) : 0.0;
    case Statistic::span_sum: return 1.0;
    case Statistic::span_mean: return 1.0 / static_cast<double>(n);
    default: return j == k;
  }
}

inline double statistic_at(Statistic statistic, const std::vector<double>& x, size_t k) {
  double s = 0;
  if (is_minimum(statistic)) {
    for (size_t j = 0; j < k; ++j) s = j == 0 ? x[0] : std::fmin(s, x[j]);
    return (statistic == Statistic::prefix_min_capped ? std::fmin(s, 0.0) : s) + x[k];
  }
  for (size_t j = 0; j < x.size(); ++j) s += entry(statistic, k, j, x.size()) * x[j];
  return s;
}

struct StatisticFlow {
  Statistic statistic;
  bool through;
};
inline const StatisticFlow kPairs[] = {{Statistic::token, true},
                                       {Statistic::prefix_sum, false},
                                       {Statistic::prefix_sum, true},
                                       {Statistic::prefix_mean, false},
                                       {Statistic::prefix_mean, true},
                                       {Statistic::prefix_min, false},
                                       {Statistic::prefix_min_capped, false},
                                       {Statistic::span_sum, false},
                                       {Statistic::span_sum, true},
                                       {Statistic::span_mean, false},
                                       {Statistic::span_mean, true}};

}  // namespace tokenrl
