// Divergences of two heads' distributions with the lse of both: a block per row, or several where there are fewer rows
// than multiprocessors; what each found is then merged in order.
#include "pair.cuh"

namespace tokenrl::cuda {
namespace {

// Both heads' weights e^(z - max) of some logits, max of y, summed, and a kind's value of them in the place of p and r.
// Until there is a finite maximum, 0 stands in for it.
template <class T>
struct Swept {
  T max_p = -infinity<T>(), max_r = -infinity<T>(), sum_p = 0, sum_r = 0, value = 0;
};

template <class T>
struct Sweep {
  T factor_p, factor_r;
  int kind;

  // The kind's value after the logarithms of the weights have shifted.
  __device__ __forceinline__ T value(const Swept<T>& a, T scale_p, T scale_r, T by_p, T by_r) const {
    T value = 0;
    with_kind(
        kind,
        [&](auto found) {
          using Kind = decltype(found);
          if constexpr (kWeighsLogs<Kind>) {
            constexpr bool kOfP = Kind::weight == Weight::p;
            value = shifted<Kind>(a.value, kOfP ? a.sum_p : a.sum_r, kOfP ? scale_p : scale_r, by_p, by_r);
          }
        },
        kEvery);
    return value;
  }
  __device__ __forceinline__ Swept<T> raised(const Swept<T>& a, T max_p, T max_r) const {
    const T by_p = a.sum_p > 0 ? factor_p * (a.max_p - max_p) : T(0), scale_p = exponential(by_p);
    const T by_r = a.sum_r > 0 ? factor_r * (a.max_r - max_r) : T(0), scale_r = exponential(by_r);
    return {max_p, max_r, a.sum_p * scale_p, a.sum_r * scale_r, value(a, scale_p, scale_r, by_p, by_r)};
  }
  __device__ __forceinline__ Swept<T> operator()(const Swept<T>& a, const Swept<T>& b) const {
    const T max_p = larger(a.max_p, b.max_p), max_r = larger(a.max_r, b.max_r);
    const Swept<T> x = raised(a, max_p, max_r), y = raised(b, max_p, max_r);
    return {max_p, max_r, x.sum_p + y.sum_p, x.sum_r + y.sum_r, x.value + y.value};
  }
  template <int kCount>
  __device__ __forceinline__ void take(Swept<T>& state, const T (&of_p)[kCount], const T (&of_r)[kCount]) const {
    T max_p = state.max_p, max_r = state.max_r;
#pragma unroll
    for (int k = 0; k < kCount; ++k) max_p = larger(max_p, of_p[k]), max_r = larger(max_r, of_r[k]);
    if (max_p > state.max_p || max_r > state.max_r) state = raised(state, max_p, max_r);
    if (max_p == -infinity<T>()) max_p = 0;
    if (max_r == -infinity<T>()) max_r = 0;
    Pair<T> pairs[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      pairs[k] = pair_of(factor_p * (of_p[k] - max_p), factor_r * (of_r[k] - max_r));
      state.sum_p += pairs[k].p;
      state.sum_r += pairs[k].r;
    }
    with_kind(
        kind,
        [&](auto found) {
          using Kind = decltype(found);
          if constexpr (kWeighsLogs<Kind>)
#pragma unroll
            for (const Pair<T>& pair : pairs) state.value += Kind::eval(pair, ParamsOf<Kind, T>{}).value;
        },
        kEvery);
  }
};

template <class T>
__device__ __forceinline__ Diverged<T> added(const Diverged<T>& a, const Diverged<T>& b) {
  return {a.value + b.value, a.by_p + b.by_p, a.by_r + b.by_r};
}

// NaN where the row has no distribution, as its lse is then no number.
template <class Logit, class T>
__device__ __forceinline__ void store_sums(const DivergenceArgs<Logit, T>& args, int64_t index,
                                           const Diverged<T>& sums) {
  const T p = args.of.lse[index], r = args.other.lse[index], odd = (p - p) + (r - r);
  args.value[index] = sums.value + odd, args.by_p[index] = sums.by_p + odd, args.by_r[index] = sums.by_r + odd;
}

template <class Logit, class T>
__device__ __forceinline__ void store_swept(const DivergenceArgs<Logit, T>& args, int64_t index, const Sweep<T>& sweep,
                                            const Swept<T>& state) {
  const Softmax<T> p{state.max_p, state.sum_p, 0, 0}, r{state.max_r, state.sum_r, 0, 0};
  args.of.lse[index] = lse_of(p, sweep.factor_p), args.other.lse[index] = lse_of(r, sweep.factor_r);
  args.of.lse_rest[index] = lse_rest_of(p, sweep.factor_p, args.of.lse[index]);
  args.other.lse_rest[index] = lse_rest_of(r, sweep.factor_r, args.other.lse[index]);
  const T value = sweep.value(state, 1 / state.sum_p, 1 / state.sum_r, -::log(state.sum_p), -::log(state.sum_r));
  with_kind(
      sweep.kind,
      [&](auto found) {
        if constexpr (kWeighsLogs<decltype(found)>) store_sums(args, index, of_value<decltype(found)>(value));
      },
      kEvery);
}

template <class Logit, class T>
__device__ __forceinline__ bool counts(const DivergenceArgs<Logit, T>& args, int64_t index) {
  if (!args.rows || args.rows[index]) return true;
  if (threadIdx.x == 0) {
    args.value[index] = args.by_p[index] = args.by_r[index] = 0;
    args.of.lse[index] = args.of.lse_rest[index] = args.other.lse[index] = args.other.lse_rest[index] = 0;
  }
  return false;
}

// lse and lse_rest of both rows and, of a kind that weighs logs, its sums. Where a row has several blocks, `parts`
// receives what each found.
template <class Logit, class T>
__global__ void __launch_bounds__(kThreads, kBlocks<Logit>)
    divergence_sweep_kernel(DivergenceArgs<Logit, T> args, int kind, int splits, Swept<T>* parts) {
  TRL_SHARED(Swept<T>, memory, kWarps);
  constexpr int kPack = Pack<Logit>::size;
  const int64_t index = blockIdx.x / splits;
  if (!counts(args, index)) return;
  const HeadRow<Logit, T> p(args.of, index), r(args.other, index);
  const Sweep<T> sweep{p.row.transform.factor, r.row.transform.factor, kind};
  const Share share(args.of.vocab, splits, kPack);
  Swept<T> state;
  for (int64_t v = share.begin + threadIdx.x * kPack; v < share.end; v += kThreads * kPack) {
    const Pack<Logit> x = pack_of(p.row.logits, v, share), z = pack_of(r.row.logits, v, share);
    T of_p[kPack], of_r[kPack];
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      of_p[k] = p.capped(x.of[k], v + k, share), of_r[k] = r.capped(z.of[k], v + k, share);
    sweep.take(state, of_p, of_r);
  }
  state = reduce(state, sweep, memory);
  if (threadIdx.x != 0) return;
  if (splits > 1) parts[blockIdx.x] = state;
  else store_swept(args, index, sweep, state);
}

template <class Logit, class T>
__global__ void __launch_bounds__(kThreads)
    divergence_sweep_merge_kernel(DivergenceArgs<Logit, T> args, int kind, int splits, const Swept<T>* parts) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= args.of.batch * args.of.time || (args.rows && !args.rows[index])) return;
  const RowTransform<T> p(args.of.transform, index), r(args.other.transform, index);
  const Sweep<T> sweep{p.factor, r.factor, kind};
  Swept<T> state = parts[index * splits];
  for (int split = 1; split < splits; ++split) state = sweep(state, parts[index * splits + split]);
  store_swept(args, index, sweep, state);
}

