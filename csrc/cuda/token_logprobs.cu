// The statistics of each row of logits in one read: a warp per row, a block per longer row, or several where there are
// fewer of these than multiprocessors; what each found is then merged in order.
#include "row_state.cuh"

namespace tokenrl::cuda {
namespace {

template <class Logit, class T, class Mode>
__device__ __forceinline__ void store_row(const LogprobArgs<Logit, T>& args, const RowView<Logit, T, Mode>& row,
                                          const typename Mode::Part& part) {
  const T factor = row.transform.factor, lse = lse_of(part.softmax(), factor);
  args.entropy[row.index] = entropy_of(part.softmax(), factor);
  args.lse[row.index] = lse;
  args.lse_rest[row.index] = lse_rest_of(part.softmax(), factor, lse);
  if constexpr (Mode::transforms) {
    if (args.log_sum_sq_probs) args.log_sum_sq_probs[row.index] = log_sum_sq_probs_of(part.softmax());
    if (args.max_prob) args.max_prob[row.index] = max_prob_of(part.softmax());
    if (args.mean_logit) args.mean_logit[row.index] = static_cast<T>(part.total / part.kept) * factor;
  }
}

// Of an id outside the vocabulary nothing is known.
template <class Logit, class T, class Mode>
__device__ __forceinline__ void store_order(const LogprobArgs<Logit, T>& args, const RowView<Logit, T, Mode>& row,
                                            const typename Mode::Part& part, int64_t first) {
  if constexpr (Mode::transforms) {
    if (!args.is_top1 && !args.rank) return;
#pragma unroll
    for (int k = 0; k < kIdsPerPass; ++k) {
      if (first + k >= args.num_ids) break;
      const int64_t at = row.index * args.num_ids + first + k, id = args.ids[at];
      const bool known = id >= 0 && id < args.vocab;
      if (args.is_top1) args.is_top1[at] = known && part.above[k] == 0 && part.equal_before[k] == 0;
      if (args.rank) args.rank[at] = known ? part.above[k] + 1 : 0;
    }
  }
}

template <class Logit, class T, class Mode>
__device__ __forceinline__ void store_logps(const LogprobArgs<Logit, T>& args, const RowView<Logit, T, Mode>& row,
                                            const Softmax<T>& state) {
  for (int64_t k = Mode::Who::rank(); k < args.num_ids; k += Mode::Who::count) {
    const int64_t at = row.index * args.num_ids + k, id = args.ids[at];
    T logp = id == kIgnoredId ? T(0) : infinity<T>() - infinity<T>();
    if (id >= 0 && id < args.vocab) logp = logp_of(state, row.capped(row.raw(id)), row.transform.factor);
    args.logp[at] = logp;
  }
}

template <class Who, class Logit, class T>
__device__ __forceinline__ void store_zeros(const LogprobArgs<Logit, T>& args, int64_t row) {
  if (Who::rank() == 0) {
    args.entropy[row] = args.lse[row] = args.lse_rest[row] = 0;
    if (args.log_sum_sq_probs) args.log_sum_sq_probs[row] = 0;
    if (args.mean_logit) args.mean_logit[row] = 0;
    if (args.max_prob) args.max_prob[row] = 0;
  }
  for (int64_t at = row * args.num_ids + Who::rank(); at < (row + 1) * args.num_ids; at += Who::count) {
    args.logp[at] = 0;
    if (args.is_top1) args.is_top1[at] = false;
    if (args.rank) args.rank[at] = 0;
  }
}

// splits blocks per row; where there are several, `parts` receives what each found.
template <class Logit, class T, class Mode>
__global__ void __launch_bounds__(kThreads, Mode::blocks)
    logprobs_kernel(LogprobArgs<Logit, T> args, int splits, typename Mode::Part* parts) {
  using Part = typename Mode::Part;
  TRL_SHARED(Part, memory, kWarps);
  const int64_t index = blockIdx.x / static_cast<unsigned>(splits), split = blockIdx.x - index * splits;
  if (is_ignored(args, index)) {
    if (split == 0) store_zeros<BlockReads>(args, index);
    return;
  }
  const RowView<Logit, T, Mode> row(args, index);
  const T factor = row.transform.factor;
  const auto over_lanes = [=](const Part& own, auto lanes) {
    return Mode::template over_lanes<decltype(lanes)::value>(own, factor);
  };
  constexpr int64_t kPack = Pack<Logit>::size;
  const int64_t length = (args.vocab + splits * kPack - 1) / (splits * kPack) * kPack;
  const int64_t begin = smaller(split * length, args.vocab);
  const int64_t end = smaller(begin + length, args.vocab);
  const Part part = over_warps(visit(args, row, begin, end, 0), over_lanes, memory);
  if (splits > 1) {
    if (threadIdx.x == 0) parts[blockIdx.x] = part;
    return;
  }
  store_logps(args, row, part.softmax());
  if (threadIdx.x == 0) {
    store_row(args, row, part);
    store_order(args, row, part, 0);
  }
  if (!Mode::transforms || (!args.is_top1 && !args.rank)) return;
  for (int64_t first = kIdsPerPass; first < args.num_ids; first += kIdsPerPass) {
    __syncthreads();  // memory is free again
    const Part more = over_warps(visit(args, row, begin, end, first), over_lanes, memory);
    if (threadIdx.x == 0) store_order(args, row, more, first);
  }
}

// A warp per row.
template <class Logit, class T>
__global__ void __launch_bounds__(kThreads, SoftmaxOnly<T>::blocks) short_rows_kernel(LogprobArgs<Logit, T> args) {
  using Mode = SoftmaxOnly<T, WarpReads>;
  const int64_t index = row_of_warp();
  if (index >= args.batch * args.time) return;
  if (is_ignored(args, index)) return store_zeros<WarpReads>(args, index);
  const RowView<Logit, T, Mode> row(args, index);
  const auto part = Mode::template over_lanes<kWarp>(visit(args, row, 0, args.vocab, 0), row.transform.factor);
  store_logps(args, row, part.softmax());
  if (WarpReads::rank() == 0) store_row(args, row, part);
}

// Merges the parts of one row; every thread does, and each stores its share.
template <class Logit, class T, class Mode>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    merge_kernel(LogprobArgs<Logit, T> args, int splits, const typename Mode::Part* parts) {
  const int64_t index = blockIdx.x;
  if (is_ignored(args, index)) return;
  const RowView<Logit, T, Mode> row(args, index);
  typename Mode::Part part = parts[index * splits];
  for (int split = 1; split < splits; ++split)
    part = Mode::merge(part, parts[index * splits + split], row.transform.factor);
  store_logps(args, row, part.softmax());
  if (threadIdx.x != 0) return;
  store_row(args, row, part);
  store_order(args, row, part, 0);
}

template <class Logit, class T>
bool wants_everything(const LogprobArgs<Logit, T>& args) {
  return args.transform.softcap < infinity<T>() || args.transform.keep || args.log_sum_sq_probs || args.mean_logit ||
         args.max_prob || args.is_top1 || args.rank;
}

template <class Logit, class T>
bool by_warps(const LogprobArgs<Logit, T>& args) {
  return is_short(args) && !wants_everything(args);
}

template <class Logit, class T>
int64_t splits_of(const LogprobArgs<Logit, T>& args) {
  const bool several_passes = (args.is_top1 || args.rank) && args.num_ids > kIdsPerPass;
  return several_passes || by_warps(args) ? 1 : blocks_per_row(args.batch * args.time, args.vocab);
}

template <class Logit, class T, class Mode>
const char* launch(const LogprobArgs<Logit, T>& args, void* scratch, void* stream) {
  const int64_t rows = args.batch * args.time, splits = splits_of(args);
  auto* parts = static_cast<typename Mode::Part*>(scratch);
  TRL_LAUNCH((logprobs_kernel<Logit, T, Mode>), rows * splits, kThreads, 0, stream, args, static_cast<int>(splits),
             parts);
  if (splits > 1)
    TRL_LAUNCH((merge_kernel<Logit, T, Mode>), rows, kThreads, 0, stream, args, static_cast<int>(splits), parts);
  return launch_error();
}

template <class Logit, class T>
bool list_logprobs(const std::string& type) {
  if constexpr (sizeof(T) == 4) list_kernel("token_logprobs " + type + " short rows", &short_rows_kernel<Logit, T>);
  return list_kernel("token_logprobs " + type, &logprobs_kernel<Logit, T, SoftmaxOnly<T>>) &&
         list_kernel("token_logprobs " + type + " everything", &logprobs_kernel<Logit, T, Everything<T>>) &&
         list_kernel("token_logprobs " + type + " merge", &merge_kernel<Logit, T, SoftmaxOnly<T>>) &&
         list_kernel("token_logprobs " + type + " everything, merge", &merge_kernel<Logit, T, Everything<T>>);
}
const bool listed = list_logprobs<float, float>("float") && list_logprobs<double, double>("double") &&
                    list_logprobs<BFloat16, float>("bfloat16") && list_logprobs<Half, float>("half");

}  // namespace

template <class Logit, class T>
size_t token_logprobs_scratch_bytes(const LogprobArgs<Logit, T>& args) {
  const int64_t splits = splits_of(args);
  const size_t part =
      wants_everything(args) ? sizeof(typename Everything<T>::Part) : sizeof(typename SoftmaxOnly<T>::Part);
  return splits > 1 ? part * static_cast<size_t>(args.batch * args.time * splits) : 0;
}

template <class Logit, class T>
const char* token_logprobs(const LogprobArgs<Logit, T>& args, void* scratch, void* stream) {
  const int64_t rows = args.batch * args.time;
  if (rows == 0) return nullptr;
  if constexpr (sizeof(T) == 4) {
    if (by_warps(args)) {
      TRL_LAUNCH((short_rows_kernel<Logit, T>), blocks_of_warps(rows), kThreads, 0, stream, args);
      return launch_error();
    }
  }
  return wants_everything(args) ? launch<Logit, T, Everything<T>>(args, scratch, stream)
                                : launch<Logit, T, SoftmaxOnly<T>>(args, scratch, stream);
}

#define TOKENRL_INSTANTIATE(Logit, T)                                         \
  template size_t token_logprobs_scratch_bytes(const LogprobArgs<Logit, T>&); \
  template const char* token_logprobs(const LogprobArgs<Logit, T>&, void*, void*);
TOKENRL_INSTANTIATE(float, float)
TOKENRL_INSTANTIATE(double, double)
TOKENRL_INSTANTIATE(BFloat16, float)
TOKENRL_INSTANTIATE(Half, float)

}  // namespace tokenrl::cuda
