// The objective's kernel: one block per sequence, then the last block to finish adds up the sequences.
#pragma once

#include "../statistics.h"
#include "spans.cuh"
#include "totals.cuh"

namespace tokenrl::cuda {

// Memory of a launch: what one pass leaves for the next, and what one block leaves for the last.
template <class T>
struct ObjectiveScratch {
  SequenceTotals<T>* totals;  // [S]
  T* direct;                  // [N]: w d_logp
  int32_t* counts;            // [N]
  unsigned* ticket;
};

// What args.coef holds in turn; no statistic and flow needs all of it:
//
//   written by     for                      a token's entry
//   gather_spans   span statistics          sum of its span's log ratios up to it; the last token's is the total
//   evaluate       "local", or token        w d_s + w d_logp: the coefficient
//   evaluate       "through", the others    w d_s, of a mean over its count; scratch.direct keeps w d_logp
//   spread_back    "through", over spans    sum of these from it to its span's end; the first token's is the total
//   finish         "through", the others    the adjoint + w d_logp: the coefficient
template <class T, class Gate>
struct SequenceObjective {
  const ObjectiveArgs<T>& args;
  const ObjectiveScratch<T>& scratch;
  Statistic statistic;
  bool through;
  Sequence q;
  T weight, advantage;  // of the sequence
  SequenceTotals<T> totals;
  Running<T>* memory;

  __device__ __forceinline__ bool valid(int64_t token) const { return is_valid(args.spans, token); }
  __device__ __forceinline__ bool over_span() const {
    return statistic == Statistic::span_sum || statistic == Statistic::span_mean;
  }
  __device__ __forceinline__ bool mean() const {
    return statistic == Statistic::prefix_mean || statistic == Statistic::span_mean;
  }
  __device__ __forceinline__ T log_ratio(int64_t token) const {
    return clamp(args.logp[token] - args.old_logp[token], -args.clamp, args.clamp);
  }

  __device__ __forceinline__ Running<T> ratio_element(int64_t token, Combine<T> combine) const {
    Running<T> element = combine.nothing();
    element.fresh = is_start(args.spans, q, token);
    if (valid(token)) {
      element.count = 1;
      element.value = log_ratio(token);
    }
    return element;
  }

  __device__ __forceinline__ Gated<T> gate(int64_t token, T s, T x, T own, int32_t t) const {
    const auto params = params_at<Gate>(args.params, token);
    const T t_power = position_power<Gate>(T(t), params);
    return Gate::eval(GateInput<T>{s, x, args.logp[token], own, t_power}, params);
  }

  __device__ __forceinline__ void observe(T x, T s, const Gated<T>& gated, bool positive) {
    const double ratio = wide_exponential(s);
    const bool low = gated.low > 0, high = gated.high > 0;
    totals.add(SequenceTotals<T>{T(0), s, s, x, ratio, wide_excess(x), ratio * ratio, 1, low, high, gated.dual > 0,
                                 low & positive, high & positive});
  }

  // The statistic of one token is known: its loss, and its coefficient as far as other tokens have no part in it.
  __device__ __forceinline__ void evaluate(int64_t token, T statistic_value, int32_t t, int32_t divisor) {
    const T s = smaller(statistic_value, args.cap), x = log_ratio(token);
    const T own = args.advantages_per_token ? args.advantages[token] : advantage;
    const Gated<T> gated = gate(token, s, x, own, t);
    observe(x, s, gated, own > 0);
    const T w = args.token_weight ? weight * args.token_weight[token] : weight;
    totals.loss += w != 0 ? w * gated.value : T(0);
    const T shared = w != 0 && statistic_value <= args.cap ? w * gated.d_s : T(0),
            direct = w != 0 ? w * gated.d_logp : T(0);
    if (through && statistic != Statistic::token) {
      args.coef[token] = mean() ? shared / T(divisor) : shared;
      scratch.direct[token] = direct;
    } else {
      args.coef[token] = (through && !clamp_passes(token) ? T(0) : shared) + direct;
    }
  }

  __device__ __forceinline__ bool clamp_passes(int64_t token) const {
    const T d = args.logp[token] - args.old_logp[token];
    return d >= -args.clamp && d <= args.clamp;
  }

  __device__ __forceinline__ void finish(int64_t token, T adjoint) const {
    args.coef[token] = valid(token) ? (clamp_passes(token) ? adjoint : T(0)) + scratch.direct[token] : T(0);
  }

  // Inclusive sums and counts within each span; the last token of a span then holds its totals.
  __device__ __forceinline__ void gather_spans() {
    const Combine<T> combine{Fold::add};
    walk<T>(
        q, false, combine, [&](int64_t token) { return ratio_element(token, combine); },
        [&](int64_t token, const Running<T>&, const Running<T>& after) {
          args.coef[token] = after.value;
          scratch.counts[token] = after.count;
        },
        memory);
  }

