// What ops.cpp hands to a kernel, on the CPU and on the GPU alike: raw pointers and plain numbers, no torch.
// T is float or double. Pointers marked optional may be null. N tokens, S sequences; every boundary is clamped to [0, N].
#pragma once

#include <cstdint>

#include "gates.h"

namespace tokenrl {

// One entry of the metrics tensor each, in this order (tokenrl/metrics.py). ratio is e^s; kl is the k3 of the token's own ratio.
enum Metric { kTokens, kRatioSum, kRatioMin, kRatioMax, kLow, kHigh, kDual, kKlSum, kRatioSquares, kNumMetrics };

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
};

template <class T>
struct ObjectiveArgs {
  Spans spans;
  const T *logp, *old_logp;   // [N]
  const T* advantages;        // [S] or [N], optional (gates that use none)
  bool advantages_per_token;
  const double* span_weight;  // [S]
  const double* normalizer;   // [1]; a weight is span_weight / normalizer, 0 where the normalizer is not positive
  const T* token_weight;      // [N], optional
  Param<T> params[kMaxParams];
  T clamp, cap;               // log ratios are clamped to +-clamp; the statistic to at most cap
  T *loss, *coef, *metrics;   // [1], [N], [kNumMetrics]
};

template <class T>
struct StatisticArgs {  // forward: input = logp, input2 = old_logp; backward: input = grad, input2 = null
  Spans spans;
  const T *input, *input2;
  T* output;  // [N]; 0 in masked cells
};

template <class T>
struct BandArgs {
  Spans spans;
  const T* log_ratio;
  Param<T> params[3];  // eps_low, eps_high, power
  T *clipped, *inside;  // [N]; 0 in masked cells
};

struct WeightArgs {
  Spans spans;
  const void* advantages;     // optional; float or double
  bool advantages_double, advantages_per_token;
  const int64_t* group_ids;   // [S], optional
  double* span_weight;        // [S]
  int64_t* count;             // [1], zeroed by the caller
};

// Logits are [B, T, V] with strides in elements, the last one 1; every other tensor is contiguous [B, T].
template <class Logit, class T>
struct LogprobArgs {
  int64_t batch, time, vocab, stride_batch, stride_time;
  const Logit* logits;
  const int64_t* ids;
  T temperature;
  T *logp, *entropy, *lse;                 // forward: outputs; backward: lse and entropy are inputs
  const T *grad_logp, *grad_entropy;       // backward; each optional
  Logit* grad_logits;                      // backward; contiguous [B, T, V]
};

}  // namespace tokenrl
