// What ops.cpp hands to a kernel, on the CPU and on the GPU alike: raw pointers and plain numbers, no torch.
// T is float or double. Pointers marked optional may be null. N tokens, S sequences; every boundary is clamped to [0,
// N].
#pragma once

#include <cstdint>

#include "divergences.h"
#include "gates/table.h"

namespace tokenrl {

// One entry of the metrics tensor each, in this order (tokenrl/objectives/metrics.py). ratio is e^s; kl is the k3 of
// the token's own ratio, log_ratio its logarithm; low_pos and high_pos count tokens of A > 0.
enum Metric {
  kTokens,
  kRatioSum,
  kRatioMin,
  kRatioMax,
  kLow,
  kHigh,
  kDual,
  kKlSum,
  kRatioSquares,
  kLogRatioSum,
  kLowPos,
  kHighPos,
  kNumMetrics
};

// Where tokens and their sequences and segments lie.
struct Spans {
  int64_t num_tokens, num_sequences;
  const int64_t* cu_seqlens;  // [S + 1]
  const bool* mask;           // [N], optional: every token is valid
  const bool* starts;         // [N], optional: a new segment starts at this valid token (sequence starts are implied)
};

// A gate parameter: one number, or one value per token.
template <class T>
struct Param {
  const T* tensor;  // [N], optional
  T value;

  TRL_HD T at(int64_t token) const { return tensor ? tensor[token] : value; }
};
template <class Gate, class T>
TRL_HD ParamsOf<Gate, T> params_at(const Param<T>* params, int64_t token) {
  T values[Gate::num_params + 1];  // one by one: read into the struct at once they cost the GPU more registers
  for (int k = 0; k < Gate::num_params; ++k) values[k] = params[k].at(token);
  return params_from<Gate, T>([&](size_t k) { return values[k]; });
}

template <class T>
struct ObjectiveArgs {
  Spans spans;
  const T *logp, *old_logp;  // [N]
  const T* advantages;       // [S] or [N], optional (gates that use none)
  bool advantages_per_token;
  const double* span_weight;  // [S]
  const double* normalizer;   // [1]; a weight is span_weight / normalizer, and 0 / 0 is 0
  const T* token_weight;      // [N], optional
  Param<T> params[kMaxParams];
  T clamp, cap;     // log ratios are clamped to +-clamp; the statistic to at most cap
  T *loss, *coef;   // [1], [N]
  double* metrics;  // [kNumMetrics]
};

template <class T>
struct StatisticArgs {  // forward: input = logp, input2 = old_logp; backward: input = grad, input2 = null
  Spans spans;
  const T *input, *input2;
  T* output;  // [N]; 0 in masked cells
};

struct PositionAdaptiveClip {
  TRL_PARAMS(eps_low, eps_high, power);
};
template <class T>
struct ClipArgs {
  Spans spans;
  const T* log_ratio;
  Param<T> params[PositionAdaptiveClip::num_params];
  T *clipped, *inside;  // [N]; 0 in masked cells
};

struct WeightArgs {
  Spans spans;
  const void* advantages;  // optional; float or double
  bool advantages_double, advantages_per_token;
  const int64_t* group_ids;  // [S], optional
  double scale;
  double* span_weight;  // [S]
  double* normalizer;   // [1]: scale times the count of the unit
};

// z = softcap tanh(logit_scale x / softcap) / temperature of a logit x; without a softcap it is infinite.
template <class T>
struct Transform {
  T temperature, softcap, logit_scale;
  const T* temperatures;  // [B, T], optional: in place of the number
  const bool* keep;       // [B, T, V], optional, by strides, the last one 1; false takes a logit out as -inf does
  int64_t keep_stride_batch, keep_stride_time;
};

// Logits are [B, T, V] with strides in elements, the last one 1; every other tensor is contiguous [B, T], with K ids
// per row [B, T, K].
template <class Logit, class T>
struct LogprobArgs {
  int64_t batch, time, vocab, num_ids, stride_batch, stride_time;
  const Logit* logits;
  const int64_t* ids;
  Transform<T> transform;
  // Forward: outputs. Backward: inputs, as far as they are gradients' or log_sum_sq_probs' business.
  T *logp, *entropy, *lse, *lse_rest;           // lse_rest: what lse lost when it was rounded
  T *log_sum_sq_probs, *mean_logit, *max_prob;  // each optional
  bool* is_top1;                                // [B, T, K], optional
  int64_t* rank;                                // [B, T, K], optional
  // Backward. Each upstream gradient is optional; the logits' gradient may be in their own memory.
  const T *grad_logp, *grad_entropy, *grad_lse, *grad_log_sum_sq_probs;
  Logit* grad_logits;
  int64_t grad_stride_batch, grad_stride_time;
};

// Two heads' logits, p of `of` and r of `other`: their logits, lse, lse_rest and transforms, and where `of` has them
// the gradient's place and strides, of whichever logits it is.
template <class Logit, class T>
struct DivergenceArgs {
  LogprobArgs<Logit, T> of, other;
  const bool* rows;  // [B, T], optional: false takes a row out
  T params[kMaxDivergenceParams];
  // Forward. lse and lse_rest are outputs too; inputs where they are known, which a kind of one sweep does not ask.
  bool statistics_known;
  T *value, *by_p, *by_r;  // [B, T]: the sums over the vocabulary
  // Backward, of p's logits or of the other ones.
  bool of_other;
  const T *grad, *by;  // [B, T]; by: the sum by_p or by_r, of the logits that the gradient is of
};

}  // namespace tokenrl