  // Prefix statistics gather on the way forwards; span statistics carry totals from the end of each span backwards.
  __device__ __forceinline__ void evaluate_tokens() {
    const bool spans = over_span();
    const Combine<T> combine{spans ? Fold::copy : is_minimum(statistic) ? Fold::least : Fold::add};
    walk<T>(
        q, spans, combine,
        [&](int64_t token) {
          if (!spans) return ratio_element(token, combine);
          if (!is_end(args.spans, q, token)) return combine.nothing();
          return Running<T>{1, scratch.counts[token], args.coef[token]};
        },
        [&](int64_t token, const Running<T>& before, const Running<T>& after) {
          if (!valid(token)) {
            args.coef[token] = 0;
            return;
          }
          T s = mean() ? after.value / T(after.count) : after.value;
          if (statistic == Statistic::token) s = log_ratio(token);
          if (is_minimum(statistic)) s = log_ratio(token) + least_before(statistic, after.count > 1, before.value);
          evaluate(token, s, spans ? scratch.counts[token] : after.count, after.count);
        },
        memory);
  }

  // The adjoint: sums from each token to the end of its span; for span statistics the first token's goes to all.
  __device__ __forceinline__ void spread_back() {
    const bool spans = over_span();
    walk<T>(
        q, true, Combine<T>{Fold::add},
        [&](int64_t token) {
          return Running<T>{is_end(args.spans, q, token), 0, valid(token) ? args.coef[token] : T(0)};
        },
        [&](int64_t token, const Running<T>&, const Running<T>& after) {
          if (spans) args.coef[token] = after.value;
          else finish(token, after.value);
        },
        memory);
    if (!spans) return;
    const Combine<T> copy{Fold::copy};
    walk<T>(
        q, false, copy,
        [&](int64_t token) {
          return is_start(args.spans, q, token) ? Running<T>{1, 0, args.coef[token]} : copy.nothing();
        },
        [&](int64_t token, const Running<T>&, const Running<T>& after) { finish(token, after.value); }, memory);
  }

  __device__ __forceinline__ void run() {
    if (over_span()) gather_spans();
    evaluate_tokens();
    if (through && statistic != Statistic::token) spread_back();
  }
};

template <class T>
__device__ __forceinline__ void add_up_sequences(const ObjectiveArgs<T>& args, const SequenceTotals<T>* per_sequence) {
  BatchTotals sum = BatchTotals::nothing();
#pragma unroll 2  // more would spill registers
  for (int64_t i = threadIdx.x; i < args.spans.num_sequences; i += kThreads) sum.add(per_sequence[i]);
  TRL_SHARED(BatchTotals, memory, kWarps);
  sum = reduce(sum, Add{}, memory);
  if (threadIdx.x == 0) args.loss[0] = static_cast<T>(sum.loss);
  if (threadIdx.x < kNumMetrics) args.metrics[threadIdx.x] = sum.metric(threadIdx.x);
}

// Blocks that share a multiprocessor: left to itself, the compiler spills registers of some kernels to fit more.
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 2 : 3;

template <class T, class Gate>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    objective_kernel(ObjectiveArgs<T> args, ObjectiveScratch<T> scratch, Statistic statistic, bool through) {
  TRL_SHARED(Running<T>, scan_memory, kWarps);
  TRL_SHARED(SequenceTotals<T>, reduce_memory, kWarps);
  const int64_t i = blockIdx.x;
  const auto clear = [&](int64_t token) { args.coef[token] = 0; };
  clear_outside(args.spans, i, clear);
  if (i < args.spans.num_sequences) {
    const double span_weight = args.span_weight[i];
    const T weight = span_weight == 0 ? T(0) : static_cast<T>(span_weight / args.normalizer[0]);
    const T advantage = args.advantages && !args.advantages_per_token ? args.advantages[i] : T(0);
    SequenceObjective<T, Gate> sequence{args,
                                        scratch,
                                        statistic,
                                        through,
                                        without_padding(args.spans, sequence_of(args.spans, i), clear),
                                        weight,
                                        advantage,
                                        SequenceTotals<T>::nothing(),
                                        scan_memory};
    sequence.run();
    const SequenceTotals<T> totals = reduce(sequence.totals, Add{}, reduce_memory);
    if (threadIdx.x == 0) scratch.totals[i] = totals;
  }
  if (is_last_block(scratch.ticket, gridDim.x)) add_up_sequences(args, scratch.totals);
}

}  // namespace tokenrl::cuda
