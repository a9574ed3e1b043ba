// The statistics and their adjoints: sums, minima and copies along spans.
#include "statistic.cuh"

namespace tokenrl::cuda {
namespace {

// The tokens of a thread in one chunk.
template <class T>
struct Tokens {
  Items<T> x;
  Items<int32_t> count;
  unsigned valid, starts;

  __device__ __forceinline__ void load(const StatisticRun<T>& run, const Place& place) {
    const StatisticArgs<T>& args = run.args;
    valid = valid_bits(args.spans, place);
    starts = start_bits(args.spans, place, valid);
    load_items(place, source(args.input, x));
    if (!args.input2) return;
    Items<T> other{};
    load_items(place, source(args.input2, other));
#pragma unroll
    for (int k = 0; k < kItems; ++k) x.of[k] = clamp(x.of[k] - other.of[k], -run.clamp, run.clamp);
  }
  __device__ __forceinline__ bool is_valid(int k) const { return valid >> k & 1; }
  __device__ __forceinline__ bool is_start(int k) const { return starts >> k & 1; }
  template <Fold fold>
  __device__ __forceinline__ Running<T> element(int k, int32_t fresh, Combine<T, fold> combine) const {
    return {fresh, is_valid(k), is_valid(k) ? x.of[k] : combine.nothing().value};
  }
};

// A token's sum, mean or minimum over its span as far as the token, and the count of what it is of.
template <class T, Fold fold>
struct Prefix {
  const StatisticRun<T>& run;
  Statistic statistic;
  bool writes;
  int64_t last;       // token of the sequence, whose state
  Running<T>* whole;  // receives, unless it is null
  int64_t begin = 0;
  Tokens<T> tokens = {};

  __device__ __forceinline__ bool aligned() const { return run.aligned; }
  __device__ __forceinline__ void load(const Place& place) {
    begin = place.first;
    tokens.load(run, place);
  }
  __device__ __forceinline__ Running<T> element(int k) const {
    return tokens.element(k, tokens.is_start(k), Combine<T, fold>{});
  }
  __device__ __forceinline__ void visit(int k, const Running<T>& before, const Running<T>& after) {
    T s = statistic == Statistic::prefix_mean ? after.value / T(after.count) : after.value;
    if (fold == Fold::least) s = tokens.x.of[k] + least_before(statistic, after.count > 1, before.value);
    const bool known = tokens.is_valid(k) || statistic == Statistic::span_sum || statistic == Statistic::span_mean;
    tokens.x.of[k] = known ? s : T(0);
    tokens.count.of[k] = after.count;
    if (whole && begin + k == last) *whole = after;
  }
  __device__ __forceinline__ void store(const Place& place) const {
    if (!writes) return;
    store_items(place, run.args.output, tokens.x);
    if (run.counts) store_items(place, run.counts, tokens.count);
  }
};

// The last bit of a span's end: whether the next token, maybe of another thread, starts one.
__device__ __forceinline__ unsigned end_bits(const Spans& spans, int64_t end, const Place& place, unsigned starts) {
  const int64_t next = place.first + place.live;
  const bool after = next == end || (next < end && spans.starts && spans.starts[next] && is_valid(spans, next));
  return (starts >> 1) | (place.live > 0 && after ? 1u << (place.live - 1) : 0u);
}

// What a thread does with the adjoint of its tokens.
template <class T>
__device__ __forceinline__ void store_adjoint(const StatisticRun<T>& run, const Place& place, unsigned valid,
                                              Items<T> adjoint) {
  Items<T> direct{}, logp{}, old_logp{};
  const bool own = run.own.direct;
  if (own)
    load_items(place, source(run.own.direct, direct), source(run.own.logp, logp), source(run.own.old_logp, old_logp));
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const T d = own ? logp.of[k] - old_logp.of[k] : T(0);
    const bool passes = !own || (d >= -run.clamp && d <= run.clamp);
    adjoint.of[k] = valid >> k & 1 ? (passes ? adjoint.of[k] : T(0)) + direct.of[k] : T(0);
  }
  store_items(place, run.args.output, adjoint);
}

// Hands what the last token of each span has to all of its tokens.
template <class T>
struct Total {
  const StatisticRun<T>& run;
  Statistic statistic;
  int64_t end;  // of the sequence
  Tokens<T> tokens = {};
  unsigned ends = 0;

