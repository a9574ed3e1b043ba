// What the objective adds up over tokens, and then over sequences.
#pragma once

#include <initializer_list>

#include "../kernels.h"

namespace tokenrl::cpu {

// Loss and metrics of some tokens.
struct Totals {
  double loss, metrics[kNumMetrics];

  TRL_HD static Totals nothing() {
    Totals totals{};
    totals.metrics[kRatioMin] = infinity<double>();
    totals.metrics[kRatioMax] = -infinity<double>();
    return totals;
  }
  // The entries that are sums.
  TRL_HD void add_sums(const Totals& other) {
    loss += other.loss;
    for (int k : {kLow, kHigh, kDual, kLowPos, kHighPos}) metrics[k] += other.metrics[k];
  }
  TRL_HD void add(const Totals& other) {
    loss += other.loss;
    for (int k = 0; k < kNumMetrics; ++k)
      metrics[k] = k == kRatioMin   ? smaller(metrics[k], other.metrics[k])
                   : k == kRatioMax ? larger(metrics[k], other.metrics[k])
                                    : metrics[k] + other.metrics[k];
  }
};

}  // namespace tokenrl::cpu