// The sums of a kind from both rows' lse.
template <class Logit, class T>
__global__ void __launch_bounds__(kThreads, kBlocks<Logit>)
    divergence_kernel(DivergenceArgs<Logit, T> args, int kind, int splits, Diverged<T>* parts) {
  TRL_SHARED(Diverged<T>, memory, kWarps);
  constexpr int kPack = Pack<Logit>::size;
  const int64_t index = blockIdx.x / splits;
  if (!counts(args, index)) return;
  const NormalizedRow<Logit, T> p(args.of, index), r(args.other, index);
  const Share share(args.of.vocab, splits, kPack);
  Diverged<T> sums{0, 0, 0};
  for (int64_t v = share.begin + threadIdx.x * kPack; v < share.end; v += kThreads * kPack) {
    const Pack<Logit> x = pack_of(p.row.logits, v, share), z = pack_of(r.row.logits, v, share);
    Pair<T> pairs[kPack];
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      pairs[k] = pair_of(p.log_p(p.capped(x.of[k], v + k, share)), r.log_p(r.capped(z.of[k], v + k, share)));
    with_kind(
        kind,
        [&](auto found) {
          using Kind = decltype(found);
          if constexpr (!kWeighsLogs<Kind>) {
            const auto params = params_from<Kind, T>([&](size_t k) { return args.params[k]; });
#pragma unroll
            for (const Pair<T>& pair : pairs) sums = added(sums, Kind::eval(pair, params));
          }
        },
        kEvery);
  }
  sums = reduce(sums, [](const Diverged<T>& a, const Diverged<T>& b) { return added(a, b); }, memory);
  if (threadIdx.x != 0) return;
  if (splits > 1) parts[blockIdx.x] = sums;
  else store_sums(args, index, sums);
}

