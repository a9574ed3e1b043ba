// Random batches for the drivers, and what every driver does with results.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../../../csrc/host/fibres.h"
#include "../../../csrc/kernels.h"
#include "definition.h"

namespace tokenrl {

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED %s\n", what.c_str());
  std::exit(1);
}

// Every entry within `tolerance` of the truth, relative to the largest one (and at least to 1e-3).
template <class T>
void expect_close(const std::vector<T>& kernel, const std::vector<double>& truth, double tolerance,
                  const std::string& what) {
  double largest = 1e-3;
  for (double x : truth)
    if (std::isfinite(x)) largest = std::fmax(largest, std::fabs(x));
  for (size_t i = 0; i < truth.size(); ++i) {
    if (static_cast<double>(kernel[i]) == truth[i] || (std::isnan(truth[i]) && std::isnan(kernel[i]))) continue;
    if (std::fabs(kernel[i] - truth[i]) <= tolerance * largest) continue;
    return expect(false, what + " [" + std::to_string(i) + "]: " + std::to_string(kernel[i]) + ", truth " +
                             std::to_string(truth[i]));
  }
}

template <class T>
constexpr double tolerance_of() {
  return sizeof(T) == 4 ? 3e-5 : 1e-12;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// The same results under every schedule: compute() returns one vector with all of them. Memory errors need but one
// schedule.
template <class Compute>
auto under_all_schedules(const std::string& what, Compute compute) {
  host::schedule() = 0;
  const auto first = compute();
#ifndef __SANITIZE_ADDRESS__
  for (long schedule : {1L, 7L}) {
    host::schedule() = schedule;
    expect(same_bits(compute(), first), what + ": other bits under schedule " + std::to_string(schedule));
  }
#endif
  return first;
}

// Sequences of many lengths, tokens before the first and after the last, holes, NaN where no kernel may look.
template <class T>
struct Batch {
  std::vector<int64_t> cu_seqlens;
  int64_t sequences = static_cast<int64_t>(cu_seqlens.size()) - 1, tokens = cu_seqlens.back() + 3;
  std::vector<T> logp, old_logp, token_weight, advantages, sequence_advantages, bounds;
  std::unique_ptr<bool[]> mask{new bool[tokens]}, starts{new bool[tokens]};
  std::vector<double> span_weight{0.5, 1.0, 0.25, 0.125, 0.0, 2.0};
  double normalizer = 3.0;

  // `missing` leaves that many tokens out of logp's memory, for the canary of the address sanitizer.
  explicit Batch(int missing = 0,
                 std::vector<int64_t> boundaries = {2, 2, 3, 9, 9 + 1337, 9 + 1337 + 40, 9 + 1337 + 340})
      : cu_seqlens(std::move(boundaries)),
        logp(tokens),
        old_logp(tokens),
        token_weight(tokens),
        advantages(tokens),
        sequence_advantages(sequences),
        bounds(tokens) {
    std::mt19937 random(11);
    std::normal_distribution<double> normal(0.0, 1.0);
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    for (T& a : sequence_advantages) a = static_cast<T>(normal(random));
    for (int64_t i = 0; i < tokens; ++i) {
      logp[i] = static_cast<T>(-1.5 + 0.5 * normal(random));
      old_logp[i] = logp[i] - static_cast<T>(0.1 * normal(random));
      token_weight[i] = i % 7 == 3 ? T(0) : static_cast<T>(uniform(random));
      advantages[i] = static_cast<T>(normal(random));
      bounds[i] = static_cast<T>(0.02 + 0.1 * uniform(random));
      mask[i] = uniform(random) > 0.2 && (i < 9 || i >= 9 + 40);  // padding for more than a warp
      starts[i] = uniform(random) < 0.06;
      if (!mask[i] && !missing) logp[i] = old_logp[i] = token_weight[i] = advantages[i] = bounds[i] = std::nan("");
    }
    if (missing) {
      cu_seqlens.back() = tokens;
      logp = std::vector<T>(logp.begin(), logp.end() - missing);
    }
  }

  // One sequence of several tiles, which so has several blocks.
  static Batch of_tiles() { return Batch(0, {2, 2 + 2 * 4096 + 700}); }
  // The same behind which lie empty ones, so many that each sequence has one block.
  Batch in_one_block() const {
    Batch batch(0, cu_seqlens);
    batch.cu_seqlens.resize(9, cu_seqlens.back());
    batch.sequences = 8;
    batch.span_weight.resize(8), batch.sequence_advantages.resize(8);
    return batch;
  }

  Spans spans(bool masked, bool segments) const {
    return {tokens, sequences, cu_seqlens.data(), masked ? mask.get() : nullptr, segments ? starts.get() : nullptr};
  }
};

// The valid tokens of each span of a sequence.
inline std::vector<std::vector<int64_t>> spans_of(const Spans& spans, int64_t sequence) {
  std::vector<std::vector<int64_t>> all(1);
  for (int64_t token = spans.cu_seqlens[sequence]; token < spans.cu_seqlens[sequence + 1]; ++token) {
    if (spans.mask && !spans.mask[token]) continue;
    if (spans.starts && spans.starts[token] && !all.back().empty()) all.emplace_back();
    all.back().push_back(token);
  }
  return all;
}

}  // namespace tokenrl
