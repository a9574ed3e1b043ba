// The tokens of a sequence as arrays that the objective's vector loops run over. Only for sources that are compiled
// once per instruction set.
#pragma once

#include "kernels.h"
#include "scan.h"

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

// One entry per token of a piece of a sequence; masked cells hold harmless numbers and weight 0. Every array has room
// for whole vectors.
template <class T>
struct Lanes {
  T *x, *s, *t, *t_power, *logp, *advantage, *weight, *valid, *passes, *shared, *direct;
  static constexpr int kArrays = 11;

  static int64_t room(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
  explicit Lanes(T* memory, int64_t n) {
    for (T** array : {&x, &s, &t, &t_power, &logp, &advantage, &weight, &valid, &passes, &shared, &direct})
      *array = memory, memory += room(n);
    for (int64_t k = n; k < room(n); ++k) x[k] = valid[k] = 0;
  }
};

template <class T>
inline void load(const ObjectiveArgs<T>& args, Sequence q, int64_t i, const Lanes<T>& lanes) {
  const int64_t n = q.end - q.begin;
  const bool* mask = args.spans.mask ? args.spans.mask + q.begin : nullptr;
  const T *logps = args.logp + q.begin, *old_logps = args.old_logp + q.begin, clamp_to = args.clamp;
  T *x = lanes.x, *logp = lanes.logp, *valid = lanes.valid, *passes = lanes.passes, *weight = lanes.weight;
  if (mask) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(mask);  // loops over bool do not vectorise
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) valid[k] = static_cast<T>(bytes[k]);
  } else {
    for (int64_t k = 0; k < n; ++k) valid[k] = 1;
  }
  const double span_weight = args.span_weight[i];
  const T sequence_weight = span_weight == 0 ? T(0) : static_cast<T>(span_weight / args.normalizer[0]);
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const bool counts = valid[k] != 0;
    const T own = counts ? logps[k] : T(0), d = own - (counts ? old_logps[k] : T(0));
    logp[k] = own;
    x[k] = clamp(d, -clamp_to, clamp_to);
    passes[k] = (d >= -clamp_to) & (d <= clamp_to) ? T(1) : T(0);
    weight[k] = counts ? sequence_weight : T(0);
  }
  if (const T* token_weight = args.token_weight) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) weight[k] = valid[k] != 0 ? weight[k] * token_weight[q.begin + k] : T(0);
  }
  T* advantage = lanes.advantage;
  if (args.advantages && args.advantages_per_token) {
    const T* advantages = args.advantages + q.begin;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) advantage[k] = valid[k] != 0 ? advantages[k] : T(0);
  } else {
    const T of_sequence = args.advantages ? args.advantages[i] : T(0);
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) advantage[k] = valid[k] != 0 ? of_sequence : T(0);
  }
}

}  // namespace
}  // namespace tokenrl::cpu::TOKENRL_ISA
