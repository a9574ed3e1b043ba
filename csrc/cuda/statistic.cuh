// How the statistics are launched: for the op, and for the objective around its gate.
#pragma once

#include "launch.h"
#include "spans.cuh"

namespace tokenrl::cuda {

// What else an adjoint goes through, in the objective: 0 where the token's own log ratio was clamped, plus `direct`.
template <class T>
struct OwnShare {
  const T *logp, *old_logp, *direct;  // [N]; direct is null where there is none of this
};

template <class T>
struct StatisticRun {
  StatisticArgs<T> args;
  T clamp;           // of args.input - args.input2, when it is the log ratio
  int32_t* counts;   // [N]: written forwards, of prefixes and spans; read by the adjoint of a mean over a prefix
  Running<T>* sums;  // [num_slots]
  OwnShare<T> own;
  bool aligned;  // launch_statistic finds out
};

template <class T>
void launch_statistic(StatisticRun<T> run, Statistic statistic, bool adjoint, void* stream);

inline size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

template <class T>
size_t statistic_scratch(const Spans& spans) {
  return aligned(spans.num_tokens * sizeof(int32_t)) + aligned(num_slots(spans) * sizeof(Running<T>));
}

}  // namespace tokenrl::cuda
