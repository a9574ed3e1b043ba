// The gradient of either head's logits: both are read once, one is written once.
#include "pair.cuh"

namespace tokenrl::cuda {
namespace {

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
  const NormalizedRow<Logit, T> p(args.of, index), r(args.other, index);
  Logit* out = args.of.grad_logits + p.row.grad_offset;
  const T grad = args.grad[index], by = args.by[index];
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

template <class Logit, class T>
bool list_backward(const std::string& type) {
  return list_kernel("divergence_backward " + type, &divergence_backward_kernel<Logit, T>);
}
const bool listed = list_backward<float, float>("float") && list_backward<double, double>("double") &&
                    list_backward<BFloat16, float>("bfloat16") && list_backward<Half, float>("half");

}  // namespace

template <class Logit, class T>
const char* divergence_backward(const DivergenceArgs<Logit, T>& args, const char* kind, void* stream) {
  const int64_t rows = args.of.batch * args.of.time;
  const int number = number_of(kind, kEvery), splits = static_cast<int>(splits_of(args));
  if (number < 0) return kNoSuchKind;
  if (rows == 0) return nullptr;
  TRL_LAUNCH((divergence_backward_kernel<Logit, T>), rows * splits, kThreads, 0, stream, args, number, splits);
  return launch_error();
}

#define TOKENRL_INSTANTIATE(Logit, T) \
  template const char* divergence_backward(const DivergenceArgs<Logit, T>&, const char*, void*);
TOKENRL_INSTANTIATE(float, float)
TOKENRL_INSTANTIATE(double, double)
TOKENRL_INSTANTIATE(BFloat16, float)
TOKENRL_INSTANTIATE(Half, float)

}  // namespace tokenrl::cuda