template <class Logit, class T>
__global__ void __launch_bounds__(kThreads)
    divergence_merge_kernel(DivergenceArgs<Logit, T> args, int splits, const Diverged<T>* parts) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= args.of.batch * args.of.time || (args.rows && !args.rows[index])) return;
  Diverged<T> sums = parts[index * splits];
  for (int split = 1; split < splits; ++split) sums = added(sums, parts[index * splits + split]);
  store_sums(args, index, sums);
}

template <class Logit, class T>
bool list_divergence(const std::string& type) {
  return list_kernel("divergence sweep " + type, &divergence_sweep_kernel<Logit, T>) &&
         list_kernel("divergence sweep " + type + " merge", &divergence_sweep_merge_kernel<Logit, T>) &&
         list_kernel("divergence " + type, &divergence_kernel<Logit, T>) &&
         list_kernel("divergence " + type + " merge", &divergence_merge_kernel<Logit, T>);
}
const bool listed = list_divergence<float, float>("float") && list_divergence<double, double>("double") &&
                    list_divergence<BFloat16, float>("bfloat16") && list_divergence<Half, float>("half");

template <class... Kind>
bool weighs_logs(int number, std::tuple<Kind...>*) {
  constexpr bool kWeighs[] = {kWeighsLogs<Kind>...};
  return kWeighs[number];
}

}  // namespace

template <class Logit, class T>
size_t divergence_scratch_bytes(const DivergenceArgs<Logit, T>& args) {
  const int64_t splits = splits_of(args);
  return splits > 1 ? sizeof(Swept<T>) * static_cast<size_t>(args.of.batch * args.of.time * splits) : 0;
}

template <class Logit, class T>
const char* divergence(const DivergenceArgs<Logit, T>& args, const char* kind, void* scratch, void* stream) {
  const int64_t rows = args.of.batch * args.of.time, merging = (rows + kThreads - 1) / kThreads;
  const int number = number_of(kind, kEvery), splits = static_cast<int>(splits_of(args));
  if (number < 0) return kNoSuchKind;
  if (rows == 0) return nullptr;
  const bool one_sweep = weighs_logs(number, kEvery);
  if (one_sweep || !args.statistics_known) {
    auto* parts = static_cast<Swept<T>*>(scratch);
    TRL_LAUNCH((divergence_sweep_kernel<Logit, T>), rows * splits, kThreads, 0, stream, args, number, splits, parts);
    if (splits > 1)
      TRL_LAUNCH((divergence_sweep_merge_kernel<Logit, T>), merging, kThreads, 0, stream, args, number, splits, parts);
  }
  if (one_sweep) return launch_error();
  auto* parts = static_cast<Diverged<T>*>(scratch);
  TRL_LAUNCH((divergence_kernel<Logit, T>), rows * splits, kThreads, 0, stream, args, number, splits, parts);
  if (splits > 1) TRL_LAUNCH((divergence_merge_kernel<Logit, T>), merging, kThreads, 0, stream, args, splits, parts);
  return launch_error();
}

#define TOKENRL_INSTANTIATE(Logit, T)                                        \
  template size_t divergence_scratch_bytes(const DivergenceArgs<Logit, T>&); \
  template const char* divergence(const DivergenceArgs<Logit, T>&, const char*, void*, void*);
TOKENRL_INSTANTIATE(float, float)
TOKENRL_INSTANTIATE(double, double)
TOKENRL_INSTANTIATE(BFloat16, float)
TOKENRL_INSTANTIATE(Half, float)

}  // namespace tokenrl::cuda
