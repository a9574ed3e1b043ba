// Aggregation weights: tokens and sign of each sequence, then, for groups, every sequence against every other. Blocks
// leave counts, which the last of them adds up.
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
  __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const { return a + b; }
};

__device__ __forceinline__ double advantage_at(const WeightArgs& args, int64_t i) {
  return args.advantages_double ? static_cast<const double*>(args.advantages)[i]
                                : static_cast<const float*>(args.advantages)[i];
}

__device__ __forceinline__ int32_t sign_of(double x) { return (x > 0) - (x < 0); }

struct WeightScratch {
  SequenceCount* counts;  // [S]
  int64_t* groups;        // one per block of the group kernel
  unsigned* ticket;
};

// The last block adds up count(i) of all blocks, or sequences, and scales it.
template <class Count>
__device__ __forceinline__ void finish(const WeightArgs& args, unsigned* ticket, int64_t n, Count count) {
  if (!is_last_block(ticket, gridDim.x)) return;
  TRL_SHARED(int64_t, memory, kWarps);
  int64_t sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += count(i);
  sum = reduce(sum, AddCounts{}, memory);
  if (threadIdx.x == 0) args.normalizer[0] = args.scale * static_cast<double>(sum);
}

// Cells of a mask that a thread reads at once.
struct alignas(16) Cells {
  uint32_t of[4];
};

// How many cells are set: each is a byte, 0 or 1, so that a product adds four of them up in its highest byte.
__device__ __forceinline__ int64_t count_cells(Cells cells) {
  uint32_t sums = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) sums += cells.of[k];
  return sums * 0x01010101u >> 24;
}

// Valid tokens, as far as this thread sees them: single ones before and behind what 16 bytes divide.
__device__ __forceinline__ int64_t count_valid(const bool* mask, Sequence q) {
  if (!mask) return q.begin + threadIdx.x < q.end ? (q.end - q.begin - threadIdx.x + kThreads - 1) / kThreads : 0;
  constexpr int64_t kCells = sizeof(Cells);
  const auto beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(mask + q.begin) % kCells);
  const int64_t head = smaller(q.begin + (kCells - beyond) % kCells, q.end), whole = (q.end - head) / kCells;
  const auto* cells = reinterpret_cast<const Cells*>(mask + head);
  int64_t count = 0;
  for (int64_t token = q.begin + threadIdx.x; token < head; token += kThreads) count += mask[token];
#pragma unroll 4
  for (int64_t k = threadIdx.x; k < whole; k += kThreads) count += count_cells(cells[k]);
  for (int64_t token = head + whole * kCells + threadIdx.x; token < q.end; token += kThreads) count += mask[token];
  return count;
}

// And the sum of their advantages.
__device__ __forceinline__ CountAndSum count_tokens(const WeightArgs& args, int64_t i) {
  const Sequence q = sequence_of(args.spans, i);
  CountAndSum own{count_valid(args.spans.mask, q), 0};
  if (!args.advantages || !args.advantages_per_token) return own;
  for (int64_t token = q.begin + threadIdx.x; token < q.end; token += kThreads)
    own.advantage += is_valid(args.spans, token) ? advantage_at(args, token) : 0.0;
  return own;
}

// One block per sequence. Weights that need no group are final here.
__global__ void __launch_bounds__(kThreads) count_kernel(WeightArgs args, WeightScratch scratch, Span span, Unit unit) {
  TRL_SHARED(CountAndSum, memory, kWarps);
  const int64_t i = blockIdx.x, sequences = args.spans.num_sequences;
  if (i < sequences) {
    CountAndSum own = reduce(count_tokens(args, i), AddCounts{}, memory);
    if (args.advantages && !args.advantages_per_token) own.advantage = advantage_at(args, i);
    if (threadIdx.x == 0) {
      if (span == Span::one) args.span_weight[i] = own.tokens > 0 ? 1.0 : 0.0;
      if (span == Span::inverse_length)
        args.span_weight[i] = own.tokens > 0 ? 1.0 / static_cast<double>(own.tokens) : 0.0;
      scratch.counts[i] = {own.tokens, span == Span::balanced ? sign_of(own.advantage) : 0, 0};
    }
  }
  if (unit == Unit::one && i == 0 && threadIdx.x == 0) args.normalizer[0] = args.scale;
  if (unit != Unit::tokens && unit != Unit::rows) return;
  finish(args, scratch.ticket, sequences, [&](int64_t j) {
    const int64_t tokens = scratch.counts[j].tokens;
    return unit == Unit::tokens ? tokens : int64_t{tokens > 0};
  });
}

