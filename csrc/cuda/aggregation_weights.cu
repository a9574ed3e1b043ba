// Aggregation weights: tokens and sign of each sequence, then, for groups, every sequence against every other.
#include "launch.h"
#include "spans.cuh"

namespace tokenrl::cuda {

// What the pairs need to know of a sequence.
struct SequenceCount {
  int64_t tokens;
  int32_t sign, unused;
};

struct CountAndSum {
  int64_t tokens;
  double advantage;

  __device__ __forceinline__ void add(const CountAndSum& other) {
    tokens += other.tokens;
    advantage += other.advantage;
  }
};

struct AddCounts {
  __device__ __forceinline__ CountAndSum operator()(CountAndSum a, const CountAndSum& b) const {
    a.add(b);
    return a;
  }
};

__device__ __forceinline__ double advantage_at(const WeightArgs& args, int64_t i) {
  return args.advantages_double ? static_cast<const double*>(args.advantages)[i]
                                : static_cast<const float*>(args.advantages)[i];
}

__device__ __forceinline__ int32_t sign_of(double x) { return (x > 0) - (x < 0); }

__device__ __forceinline__ void add_to(int64_t* count, int64_t amount) {
  if (amount != 0) atomicAdd(reinterpret_cast<unsigned long long*>(count), static_cast<unsigned long long>(amount));
}

// One block per sequence. Weights that need no group are final here.
__global__ void __launch_bounds__(kThreads) count_kernel(WeightArgs args, SequenceCount* counts, Span span, Unit unit) {
  TRL_SHARED(CountAndSum, memory, kWarps);
  const int64_t i = blockIdx.x;
  const Sequence q = sequence_of(args.spans, i);
  CountAndSum own{0, 0};
  for (int64_t token = q.begin + threadIdx.x; token < q.end; token += kThreads) {
    if (!is_valid(args.spans, token)) continue;
    own.add({1, args.advantages && args.advantages_per_token ? advantage_at(args, token) : 0.0});
  }
  own = reduce(own, AddCounts{}, memory);
  if (threadIdx.x != 0) return;
  if (args.advantages && !args.advantages_per_token) own.advantage = advantage_at(args, i);
  if (unit == Unit::tokens) add_to(args.count, own.tokens);
  if (unit == Unit::rows) add_to(args.count, own.tokens > 0);
  if (span == Span::one) args.span_weight[i] = own.tokens > 0 ? 1.0 : 0.0;
  if (span == Span::inverse_length) args.span_weight[i] = own.tokens > 0 ? 1.0 / static_cast<double>(own.tokens) : 0.0;
  counts[i] = {own.tokens, span == Span::balanced ? sign_of(own.advantage) : 0, 0};
}

// One thread per sequence, which meets all others in tiles of shared memory. Signs are all 0 unless they matter.
__global__ void __launch_bounds__(kThreads)
    group_kernel(WeightArgs args, const SequenceCount* counts, Span span, Unit unit) {
  TRL_SHARED(SequenceCount, other_counts, kThreads);
  TRL_SHARED(int64_t, other_groups, kThreads);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, sequences = args.spans.num_sequences;
  const bool exists = i < sequences, balanced = span == Span::balanced;
  const SequenceCount own = exists ? counts[i] : SequenceCount{0, 0, 0};
  const int64_t group = exists ? args.group_ids[i] : 0;
  int64_t tokens = 0, same_sign = 0, signed_rows = 0;
  bool leads = own.tokens > 0;
  for (int64_t tile = 0; tile < sequences; tile += kThreads) {
    const int64_t mine = tile + threadIdx.x;
    if (mine < sequences) {
      other_counts[threadIdx.x] = counts[mine];
      other_groups[threadIdx.x] = args.group_ids[mine];
    }
    __syncthreads();
    const int tile_size = static_cast<int>(smaller(sequences - tile, int64_t{kThreads}));
    for (int k = 0; k < tile_size; ++k) {
      const SequenceCount other = other_counts[k];
      if (other.tokens == 0 || other_groups[k] != group) continue;
      leads = leads && tile + k >= i;
      signed_rows += other.sign != 0;
      if (other.sign != own.sign) continue;
      ++same_sign;
      tokens += other.tokens;
    }
    __syncthreads();
  }
  if (!exists) return;
  if (unit == Unit::groups && leads) add_to(args.count, 1);
  if (span != Span::group && !balanced) return;
  const bool weighs = own.tokens > 0 && (!balanced || own.sign != 0);
  const double share = balanced ? static_cast<double>(same_sign) / static_cast<double>(signed_rows) : 1.0;
  args.span_weight[i] = weighs ? share / static_cast<double>(tokens) : 0.0;
}

size_t aggregation_weights_scratch_bytes(int64_t num_sequences) { return num_sequences * sizeof(SequenceCount); }

const char* aggregation_weights(const WeightArgs& args, Span span, Unit unit, void* scratch, void* stream) {
  const int64_t sequences = args.spans.num_sequences;
  if (sequences == 0) return nullptr;
  auto* counts = static_cast<SequenceCount*>(scratch);
  TRL_LAUNCH(count_kernel, sequences, kThreads, 0, stream, args, counts, span, unit);
  if (args.group_ids)
    TRL_LAUNCH(group_kernel, (sequences + kThreads - 1) / kThreads, kThreads, 0, stream, args, counts, span, unit);
  return launch_error();
}

static const bool listed =
    list_kernel("aggregation_weights count", &count_kernel) && list_kernel("aggregation_weights groups", &group_kernel);

}  // namespace tokenrl::cuda
