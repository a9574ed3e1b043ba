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
// that statistic is not the token alone, its adjoint has to spread them back. aligned: tokens that lie together in one
// array, from a multiple of kItems on, are aligned in all of them.
struct ObjectiveKind {
  bool is_token, through, spreads_back, params_per_token, aligned;
};

// Read from memory where it is needed; else the compiler holds it in a register, or in one that it spills.
template <class V>
__device__ __forceinline__ V read_again(const V& from) {
  return *const_cast<const volatile V*>(&from);
}

// All threads' states combined, in thread 0; elsewhere anything. memory: [kWarps], shared, and free again after the
// next barrier.
template <class S, class Combine>
__device__ __forceinline__ S reduce_to_first(S own, Combine combine, S* memory) {
  own = first_of_lanes<kWarp>(own, combine);
  if (threadIdx.x % kWarp == 0) memory[threadIdx.x / kWarp] = own;
  __syncthreads();
  return threadIdx.x < kWarp ? first_of_lanes<kWarps>(memory[threadIdx.x % kWarps], combine) : own;
}

// What a block works on, and the weight and advantage of its sequence. In shared memory: registers are the gate's.
template <class T>
struct BlockShare {
  TileRange tiles;
  T weight, advantage;

  __device__ __forceinline__ static BlockShare of(const ObjectiveArgs<T>& args, const TileRange& tiles) {
    if (tiles.first >= tiles.last) return {tiles, T(0), T(0)};
    const double span_weight = args.span_weight[tiles.sequence];
    const bool of_sequence = args.advantages && !args.advantages_per_token;
    return {tiles, span_weight == 0 ? T(0) : static_cast<T>(span_weight / args.normalizer[0]),
            of_sequence ? args.advantages[tiles.sequence] : T(0)};
  }
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
  const BlockShare<T>& share;
  ThreadRatios<T>& ratios;  // of this thread
  T loss = 0;
  Marks marks = {};

  // What the gate is put on, of each of a thread's tokens; power: e^x. Bits: of valid tokens, and of those whose
  // statistic has a gradient.
  struct Tokens {
    Items<T> logp, x, power, s, ratio, advantage, weight, position;
    unsigned valid, passes;
  };

  __device__ __forceinline__ Tokens load(const Place& place) const {
    Tokens tokens;
    tokens.valid = valid_bits(args.spans, place), tokens.passes = 0;
    Items<T> old_logp;
    load_items(place, source(args.logp, tokens.logp), source(args.old_logp, old_logp));
    if (!kind.is_token) load_items(place, source(args.coef, tokens.s));
    if constexpr (Gate::positional) {
      Items<int32_t> count;
      load_items(place, source(scratch.counts, count));
#pragma unroll
      for (int k = 0; k < kItems; ++k) tokens.position.of[k] = T(count.of[k]);
    }
    tokens.advantage = all_of(read_again(share.advantage)), tokens.weight = all_of(read_again(share.weight));
    if (args.advantages_per_token) load_items(place, source(args.advantages, tokens.advantage));
    if (args.token_weight) {
      load_items(place, source(args.token_weight, tokens.weight));
#pragma unroll
      for (int k = 0; k < kItems; ++k) tokens.weight.of[k] *= read_again(share.weight);
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const T d = tokens.logp.of[k] - old_logp.of[k], x = within(d, -args.clamp, args.clamp);
      tokens.x.of[k] = x;
      if (!kind.through || !kind.is_token || x == d) tokens.passes |= 1u << k;
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) tokens.power.of[k] = exponential(tokens.x.of[k]);
    return tokens;
  }
  // The statistics, up to the cap, and their ratios. Where the statistic is the token, so is its ratio.
  __device__ __forceinline__ void cap(Tokens& tokens) const {
    if (kind.is_token) {
      const T most = exponential(args.cap);
      tokens.s = tokens.x, tokens.ratio = tokens.power;
#pragma unroll
      for (int k = 0; k < kItems; ++k)
        if (tokens.x.of[k] > args.cap) tokens.ratio.of[k] = most;
    } else {
#pragma unroll
      for (int k = 0; k < kItems; ++k) tokens.ratio.of[k] = exponential(at_most(tokens.s.of[k], args.cap));
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (!(tokens.s.of[k] <= args.cap)) tokens.passes &= ~(1u << k);
      tokens.s.of[k] = at_most(tokens.s.of[k], args.cap);
    }
  }

  // What a token gives to a coefficient: by its statistic, and directly.
  struct Gradient {
    T shared, direct;
  };
  // Of the first of some tokens.
  template <class Params>
  __device__ __forceinline__ Gradient evaluate(const Tokens& tokens, Params params) {
    if (!(tokens.valid & 1)) return {T(0), T(0)};
    const T s = tokens.s.of[0], x = tokens.x.of[0], ratio = tokens.ratio.of[0];
    const T w = tokens.weight.of[0], own = tokens.advantage.of[0];
    const auto of_gate = params();
    const Gated<T> gated =
        Gate::eval(GateInput<T>{s, x, tokens.logp.of[0], own, tokens.position.of[0], ratio}, of_gate);
    marks.add(gated, own > 0);
    loss += product(w, gated.value);
    return {tokens.passes & 1 ? product(w, gated.d_s) : T(0), gated.d_logp == 0 ? T(0) : product(w, gated.d_logp)};
  }

