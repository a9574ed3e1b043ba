// Divergences of two heads' distributions and the gradient of either's logits: a block per row, 16 bytes of each head
// at a time.
#include <string_view>

#include "vocabulary.cuh"

namespace tokenrl::cuda {
namespace {

template <class T>
struct Sums {
  T value, by_p, by_r;
};

// Both heads' rows: a pair of log-probs out of a pair of logits.
template <class Logit, class T>
struct PairOfRows {
  RowView<Logit, T, Transformed> p, r;
  T lse_p, rest_p, lse_r, rest_r;

  __device__ __forceinline__ PairOfRows(const DivergenceArgs<Logit, T>& args, int64_t row)
      : p(args.of, row),
        r(args.other, row),
        lse_p(args.of.lse[row]),
        rest_p(args.of.lse_rest[row]),
        lse_r(args.other.lse[row]),
        rest_r(args.other.lse_rest[row]) {}
  __device__ __forceinline__ Pair<T> at(T y, T z) const {
    const T log_p = (p.transform.factor * y - lse_p) - rest_p, log_r = (r.transform.factor * z - lse_r) - rest_r;
    return {log_p, log_r, power_of_two(log_p * kLog2E<T>), power_of_two(log_r * kLog2E<T>)};
  }
};

template <class Kind, class Logit, class T>
__global__ void __launch_bounds__(kThreads, sizeof(Logit) == 8 ? 1 : kBlocksAtOnce)
    divergence_kernel(DivergenceArgs<Logit, T> args) {
  TRL_SHARED(Sums<T>, memory, kWarps);
  const int64_t index = blockIdx.x;
  if (args.rows && !args.rows[index]) {
    if (threadIdx.x == 0) args.value[index] = args.by_p[index] = args.by_r[index] = 0;
    return;
  }
  const PairOfRows<Logit, T> rows(args, index);
  const auto params = params_from<Kind, T>([&](size_t k) { return args.params[k]; });
  Sums<T> sums{0, 0, 0};
  const auto take = [&](Logit x, Logit y, int64_t v) {
    const Pair<T> pair = rows.at(rows.p.capped(rows.p.raw(x, v)), rows.r.capped(rows.r.raw(y, v)));
    const Diverged<T> d = Kind::eval(pair, params);
    sums = {sums.value + d.value, sums.by_p + d.by_p, sums.by_r + d.by_r};
  };
  for (int64_t v = threadIdx.x; v < args.of.vocab; v += kThreads) take(rows.p.logits[v], rows.r.logits[v], v);
  const auto add = [](const Sums<T>& a, const Sums<T>& b) {
    return Sums<T>{a.value + b.value, a.by_p + b.by_p, a.by_r + b.by_r};
  };
  const Sums<T> all = reduce(sums, add, memory);
  if (threadIdx.x != 0) return;
  // Where a row has no distribution its lse is no number.
  const T odd = (rows.lse_p - rows.lse_p) + (rows.lse_r - rows.lse_r);
  args.value[index] = all.value + odd;
  args.by_p[index] = all.by_p + odd;
  args.by_r[index] = all.by_r + odd;
}

template <class Kind, class Logit, class T>
__global__ void __launch_bounds__(kThreads, sizeof(Logit) == 8 ? 1 : kBlocksAtOnce)
    divergence_backward_kernel(DivergenceArgs<Logit, T> args) {
  const int64_t index = blockIdx.x, vocab = args.of.vocab;
  const PairOfRows<Logit, T> rows(args, index);
  Logit* out = args.of.grad_logits + rows.p.grad_offset;
  const T grad = args.grad[index], by = args.by_p[index];
  const bool other = args.of_other;
  if (grad == 0 || (args.rows && !args.rows[index])) {
    for (int64_t v = threadIdx.x; v < vocab; v += kThreads) out[v] = Logit{};
    return;
  }
  const auto params = params_from<Kind, T>([&](size_t k) { return args.params[k]; });
  const auto at = [&](Logit x, Logit y, int64_t v) {
    const T of_p = rows.p.capped(rows.p.raw(x, v)), of_r = rows.r.capped(rows.r.raw(y, v));
    const Pair<T> pair = rows.at(of_p, of_r);
    const Diverged<T> d = Kind::eval(pair, params);
    const T dz = grad * (other ? d.by_r - pair.r * by : d.by_p - pair.p * by);
    const T slope = other ? rows.r.slope(of_r) : rows.p.slope(of_p);
    return narrow<Logit>((other ? of_r : of_p) == -infinity<T>() ? T(0) : dz * slope);
  };
  for (int64_t v = threadIdx.x; v < vocab; v += kThreads) out[v] = at(rows.p.logits[v], rows.r.logits[v], v);
}

template <class Kind, class Logit, class T>
void launch(const DivergenceArgs<Logit, T>& args, void* stream) {
  const int64_t rows = args.of.batch * args.of.time;
  if (!args.grad) {
    TRL_LAUNCH((divergence_kernel<Kind, Logit, T>), rows, kThreads, 0, stream, args);
  } else {
    TRL_LAUNCH((divergence_backward_kernel<Kind, Logit, T>), rows, kThreads, 0, stream, args);
  }
}

template <class Logit, class T, class... Kind>
bool by_kind(const DivergenceArgs<Logit, T>& args, std::string_view kind, void* stream, std::tuple<Kind...>*) {
  return ((kind == Kind::name && (launch<Kind>(args, stream), true)) || ...);
}

template <class Kind, class Logit, class T>
bool list_kind(const std::string& type) {
  const std::string name = std::string(Kind::name) + " " + type;
  return list_kernel("divergence " + name, &divergence_kernel<Kind, Logit, T>) &&
         list_kernel("divergence_backward " + name, &divergence_backward_kernel<Kind, Logit, T>);
}
template <class Logit, class T, class... Kind>
bool list_kinds(const std::string& type, std::tuple<Kind...>*) {
  return (list_kind<Kind, Logit, T>(type) && ...);
}
constexpr Divergences* kEvery = nullptr;
const bool listed = list_kinds<float, float>("float", kEvery) && list_kinds<double, double>("double", kEvery) &&
                    list_kinds<BFloat16, float>("bfloat16", kEvery) && list_kinds<Half, float>("half", kEvery);

}  // namespace

template <class Logit, class T>
const char* divergence(const DivergenceArgs<Logit, T>& args, const char* kind, void* stream) {
  if (args.of.batch * args.of.time == 0) return nullptr;
  if (!by_kind(args, kind, stream, kEvery)) return "there is no divergence of that kind";
  return launch_error();
}

template const char* divergence(const DivergenceArgs<float, float>&, const char*, void*);
template const char* divergence(const DivergenceArgs<double, double>&, const char*, void*);
template const char* divergence(const DivergenceArgs<BFloat16, float>&, const char*, void*);
template const char* divergence(const DivergenceArgs<Half, float>&, const char*, void*);

}  // namespace tokenrl::cuda
