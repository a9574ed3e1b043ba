// The gradient of the logits: each is read once and written once, maybe in its own place.
#include "vocabulary.cuh"

namespace tokenrl::cuda {
namespace {

// The gradient of one logit without the ids' own shares; exactly 0 where p is.
template <class Logit, class T, class Mode>
struct GradientOf {
  const RowView<Logit, T, Mode>& row;
  RowGradient<T> weights;
  T lse, lse_rest;

  __device__ __forceinline__ T operator()(Logit logit, int64_t v) const {
    const T y = row.capped(row.raw(logit, v)), log_p = (row.transform.factor * y - lse) - lse_rest;
    const T p = power_of_two(log_p * kLog2E<T>);
    return p == 0 ? T(0) : weights.at(log_p, p) * row.slope(y);
  }
  __device__ __forceinline__ T own(Logit logit, int64_t v, T grad_logp) const {
    return row.keeps(v) ? grad_logp * row.slope(row.capped(static_cast<T>(widen(logit)))) : T(0);
  }
};

// One id per row: its share joins as the logits pass by.
template <class T>
struct OneId : Plain {
  template <class Logit>
  struct Shares {
    int64_t id;
    T share;

    __device__ __forceinline__ Shares(const LogprobArgs<Logit, T>& args, const GradientOf<Logit, T, OneId>& gradient,
                                      int64_t, int64_t)
        : id(args.ids[gradient.row.index]),
          share(RowGradient<T>::own_gradient(args, gradient.row.index, 0) * gradient.row.transform.factor) {}
    __device__ __forceinline__ T at(int64_t v) const { return v == id ? share : T(0); }
    __device__ __forceinline__ void finish(Logit*) const {}
  };
};

// Any number of ids: their whole gradients are worked out before anything is written, and written after everything
// else.
template <class T>
struct ManyIds : Transformed {
  template <class Logit>
  struct Shares {
    const int64_t* ids;
    T* own;
    int64_t count, begin, end;