// One thread per sequence, which meets all others in tiles of shared memory. Signs are all 0 unless they matter.
__global__ void __launch_bounds__(kThreads) group_kernel(WeightArgs args, WeightScratch scratch, Span span, Unit unit) {
  TRL_SHARED(SequenceCount, other_counts, kThreads);
  TRL_SHARED(int64_t, other_groups, kThreads);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, sequences = args.spans.num_sequences;
  const bool exists = i < sequences, balanced = span == Span::balanced;
  const SequenceCount own = exists ? scratch.counts[i] : SequenceCount{0, 0, 0};
  const int64_t group = exists ? args.group_ids[i] : 0;
  int64_t tokens = 0, same_sign = 0, rows = 0;
  bool leads = own.tokens > 0;
  for (int64_t tile = 0; tile < sequences; tile += kThreads) {
    const int64_t mine = tile + threadIdx.x;
    if (mine < sequences) {
      other_counts[threadIdx.x] = scratch.counts[mine];
      other_groups[threadIdx.x] = args.group_ids[mine];
    }
    __syncthreads();
    const int tile_size = static_cast<int>(smaller(sequences - tile, int64_t{kThreads}));
    for (int k = 0; k < tile_size; ++k) {
      const SequenceCount other = other_counts[k];
      if (other.tokens == 0 || other_groups[k] != group) continue;
      leads = leads && tile + k >= i;
      ++rows;
      if (other.sign != own.sign) continue;
      ++same_sign;
      tokens += other.tokens;
    }
    __syncthreads();
  }
  if (exists && (span == Span::group || balanced)) {
    const bool weighs = own.tokens > 0 && (!balanced || own.sign != 0);
    const double share = balanced ? static_cast<double>(same_sign) / static_cast<double>(rows) : 1.0;
    args.span_weight[i] = weighs ? share / static_cast<double>(tokens) : 0.0;
  }
  if (unit != Unit::groups) return;
  TRL_SHARED(int64_t, memory, kWarps);
  const int64_t leading = reduce(int64_t{leads}, AddCounts{}, memory);
  if (threadIdx.x == 0) scratch.groups[blockIdx.x] = leading;
  finish(args, scratch.ticket, gridDim.x, [&](int64_t j) { return scratch.groups[j]; });
}

int64_t group_blocks(int64_t num_sequences) { return larger((num_sequences + kThreads - 1) / kThreads, int64_t{1}); }

size_t aggregation_weights_scratch_bytes(int64_t num_sequences) {
  return num_sequences * sizeof(SequenceCount) + group_blocks(num_sequences) * sizeof(int64_t);
}

const char* aggregation_weights(const WeightArgs& args, Span span, Unit unit, void* memory, unsigned* ticket,
                                void* stream) {
  const int64_t sequences = args.spans.num_sequences;
  auto* counts = static_cast<SequenceCount*>(memory);
  const WeightScratch scratch{counts, reinterpret_cast<int64_t*>(counts + sequences), ticket};
  TRL_LAUNCH(count_kernel, blocks_of(args.spans, false), kThreads, 0, stream, args, scratch, span, unit);
  if (span == Span::group || span == Span::balanced || unit == Unit::groups)
    TRL_LAUNCH(group_kernel, group_blocks(sequences), kThreads, 0, stream, args, scratch, span, unit);
  return launch_error();
}

static const bool listed =
    list_kernel("aggregation_weights count", &count_kernel) && list_kernel("aggregation_weights groups", &group_kernel);

}  // namespace tokenrl::cuda
