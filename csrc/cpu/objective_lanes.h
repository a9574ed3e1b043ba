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
  T *x, *s, *t, *t_power, *ratio, *logp, *advantage, *weight, *valid, *passes, *shared, *direct;
  static constexpr int kArrays = 12;

  // Whole vectors, and a cache line: at distances of a page's fraction the arrays would contend for the same lines.
  static int64_t room(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes + 16; }
  explicit Lanes(T* memory, int64_t n) {
    for (T** array : {&x, &s, &t, &t_power, &ratio, &logp, &advantage, &weight, &valid, &passes, &shared, &direct})
      *array = memory, memory += room(n);
    for (int64_t k = n; k < room(n); ++k) x[k] = valid[k] = 0;
  }
};

template <class T>
inline void load(const ObjectiveArgs<T>& args, Sequence q, int64_t i, bool through, const Lanes<T>& lanes) {
  const int64_t n = q.end - q.begin;
  const bool* mask = args.spans.mask ? args.spans.mask + q.begin : nullptr;
  const T *logps = args.logp + q.begin, *old_logps = args.old_logp + q.begin, clamp_to = args.clamp;
  T *x = lanes.x, *logp = lanes.logp, *valid = lanes.valid, *passes = lanes.passes;
  T *weight = lanes.weight, *advantage = lanes.advantage;
  if (mask) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(mask);  // loops over bool do not vectorise
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) valid[k] = static_cast<T>(bytes[k]);
  } else {
    for (int64_t k = 0; k < n; ++k) valid[k] = 1;
  }
  const double span_weight = args.span_weight[i];
  const T sequence_weight = span_weight == 0 ? T(0) : static_cast<T>(span_weight / args.normalizer[0]);
  const T of_sequence = args.advantages && !args.advantages_per_token ? args.advantages[i] : T(0);
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const bool counts = valid[k] != 0;
    const T own = counts ? logps[k] : T(0), d = own - (counts ? old_logps[k] : T(0));
    logp[k] = own;
    x[k] = clamp(d, -clamp_to, clamp_to);
    weight[k] = counts ? sequence_weight : T(0);
    advantage[k] = counts ? of_sequence : T(0);
  }
  if (through) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      const T d = valid[k] != 0 ? logps[k] - old_logps[k] : T(0);
      passes[k] = (d >= -clamp_to) & (d <= clamp_to) ? T(1) : T(0);
    }
  }
  if (const T* token_weight = args.token_weight) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) weight[k] = valid[k] != 0 ? weight[k] * token_weight[q.begin + k] : T(0);
  }
  if (args.advantages && args.advantages_per_token) {
    const T* advantages = args.advantages + q.begin;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) advantage[k] = valid[k] != 0 ? advantages[k] : T(0);
  }
}

// Asks for the tokens behind q, whose log-probs then arrive while these are worked on.
template <class T>
inline void prefetch_after(const ObjectiveArgs<T>& args, Sequence q) {
  const int64_t end = smaller(q.end + (q.end - q.begin), args.spans.num_tokens);
  for (int64_t token = q.end; token < end; token += 64 / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(args.logp + token);
    __builtin_prefetch(args.old_logp + token);
  }
}

// through: the true derivative stops where the log ratio was clamped, and an adjoint has left sums in masked cells.
template <class T>
inline void store_coefficients(const ObjectiveArgs<T>& args, Sequence q, bool through, const Lanes<T>& lanes) {
  T* coef = args.coef + q.begin;
  const T *shared = lanes.shared, *direct = lanes.direct, *valid = lanes.valid, *passes = lanes.passes;
  const int64_t n = q.end - q.begin;
  if (!through) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) coef[k] = shared[k] + direct[k];
    return;
  }
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) coef[k] = select(valid[k] * passes[k] != 0, shared[k], T(0)) + direct[k];
}

}  // namespace
}  // namespace tokenrl::cpu::TOKENRL_ISA