  __device__ __forceinline__ bool aligned() const { return run.aligned; }
  __device__ __forceinline__ void load(const Place& place) {
    tokens.valid = valid_bits(run.args.spans, place);
    tokens.starts = start_bits(run.args.spans, place, tokens.valid);
    ends = end_bits(run.args.spans, end, place, tokens.starts);
    load_items(place, source<T>(run.args.output, tokens.x), source<int32_t>(run.counts, tokens.count));
  }
  __device__ __forceinline__ Running<T> element(int k) const {
    return {int32_t(ends >> k & 1), tokens.count.of[k], tokens.x.of[k]};
  }
  __device__ __forceinline__ void visit(int k, const Running<T>&, const Running<T>& after) {
    tokens.x.of[k] = statistic == Statistic::span_mean ? after.value / T(larger(after.count, 1)) : after.value;
  }
  __device__ __forceinline__ void store(const Place& place) const { store_adjoint(run, place, tokens.valid, tokens.x); }
};

// Adjoint of a prefix statistic: sums from each token to the end of its span, each term of a mean over its count.
template <class T>
struct Suffix {
  const StatisticRun<T>& run;
  Statistic statistic;
  int64_t end;
  bool writes;
  Tokens<T> tokens = {};
  unsigned ends = 0;

  __device__ __forceinline__ bool aligned() const { return run.aligned; }
  __device__ __forceinline__ void load(const Place& place) {
    tokens.load(run, place);
    ends = end_bits(run.args.spans, end, place, tokens.starts);
    if (statistic != Statistic::prefix_mean) return;
    load_items(place, source<int32_t>(run.counts, tokens.count));
#pragma unroll
    for (int k = 0; k < kItems; ++k) tokens.x.of[k] /= T(larger(tokens.count.of[k], 1));
  }
  __device__ __forceinline__ Running<T> element(int k) const {
    return tokens.element(k, ends >> k & 1, Combine<T, Fold::add>{});
  }
  __device__ __forceinline__ void visit(int k, const Running<T>&, const Running<T>& after) {
    tokens.x.of[k] = after.value;
  }
  __device__ __forceinline__ void store(const Place& place) const {
    if (writes) store_adjoint(run, place, tokens.valid, tokens.x);
  }
};

// Of a statistic that is no sum: the values themselves.
template <class T>
__device__ __forceinline__ void copy_values(const StatisticRun<T>& run, const TileRange& share) {
  const int64_t begin = share.tile(share.first).begin, end = share.tile(share.last - 1).end;
  for (int64_t first = begin + threadIdx.x * kItems; first < end; first += kChunk) {
    Tokens<T> tokens{};
    const Place place = place_between(first, end, run.aligned);
    tokens.load(run, place);
    store_adjoint(run, place, tokens.valid, tokens.x);
  }
}

// The total of a sequence that is one span and has several blocks, handed to all tokens of a tile.
template <class T>
__device__ __forceinline__ void spread(const StatisticRun<T>& run, Statistic statistic, const TileRange& share) {
  Running<T> total = Combine<T, Fold::add>::nothing();
#pragma unroll 4
  for (int64_t k = 0; k < share.tiles; ++k) total = Combine<T, Fold::add>{}(total, run.sums[share.slot + k]);
  const T value = statistic == Statistic::span_mean ? total.value / T(larger(total.count, 1)) : total.value;
  const Sequence tile = share.tile(share.first);
  for (int64_t first = tile.begin + threadIdx.x * kItems; first < tile.end; first += kChunk) {
    const Place place = place_between(first, tile.end, run.aligned);
    store_adjoint(run, place, valid_bits(run.args.spans, place), all_of(value));
  }
}

__device__ __forceinline__ bool is_over_span(Statistic statistic) {
  return statistic == Statistic::span_sum || statistic == Statistic::span_mean;
}

// What each tile leaves, where tiles have blocks of their own.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) tile_kernel(StatisticRun<T> run, Statistic statistic, bool adjoint) {
  TRL_SHARED(Running<T>, memory, kWarps + 1);
  const TileRange share = tile_range(run.args.spans, true, [&](int64_t token) { run.args.output[token] = 0; });
  if (share.first >= share.last) return;
  const Sequence tile = share.tile(share.first);
  Running<T>* const sum = run.sums + share.slot + share.first;
  // Of a span the last token has the total, in the order in which it has it where one block walks them all.
  const bool is_last = is_over_span(statistic) && tile.begin < tile.end && tile.end == share.end;
  Running<T> left;
  if (adjoint && !is_over_span(statistic)) {
    Suffix<T> pass{run, statistic, share.end, false};
    left = walk_tile<true>(tile, Combine<T, Fold::add>::nothing(), Combine<T, Fold::add>{}, pass, memory);
  } else if (is_minimum(statistic)) {
    Prefix<T, Fold::least> pass{run, statistic, false, 0, nullptr};
    left = walk_tile<false>(tile, Combine<T, Fold::least>::nothing(), Combine<T, Fold::least>{}, pass, memory);
  } else {
    Prefix<T, Fold::add> pass{run, statistic, false, share.end - 1, is_last ? sum : nullptr};
    left = walk_tile<false>(tile, Combine<T, Fold::add>::nothing(), Combine<T, Fold::add>{}, pass, memory);
  }
  if (threadIdx.x == 0 && !is_last) *sum = left;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    statistic_kernel(StatisticRun<T> run, Statistic statistic, bool adjoint, bool apart) {
  TRL_SHARED(Running<T>, memory, kWarps + 1);
  const TileRange share = tile_range(run.args.spans, apart, [&](int64_t token) { run.args.output[token] = 0; });
  if (share.first >= share.last) return;
  const Running<T>* sums = apart ? run.sums : nullptr;
  if (statistic == Statistic::token) return copy_values(run, share);
  if (adjoint && !is_over_span(statistic)) {
    Suffix<T> pass{run, statistic, share.end, true};
    return walk<true>(share, sums, Combine<T, Fold::add>{}, pass, memory);
  }
  if (is_minimum(statistic)) {
    Prefix<T, Fold::least> pass{run, statistic, true, 0, nullptr};
    return walk<false>(share, sums, Combine<T, Fold::least>{}, pass, memory);
  }
  if (apart && adjoint) return spread(run, statistic, share);
  Prefix<T, Fold::add> pass{run, statistic, true, 0, nullptr};
  walk<false>(share, sums, Combine<T, Fold::add>{}, pass, memory);
  if (!is_over_span(statistic)) return;
  if (apart) return spread(run, statistic, share);
  Total<T> total{run, statistic, share.end};
  walk<true>(share, sums, Combine<T, Fold::copy>{}, total, memory);
}

}  // namespace

