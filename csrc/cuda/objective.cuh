// The objective's kernel: it puts the gate on every token's statistic, and the last block to finish adds up what the
// others found. Whatever adds up tokens along a sequence is the statistics' business, before it and after it.
#pragma once

#include "statistic.cuh"
#include "totals.cuh"

namespace tokenrl::cuda {

// Memory of a launch: what one kernel leaves for the next, and what one block leaves for the last.
template <class T>
struct ObjectiveScratch {
  TileTotals<T>* totals;  // [num_slots]: of a tile
  T* direct;              // [N]: w d_logp
  int32_t* counts;        // [N]: of the tokens that a statistic is of; of a prefix, the position
  Running<T>* sums;
  unsigned* ticket;
};

// What is asked of the kernel. through: other tokens than those of its statistic have a part in a coefficient; where
// that statistic is not the token alone, its adjoint has to spread them back.
struct ObjectiveKind {
  bool is_token, through, spreads_back, params_per_token;
};

// What args.coef holds in turn:
//
//   written by     for                      a token's entry
//   statistic      all but "token"          the statistic
//   this kernel    "local", or token        w d_s + w d_logp: the coefficient
//                  "through", the others    w d_s; scratch.direct has w d_logp
//   its adjoint    "through", the others    the adjoint of w d_s, + w d_logp: the coefficient
template <class T, class Gate>
struct GatedTokens {
  const ObjectiveArgs<T>& args;
  const ObjectiveScratch<T>& scratch;
  const ObjectiveKind kind;
  T weight, advantage;  // of the sequence
  TileTotals<T> totals;

  __device__ __forceinline__ ParamsOf<Gate, T> params(int64_t token) const {
    if (kind.params_per_token) return params_at<Gate>(args.params, token);
    return params_from<Gate, T>([&](size_t k) { return args.params[k].value; });
  }

  __device__ __forceinline__ void observe(T x, T s, const Gated<T>& gated, bool positive) {
    const double ratio = ratio_of(s);
    const bool low = gated.low > 0, high = gated.high > 0;
    using Counts = BoundCounts;
    totals.add(TileTotals<T>{
        T(0),
        s,
        s,
        x,
        ratio,
        wide_excess(x),
        ratio * ratio,
        {Counts::both(true, gated.dual > 0), Counts::both(low, high), Counts::both(low & positive, high & positive)},
        0});
  }

  // The coefficient of a valid token, as far as other tokens have no part in it.
  __device__ __forceinline__ T evaluate(int64_t token, T statistic, T x, T logp, bool clamped) {
    const T own = args.advantages_per_token ? args.advantages[token] : advantage;
    const T w = args.token_weight ? weight * args.token_weight[token] : weight, s = smaller(statistic, args.cap);
    const auto of_gate = params(token);
    T t_power = 1;
    if constexpr (Gate::positional) t_power = position_power<Gate>(T(scratch.counts[token]), of_gate);
    const Gated<T> gated = Gate::eval(GateInput<T>{s, x, logp, own, t_power}, of_gate);
    observe(x, s, gated, own > 0);
    totals.loss += w != 0 ? w * gated.value : T(0);
    const T shared = w != 0 && statistic <= args.cap && !clamped ? w * gated.d_s : T(0);
    const T direct = w != 0 ? w * gated.d_logp : T(0);
    if (!kind.spreads_back) return shared + direct;
    scratch.direct[token] = direct;
    return shared;
  }

  // A thread's tokens one after another, in one copy of the gate's code.
  __device__ __forceinline__ void run(int64_t first, int live) {
    unsigned valid = valid_bits(args.spans, first, live), clamped = 0;
    const Items<T> old_logp = load_items(args.old_logp + first, live);
    Items<T> logp = load_items(args.logp + first, live), x, statistic, coef;
    if (!kind.is_token) statistic = load_items(args.coef + first, live);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const T d = logp.of[k] - old_logp.of[k];
      x.of[k] = clamp(d, -args.clamp, args.clamp);
      if (!kind.is_token) continue;
      statistic.of[k] = x.of[k];
      if (kind.through) clamped |= (x.of[k] == d ? 0u : 1u) << k;
    }
#pragma unroll 1
    for (int64_t token = first; token < first + kItems; ++token, valid >>= 1, clamped >>= 1) {
      const T s = turn(statistic), own = turn(x), at = turn(logp);
      turn(coef, valid & 1 ? evaluate(token, s, own, at, clamped & 1) : T(0));
    }
    store_items(args.coef + first, live, coef);
  }
  // The first of some items, which moves behind the others.
  __device__ __forceinline__ static T turn(Items<T>& items, T last = T(0)) {
    const T first = items.of[0];
#pragma unroll
    for (int k = 1; k < kItems; ++k) items.of[k - 1] = items.of[k];
    items.of[kItems - 1] = last;
    return first;
  }
};

// Each thread adds up sequences, the tiles of each in order, so that a sequence counts the same wherever it lies.
template <class T>
__device__ __forceinline__ void add_up_tiles(const ObjectiveArgs<T>& args, const TileTotals<T>* of_tile) {
  BatchTotals sum = BatchTotals::nothing();
  for (int64_t i = threadIdx.x; i < args.spans.num_sequences; i += kThreads) {
    const int64_t slot = slot_of(args.spans, i), tiles = sequence_of(args.spans, i).tiles();
    for (int64_t k = 0; k < tiles; ++k) sum.add(BatchTotals::of(of_tile[slot + k]));
  }
  TRL_SHARED(BatchTotals, memory, kWarps);
  sum = reduce(sum, Add{}, memory);
  if (threadIdx.x != 0) return;
  args.loss[0] = static_cast<T>(sum.loss);
#pragma unroll
  for (int m = 0; m < kNumMetrics; ++m) args.metrics[m] = sum.metric(m);
}

// Blocks that share a multiprocessor: left to itself, the compiler spills registers of some kernels to fit more.
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 1 : 3;

template <class T, class Gate>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    objective_kernel(ObjectiveArgs<T> args, ObjectiveScratch<T> scratch, ObjectiveKind kind, bool apart) {
  TRL_SHARED(TileTotals<T>, memory, kWarps);
  const TileRange share = tile_range(args.spans, apart, [&](int64_t token) { args.coef[token] = 0; });
  for (int64_t which = share.first; which < share.last; ++which) {
    const double span_weight = args.span_weight[share.sequence];
    const T weight = span_weight == 0 ? T(0) : static_cast<T>(span_weight / args.normalizer[0]);
    const T advantage = args.advantages && !args.advantages_per_token ? args.advantages[share.sequence] : T(0);
    GatedTokens<T, Gate> tokens{args, scratch, kind, weight, advantage, TileTotals<T>::nothing()};
    const Sequence tile = share.tile(which);
    for (int64_t first = tile.begin + threadIdx.x * kItems; first < tile.end; first += kChunk)
      tokens.run(first, static_cast<int>(smaller(tile.end - first, int64_t{kItems})));
    const TileTotals<T> totals = reduce(tokens.totals, Add{}, memory);
    if (threadIdx.x == 0) scratch.totals[share.slot + which] = totals;
    __syncthreads();  // memory is free again
  }
  if (is_last_block(scratch.ticket, gridDim.x)) add_up_tiles(args, scratch.totals);
}

}  // namespace tokenrl::cuda