    __device__ __forceinline__ Shares(const LogprobArgs<Logit, T>& args, const GradientOf<Logit, T, ManyIds>& gradient,
                                      int64_t first, int64_t last)
        : ids(args.ids + gradient.row.index * args.num_ids), count(args.num_ids), begin(first), end(last) {
      TRL_DYNAMIC_SHARED(T, memory);
      own = memory;
      for (int64_t k = threadIdx.x; k < count; k += kThreads) {
        if (ids[k] < begin || ids[k] >= end) continue;
        T share = 0;
        for (int64_t j = 0; j < count; ++j)
          if (ids[j] == ids[k]) share += RowGradient<T>::own_gradient(args, gradient.row.index, j);
        const Logit logit = gradient.row.logits[ids[k]];
        own[k] = gradient(logit, ids[k]) + gradient.own(logit, ids[k], share);
      }
      __syncthreads();  // the logits may now be overwritten
    }
    __device__ __forceinline__ T at(int64_t) const { return 0; }
    __device__ __forceinline__ void finish(Logit* out) const {
      __syncthreads();  // after everybody's write
      for (int64_t k = threadIdx.x; k < count; k += kThreads)
        if (ids[k] >= begin && ids[k] < end) out[ids[k]] = narrow<Logit>(own[k]);
    }
  };
};

template <class Logit>
__device__ __forceinline__ void write_zeros(Logit* out, int64_t begin, int64_t end) {
  constexpr int kPack = Pack<Logit>::size;
  const int64_t head = begin + elements_to_alignment(out + begin, end - begin), packs = (end - head) / kPack;
  for (int64_t v = begin + threadIdx.x; v < head; v += kThreads) out[v] = Logit{};
  for (int64_t p = threadIdx.x; p < packs; p += kThreads) reinterpret_cast<Pack<Logit>*>(out + head)[p] = Pack<Logit>{};
  for (int64_t v = head + packs * kPack + threadIdx.x; v < end; v += kThreads) out[v] = Logit{};
}

// fp64 would spill in the registers of two blocks.
template <class Logit, class T, class Mode>
__global__ void __launch_bounds__(kThreads, sizeof(Logit) == 8 ? 1 : kBlocksAtOnce)
    logprobs_backward_kernel(LogprobArgs<Logit, T> args, int splits) {
  constexpr int kPack = Pack<Logit>::size;
  const int64_t index = blockIdx.x / splits, length = (args.vocab + splits - 1) / splits;
  const int64_t begin = smaller(blockIdx.x % splits * length, args.vocab), end = smaller(begin + length, args.vocab);
  const RowView<Logit, T, Mode> row(args, index);
  Logit* out = args.grad_logits + row.grad_offset;
  if (RowGradient<T>::is_zero(args, index)) return write_zeros(out, begin, end);
  const GradientOf<Logit, T, Mode> gradient{row, RowGradient<T>(args, index), args.lse[index], args.lse_rest[index]};
  const typename Mode::template Shares<Logit> shares(args, gradient, begin, end);
  const auto at = [&](Logit logit, int64_t v) { return narrow<Logit>(gradient(logit, v) + shares.at(v)); };
  const auto single = [&](int64_t v) { out[v] = at(row.logits[v], v); };
  const int64_t head = begin + elements_to_alignment(row.logits + begin, end - begin);
  if (is_aligned(out + head)) {
    for (int64_t v = begin + threadIdx.x; v < head; v += kThreads) single(v);
    for_packs(
        row.logits, head, end,
        [&](Pack<Logit> pack, int64_t first) {
#pragma unroll
          for (int k = 0; k < kPack; ++k) pack.of[k] = at(pack.of[k], first + k);
          store_pack(out + first, pack);
        },
        single);
  } else {
    // A strided view whose rows lie otherwise than those of its gradient.
    for (int64_t v = begin + threadIdx.x; v < end; v += kThreads) single(v);
  }
  shares.finish(out);
}

template <class Logit, class T>
bool list_backward(const std::string& type) {
  return list_kernel("token_logprobs_backward " + type, &logprobs_backward_kernel<Logit, T, OneId<T>>) &&
         list_kernel("token_logprobs_backward " + type + " many ids", &logprobs_backward_kernel<Logit, T, ManyIds<T>>);
}
const bool listed = list_backward<float, float>("float") && list_backward<double, double>("double") &&
                    list_backward<BFloat16, float>("bfloat16") && list_backward<Half, float>("half");

}  // namespace

template <class Logit, class T>
const char* token_logprobs_backward(const LogprobArgs<Logit, T>& args, void* stream) {
  if (args.batch * args.time * args.vocab == 0) return nullptr;
  const int splits = static_cast<int>(blocks_per_row(args.batch * args.time, args.vocab));
  const int64_t blocks = args.batch * args.time * splits;
  if (args.num_ids == 1 && !args.transform.keep && args.transform.softcap == infinity<T>()) {
    TRL_LAUNCH((logprobs_backward_kernel<Logit, T, OneId<T>>), blocks, kThreads, 0, stream, args, splits);
    return launch_error();
  }
  const size_t shared = sizeof(T) * static_cast<size_t>(args.num_ids);
  if (shared > 48 << 10) return "more ids per row than shared memory holds: at most 12288 (6144 in float64)";
  TRL_LAUNCH((logprobs_backward_kernel<Logit, T, ManyIds<T>>), blocks, kThreads, shared, stream, args, splits);
  return launch_error();
}

template const char* token_logprobs_backward(const LogprobArgs<float, float>&, void*);
template const char* token_logprobs_backward(const LogprobArgs<double, double>&, void*);
template const char* token_logprobs_backward(const LogprobArgs<BFloat16, float>&, void*);
template const char* token_logprobs_backward(const LogprobArgs<Half, float>&, void*);

}  // namespace tokenrl::cuda