  __device__ __forceinline__ void run(const Place& place) {
    Tokens tokens = load(place);
    cap(tokens);
    observe(tokens);
    Items<T> coef, direct;
    const auto next = [&](auto params) {
      const Gradient own = evaluate(tokens, params);
      turn(tokens);
      cuda::turn(coef, kind.spreads_back ? own.shared : own.shared + own.direct), cuda::turn(direct, own.direct);
    };
    if (kind.params_per_token) {
      // In one copy of the gate's code.
#pragma unroll 1
      for (int64_t token = place.first; token < place.first + kItems; ++token)
        next([&] {
          const auto params = params_at<Gate>(args.params, token);
          tokens.position.of[0] = power_at<Gate>(tokens.position.of[0], params);
          return params;
        });
    } else {
      const auto numbers = params_from<Gate, T>([&](size_t which) { return args.params[which].value; });
#pragma unroll
      for (int k = 0; k < kItems; ++k) tokens.position.of[k] = power_at<Gate>(tokens.position.of[k], numbers);
#pragma unroll
      for (int k = 0; k < kItems; ++k) next([&] { return numbers; });
    }
    if (kind.spreads_back) store_items(place, scratch.direct, direct);
    store_items(place, args.coef, coef);
  }
  __device__ __forceinline__ void observe(const Tokens& tokens) {
    RatioTotals<T> totals = ratios.totals;
    const bool some_far = !totals.are_near();
    RatioSums<T> sums{};
#pragma unroll
    for (int k = 0; k < kItems; ++k)
      if (tokens.valid >> k & 1)
        totals.add(tokens.s.of[k], tokens.ratio.of[k], tokens.x.of[k], tokens.power.of[k], sums);
    totals.tokens += __popc(tokens.valid);
    if (totals.are_near()) totals.near.add(sums);
    else add_far(tokens, some_far);
    ratios.totals = totals;
  }
  // In one copy of its code.
  __device__ __forceinline__ void add_far(Tokens tokens, bool to_some) {
    RatioSums<double> sums{};
#pragma unroll 1
    for (; tokens.valid; turn(tokens)) {
      if (!(tokens.valid & 1)) continue;
      const double ratio = ratio_of(tokens.s.of[0]);
      sums.add(RatioSums<double>{ratio, wide_excess(tokens.x.of[0]), ratio * ratio});
    }
    if (to_some) sums.add(ratios.far);
    ratios.far = sums;
  }

  __device__ __forceinline__ static void turn(Tokens& tokens) {
    cuda::turn(tokens.logp), cuda::turn(tokens.x), cuda::turn(tokens.power), cuda::turn(tokens.s);
    cuda::turn(tokens.ratio), cuda::turn(tokens.advantage), cuda::turn(tokens.weight), cuda::turn(tokens.position);
    tokens.valid >>= 1, tokens.passes >>= 1;
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

// Blocks that share a multiprocessor: left to itself, the compiler spills registers of some kernels to fit more, and in
// those of three blocks it spills what gates of many parameters need; elsewhere than on sm_90, what most need.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kMostResident = 2;
#else
constexpr int kMostResident = 3;
#endif
template <class T, class Gate>
constexpr int kResident = sizeof(T) == 8 ? 1 : (Gate::num_params > 4 ? 2 : kMostResident);

template <class T, class Gate>
__global__ void __launch_bounds__(kThreads, kResident<T, Gate>)
    objective_kernel(ObjectiveArgs<T> args, ObjectiveScratch<T> scratch, ObjectiveKind kind, bool apart) {
  TRL_SHARED(TileTotals<T>, memory, 2 * kWarps);  // of this tile and the one before
  TRL_SHARED(ThreadRatios<T>, ratios, kThreads);
  TRL_SHARED(BlockShare<T>, of_block, 1);
  const TileRange found = tile_range(args.spans, apart, [&](int64_t token) { args.coef[token] = 0; });
  if (threadIdx.x == 0) of_block[0] = BlockShare<T>::of(args, found);
  __syncthreads();
  const TileRange& share = of_block[0].tiles;
  ThreadRatios<T>& own = ratios[threadIdx.x];
  for (own.tile = share.first; own.tile < share.last; ++own.tile) {
    GatedTokens<T, Gate> tokens{args, scratch, kind, of_block[0], own};
    own.totals = RatioTotals<T>::nothing();
    const Sequence tile = share.tile(own.tile);
    int left = static_cast<int>(tile.end - tile.begin) - static_cast<int>(threadIdx.x) * kItems;
    for (own.end = tile.end; left > 0; left -= kChunk)
      tokens.run(place_before(read_again(own.end), left, kind.aligned));
    const auto of_thread = TileTotals<T>::of(tokens.loss, tokens.marks, own);
    const int64_t done = read_again(own.tile);
    const auto totals = reduce_to_first(of_thread, Add{}, memory + done % 2 * kWarps);
    if (threadIdx.x == 0) scratch.totals[share.slot + done] = totals;
  }
  if (is_last_block(scratch.ticket, gridDim.x)) add_up_tiles(args, scratch.totals);
}

}  // namespace tokenrl::cuda
