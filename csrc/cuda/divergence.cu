// Divergences of two heads' distributions and the gradient of either's logits: a block per row, or several where there
// are fewer rows than multiprocessors, whose sums are then added in order. One kernel is of every kind: which one is
// asked once per 16 bytes, and what all kinds need is compiled once.
#include <string_view>

#include "vocabulary.cuh"

namespace tokenrl::cuda {
namespace {

// f(Kind()) of the kind of that number.
template <class F, class... Kind>
__device__ __forceinline__ void with_kind(int number, F f, std::tuple<Kind...>*) {
  int k = 0;
  ((number == k++ && (f(Kind()), true)) || ...);
}
constexpr Divergences* kEvery = nullptr;
// Blocks whose registers fit at once, without spilling: 24 KiB are then on their way.
template <class Logit>
constexpr int kBlocks = sizeof(Logit) == 8 ? 1 : 3;

template <class T>
struct Sums {
  T value, by_p, by_r;
};
template <class T>
__device__ __forceinline__ Sums<T> added(const Sums<T>& a, const Sums<T>& b) {
  return {a.value + b.value, a.by_p + b.by_p, a.by_r + b.by_r};
}

// The part of a row that a block has, in whole packs from its begin.
struct Share {
  int64_t begin, end;

  __device__ __forceinline__ Share(int64_t vocab, int splits, int64_t pack) {
    const int64_t length = (vocab + splits * pack - 1) / (splits * pack) * pack;
    begin = smaller(blockIdx.x % splits * length, vocab), end = smaller(begin + length, vocab);
  }
  __device__ __forceinline__ bool has(int64_t v) const { return v >= begin && v < end; }
};

// The logits from v on, -inf where they are not the share's.
template <class Logit>
__device__ __forceinline__ Pack<Logit> pack_of(const Logit* logits, int64_t v, const Share& share) {
  constexpr int kPack = Pack<Logit>::size;
  // Not aligned, more is read than the pack.
  if (v >= share.begin && v + (is_aligned(logits + v) ? kPack : 2 * kPack) <= share.end)
    return Anywhere::load(logits + v);
  Pack<Logit> pack;
#pragma unroll
  for (int k = 0; k < kPack; ++k) pack.of[k] = share.has(v + k) ? logits[v + k] : narrow<Logit>(-infinity<float>());
  return pack;
}

// A head's row.
template <class Logit, class T>
struct HeadRow {
  RowView<Logit, T, Transformed> row;
  T lse, lse_rest;

  __device__ __forceinline__ HeadRow(const LogprobArgs<Logit, T>& args, int64_t index)
      : row(args, index), lse(args.lse[index]), lse_rest(args.lse_rest[index]) {}
  // y of a logit; what is not the share's is -inf under any keep mask.
  __device__ __forceinline__ T capped(Logit logit, int64_t v, const Share& share) const {
    return row.capped(row.raw(static_cast<T>(widen(logit)), clamp(v, share.begin, share.end - 1)));
  }
  __device__ __forceinline__ T log_p(T y) const { return (row.transform.factor * y - lse) - lse_rest; }
};

template <class T>
__device__ __forceinline__ Pair<T> pair_of(T log_p, T log_r) {
  return {log_p, log_r, power_of_two(log_p * kLog2E<T>), power_of_two(log_r * kLog2E<T>)};
}

// Where a row has several blocks, `parts` receives what each found.
template <class Logit, class T>
__global__ void __launch_bounds__(kThreads, kBlocks<Logit>)
    divergence_kernel(DivergenceArgs<Logit, T> args, int kind, int splits, Sums<T>* parts) {
  TRL_SHARED(Sums<T>, memory, kWarps);
  constexpr int kPack = Pack<Logit>::size;
  const int64_t index = blockIdx.x / splits;
  Sums<T> sums{0, 0, 0};
  if (!args.rows || args.rows[index]) {
    const HeadRow<Logit, T> p(args.of, index), r(args.other, index);
    const Share share(args.of.vocab, splits, kPack);
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
            const auto params = params_from<Kind, T>([&](size_t k) { return args.params[k]; });
#pragma unroll
            for (const Pair<T>& pair : pairs) {
              const Diverged<T> d = Kind::eval(pair, params);
              sums = added(sums, {d.value, d.by_p, d.by_r});
            }
          },
          kEvery);
    }
    sums = reduce(sums, [](const Sums<T>& a, const Sums<T>& b) { return added(a, b); }, memory);
    // Where a row has no distribution its lse is no number.
    const T odd = (p.lse - p.lse) + (r.lse - r.lse);
    sums = added(sums, {odd, odd, odd});
  }
  if (threadIdx.x != 0) return;
  if (splits > 1) parts[blockIdx.x] = sums;
  else args.value[index] = sums.value, args.by_p[index] = sums.by_p, args.by_r[index] = sums.by_r;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    divergence_merge_kernel(T* value, T* by_p, T* by_r, int64_t rows, int splits, const Sums<T>* parts) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= rows) return;
  Sums<T> sums = parts[index * splits];
  for (int split = 1; split < splits; ++split) sums = added(sums, parts[index * splits + split]);
  value[index] = sums.value, by_p[index] = sums.by_p, by_r[index] = sums.by_r;
}

