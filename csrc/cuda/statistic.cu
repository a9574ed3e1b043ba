// The statistics and their adjoints as an op of their own: one block per sequence.
#include "launch.h"
#include "spans.cuh"

namespace tokenrl::cuda {

template <class T>
struct SequenceStatistic {
  const StatisticArgs<T>& args;
  int32_t* counts;
  bool mean;
  Sequence q;
  Running<T>* memory;

  __device__ __forceinline__ bool valid(int64_t token) const { return is_valid(args.spans, token); }
  __device__ __forceinline__ T value(int64_t token) const {
    return args.input2 ? args.input[token] - args.input2[token] : args.input[token];
  }
  __device__ __forceinline__ Running<T> element(int64_t token, Combine<T> combine) const {
    Running<T> element = combine.nothing();
    element.fresh = is_start(args.spans, q, token);
    if (valid(token)) {
      element.count = 1;
      element.value = value(token);
    }
    return element;
  }

  __device__ __forceinline__ void token() const {
    for (int64_t t = q.begin + threadIdx.x; t < q.end; t += kThreads) args.output[t] = valid(t) ? value(t) : T(0);
  }

  __device__ __forceinline__ void prefix(Statistic statistic) const {
    const bool least = is_minimum(statistic);
    const Combine<T> combine{least ? Fold::least : Fold::add};
    walk<T>(
        q, false, combine, [&](int64_t t) { return element(t, combine); },
        [&](int64_t t, const Running<T>& before, const Running<T>& after) {
          T s = mean ? after.value / T(after.count) : after.value;
          if (least && valid(t)) s = value(t) + least_before(statistic, after.count > 1, before.value);
          args.output[t] = valid(t) ? s : T(0);
        },
        memory);
  }

  // Totals lie at the end of each span after the way forwards; the way backwards hands them to every token.
  __device__ __forceinline__ void span() const {
    const Combine<T> add{Fold::add}, copy{Fold::copy};
    walk<T>(
        q, false, add, [&](int64_t t) { return element(t, add); },
        [&](int64_t t, const Running<T>&, const Running<T>& after) {
          args.output[t] = after.value;
          counts[t] = after.count;
        },
        memory);
    walk<T>(
        q, true, copy,
        [&](int64_t t) { return is_end(args.spans, q, t) ? Running<T>{1, counts[t], args.output[t]} : copy.nothing(); },
        [&](int64_t t, const Running<T>&, const Running<T>& after) {
          args.output[t] = valid(t) ? (mean ? after.value / T(after.count) : after.value) : T(0);
        },
        memory);
  }

  // Adjoint of a prefix statistic: sums from each token to the end of its span, each term divided by its own position
  // for the mean.
  __device__ __forceinline__ void suffix() const {
    const Combine<T> add{Fold::add};
    walk<T>(
        q, false, add, [&](int64_t t) { return element(t, add); },
        [&](int64_t t, const Running<T>&, const Running<T>& after) {
          args.output[t] = !valid(t) ? T(0) : mean ? value(t) / T(after.count) : value(t);
        },
        memory);
    walk<T>(
        q, true, add, [&](int64_t t) { return Running<T>{is_end(args.spans, q, t), 0, args.output[t]}; },
        [&](int64_t t, const Running<T>&, const Running<T>& after) { args.output[t] = valid(t) ? after.value : T(0); },
        memory);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    statistic_kernel(StatisticArgs<T> args, int32_t* counts, Statistic statistic, bool adjoint) {
  TRL_SHARED(Running<T>, memory, kWarps);
  const int64_t i = blockIdx.x;
  const auto clear = [&](int64_t token) { args.output[token] = 0; };
  clear_outside(args.spans, i, clear);
  if (i >= args.spans.num_sequences) return;
  const bool mean = statistic == Statistic::prefix_mean || statistic == Statistic::span_mean;
  const Sequence q = without_padding(args.spans, sequence_of(args.spans, i), clear);
  const SequenceStatistic<T> sequence{args, counts, mean, q, memory};
  if (statistic == Statistic::token) sequence.token();
  else if (statistic == Statistic::span_sum || statistic == Statistic::span_mean) sequence.span();
  else if (adjoint) sequence.suffix();
  else sequence.prefix(statistic);
}

template <class T>
const char* statistic(const StatisticArgs<T>& args, Statistic statistic, bool adjoint, int32_t* counts, void* stream) {
  TRL_LAUNCH((statistic_kernel<T>), blocks_of(args.spans), kThreads, 0, stream, args, counts, statistic, adjoint);
  return launch_error();
}

template const char* statistic(const StatisticArgs<float>&, Statistic, bool, int32_t*, void*);
template const char* statistic(const StatisticArgs<double>&, Statistic, bool, int32_t*, void*);

static const bool listed = list_kernel("statistic float", &statistic_kernel<float>) &&
                           list_kernel("statistic double", &statistic_kernel<double>);

}  // namespace tokenrl::cuda