template <class T>
void launch_statistic(StatisticRun<T> run, Statistic statistic, bool adjoint, void* stream) {
  run.aligned = are_aligned(run.args.spans, run.args.input, run.args.input2, run.args.output, run.counts, run.own.logp,
                            run.own.old_logp, run.own.direct);
  const bool over_span = statistic == Statistic::span_sum || statistic == Statistic::span_mean;
  const bool apart = are_tiles_apart(run.args.spans) && !(over_span && run.args.spans.starts);
  const int64_t blocks = blocks_of(run.args.spans, apart);
  if (apart && statistic != Statistic::token)
    TRL_LAUNCH((tile_kernel<T>), blocks, kThreads, 0, stream, run, statistic, adjoint);
  TRL_LAUNCH((statistic_kernel<T>), blocks, kThreads, 0, stream, run, statistic, adjoint, apart);
}
template void launch_statistic(StatisticRun<float>, Statistic, bool, void*);
template void launch_statistic(StatisticRun<double>, Statistic, bool, void*);

template <class T>
size_t statistic_scratch_bytes(const StatisticArgs<T>& args) {
  return statistic_scratch<T>(args.spans);
}

template <class T>
const char* statistic(const StatisticArgs<T>& args, Statistic statistic, bool adjoint, void* scratch, void* stream) {
  auto* counts = static_cast<int32_t*>(scratch);
  auto* sums =
      reinterpret_cast<Running<T>*>(static_cast<char*>(scratch) + aligned(args.spans.num_tokens * sizeof(int32_t)));
  const StatisticRun<T> run{args, infinity<T>(), counts, sums, {}, false};
  if (adjoint && statistic == Statistic::prefix_mean)
    launch_statistic(run, statistic, false, stream);  // for its counts
  launch_statistic(run, statistic, adjoint, stream);
  return launch_error();
}

#define TOKENRL_INSTANTIATE(T)                                      \
  template size_t statistic_scratch_bytes(const StatisticArgs<T>&); \
  template const char* statistic(const StatisticArgs<T>&, Statistic, bool, void*, void*);
TOKENRL_INSTANTIATE(float)
TOKENRL_INSTANTIATE(double)

static const bool listed = list_kernel("statistic float", &statistic_kernel<float>) &&
                           list_kernel("statistic double", &statistic_kernel<double>) &&
                           list_kernel("statistic tiles float", &tile_kernel<float>) &&
                           list_kernel("statistic tiles double", &tile_kernel<double>);

}  // namespace tokenrl::cuda