// What of the pack is the share's.
template <class Logit>
__device__ __forceinline__ void store_of(Logit* out, int64_t v, const Share& share, const Pack<Logit>& pack) {
  constexpr int kPack = Pack<Logit>::size;
  if (share.has(v) && share.has(v + kPack - 1)) return store_pack(out + v, pack);
#pragma unroll
  for (int k = 0; k < kPack; ++k)
    if (share.has(v + k)) out[v + k] = pack.of[k];
}

template <class Logit, class T>
__global__ void __launch_bounds__(kThreads, kBlocks<Logit>)
    divergence_backward_kernel(DivergenceArgs<Logit, T> args, int kind, int splits) {
  constexpr int kPack = Pack<Logit>::size;
  const int64_t index = blockIdx.x / splits;
  const Share share(args.of.vocab, splits, kPack);
  const HeadRow<Logit, T> p(args.of, index), r(args.other, index);
  Logit* out = args.of.grad_logits + p.row.grad_offset;
  const T grad = args.grad[index], by = args.by_p[index];
  const bool other = args.of_other, counts = grad != 0 && (!args.rows || args.rows[index]);
  // Packs are aligned in the gradient: the first may begin before the share.
  const int before = static_cast<int>(reinterpret_cast<uintptr_t>(out + share.begin) % 16 / sizeof(Logit));
  for (int64_t v = share.begin - before + threadIdx.x * kPack; v < share.end; v += kThreads * kPack) {
    Pack<Logit> dx{};
    if (counts) {
      const Pack<Logit> x = pack_of(p.row.logits, v, share), z = pack_of(r.row.logits, v, share);
      Pair<T> pairs[kPack];
      T slopes[kPack];
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const T of_p = p.capped(x.of[k], v + k, share), of_r = r.capped(z.of[k], v + k, share);
        pairs[k] = pair_of(p.log_p(of_p), r.log_p(of_r));
        slopes[k] = grad * (other ? r.row.slope(of_r) : p.row.slope(of_p));
      }
      with_kind(
          kind,
          [&](auto found) {
            using Kind = decltype(found);
            const auto params = params_from<Kind, T>([&](size_t k) { return args.params[k]; });
#pragma unroll
            for (int k = 0; k < kPack; ++k) {
              const Pair<T>& pair = pairs[k];
              const Diverged<T> d = Kind::eval(pair, params);
              const T dz = other ? d.by_r - pair.r * by : d.by_p - pair.p * by;
              dx.of[k] = narrow<Logit>((other ? pair.log_r : pair.log_p) == -infinity<T>() ? T(0) : dz * slopes[k]);
            }
          },
          kEvery);
    }
    store_of(out, v, share, dx);
  }
}

template <class... Kind>
int number_of(std::string_view kind, std::tuple<Kind...>*) {
  int k = 0;
  return ((k++, kind == Kind::name) || ...) ? k - 1 : -1;
}

template <class Logit, class T>
int64_t splits_of(const DivergenceArgs<Logit, T>& args) {
  return blocks_per_row(args.of.batch * args.of.time, args.of.vocab);
}

template <class Logit, class T>
bool list_divergence(const std::string& type) {
  return list_kernel("divergence " + type, &divergence_kernel<Logit, T>) &&
         list_kernel("divergence_backward " + type, &divergence_backward_kernel<Logit, T>);
}
const bool listed = list_divergence<float, float>("float") && list_divergence<double, double>("double") &&
                    list_divergence<BFloat16, float>("bfloat16") && list_divergence<Half, float>("half") &&
                    list_kernel("divergence float merge", &divergence_merge_kernel<float>) &&
                    list_kernel("divergence double merge", &divergence_merge_kernel<double>);

}  // namespace

template <class Logit, class T>
size_t divergence_scratch_bytes(const DivergenceArgs<Logit, T>& args) {
  const int64_t splits = splits_of(args);
  return splits > 1 && !args.grad ? sizeof(Sums<T>) * static_cast<size_t>(args.of.batch * args.of.time * splits) : 0;
}

template <class Logit, class T>
const char* divergence(const DivergenceArgs<Logit, T>& args, const char* kind, void* scratch, void* stream) {
  const int64_t rows = args.of.batch * args.of.time;
  const int number = number_of(kind, kEvery), splits = static_cast<int>(splits_of(args));
  if (number < 0) return "there is no divergence of that kind";
  if (rows == 0) return nullptr;
  if (args.grad) {
    TRL_LAUNCH((divergence_backward_kernel<Logit, T>), rows * splits, kThreads, 0, stream, args, number, splits);
    return launch_error();
  }
  auto* parts = static_cast<Sums<T>*>(scratch);
  TRL_LAUNCH((divergence_kernel<Logit, T>), rows * splits, kThreads, 0, stream, args, number, splits, parts);
  if (splits > 1)
    TRL_LAUNCH((divergence_merge_kernel<T>), (rows + kThreads - 1) / kThreads, kThreads, 0, stream, args.value,
               args.by_p, args.by_r, rows, splits, parts);
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
