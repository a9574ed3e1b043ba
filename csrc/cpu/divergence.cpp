// Divergences of two heads' distributions, row by row, and the gradient of either's logits.
// Compiled once per instruction set (TOKENRL_ISA): nothing here may leave a linkable copy of a shared function behind.
#include <string_view>

#include "logit_row.h"

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

// One head's row: a block's y, and what makes log-probs of them.
template <class Logit, class T>
struct Head {
  Row<Logit, T> row;
  T factor, lse, lse_rest;

  inline Head(const LogprobArgs<Logit, T>& args, int64_t index)
      : row(args, index), factor(row.transform.factor), lse(args.lse[index]), lse_rest(args.lse_rest[index]) {}
};
template <class T>
struct LogProbOf {
  T factor, lse, lse_rest;

  inline T operator()(T y) const { return (factor * y - lse) - lse_rest; }
};
template <class Logit, class T>
inline LogProbOf<T> log_prob_of(const Head<Logit, T>& head) {
  return {head.factor, head.lse, head.lse_rest};
}

// Where a row has no distribution, with a logit of inf or none but -inf, NaN, else 0.
template <class Logit, class T>
inline T oddness(const Head<Logit, T>& p, const Head<Logit, T>& r) {
  return (p.lse - p.lse) + (r.lse - r.lse);
}

template <class Kind, class Logit, class T>
inline void forward_row(const DivergenceArgs<Logit, T>& args, int64_t index, const ParamsOf<Kind, T>& params) {
  const Head<Logit, T> p(args.of, index), r(args.other, index);
  double value = 0, by_p = 0, by_r = 0;
  for (int64_t first = 0; first < args.of.vocab; first += kBlock) {
    const int64_t n = smaller(kBlock, args.of.vocab - first);
    T y[kBlock], z[kBlock], block = 0, block_p = 0, block_r = 0;
    p.row.fill(first, n, y);
    r.row.fill(first, n, z);
    const LogProbOf<T> of_p = log_prob_of(p), of_r = log_prob_of(r);
#pragma omp simd reduction(+ : block, block_p, block_r)
    for (int64_t v = 0; v < n; ++v) {
      const T log_p = of_p(y[v]), log_r = of_r(z[v]);
      const Diverged<T> d = Kind::eval(Pair<T>{log_p, log_r, exponential(log_p), exponential(log_r)}, params);
      block += d.value;
      block_p += d.by_p;
      block_r += d.by_r;
    }
    value += static_cast<double>(block);
    by_p += static_cast<double>(block_p);
    by_r += static_cast<double>(block_r);
  }
  const T odd = oddness(p, r);
  args.value[index] = static_cast<T>(value) + odd;
  args.by_p[index] = static_cast<T>(by_p) + odd;
  args.by_r[index] = static_cast<T>(by_r) + odd;
}

template <class Kind, bool kOfOther, class Logit, class T>
inline void backward_row(const DivergenceArgs<Logit, T>& args, int64_t index, const ParamsOf<Kind, T>& params) {
  const Head<Logit, T> p(args.of, index), r(args.other, index);
  const Head<Logit, T>& own = kOfOther ? r : p;
  const T grad = args.grad[index], by = args.by_p[index];
  Logit* out = p.row.grad();
  for (int64_t first = 0; first < args.of.vocab; first += kBlock) {
    const int64_t n = smaller(kBlock, args.of.vocab - first);
    T y[kBlock], z[kBlock], dz[kBlock];
    p.row.fill(first, n, y);
    r.row.fill(first, n, z);
    const LogProbOf<T> of_p = log_prob_of(p), of_r = log_prob_of(r);
    const T scale = grad * own.factor;
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) {
      const T log_p = of_p(y[v]), log_r = of_r(z[v]);
      const Pair<T> of{log_p, log_r, exponential(log_p), exponential(log_r)};
      const Diverged<T> d = Kind::eval(of, params);
      const T dy = scale * (kOfOther ? d.by_r - of.r * by : d.by_p - of.p * by);
      dz[v] = (kOfOther ? log_r : log_p) == -infinity<T>() ? T(0) : dy;
    }
    if (own.row.transform.capped) {
      const RowTransform<T> transform = own.row.transform;
      const T* capped = kOfOther ? z : y;
#pragma omp simd
      for (int64_t v = 0; v < n; ++v) dz[v] *= transform.slope(capped[v]);
    }
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) out[first + v] = narrow<Logit>(dz[v]);
  }
}

template <class Logit, class T>
inline void leave_out(const DivergenceArgs<Logit, T>& args, int64_t index) {
  if (!args.grad) {
    args.value[index] = args.by_p[index] = args.by_r[index] = 0;
    return;
  }
  const Row<Logit, T> row(args.of, index);
  std::memset(static_cast<void*>(row.grad()), 0, sizeof(Logit) * static_cast<size_t>(args.of.vocab));
}

template <class Kind, class Logit, class T>
void all_rows(const DivergenceArgs<Logit, T>& args, const Threads& threads) {
  const ParamsOf<Kind, T> params = params_from<Kind, T>([&](size_t k) { return args.params[k]; });
  const int64_t rows = args.of.batch * args.of.time, grain = larger(int64_t{1}, kPart / args.of.vocab);
  parallel(threads, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if ((args.rows && !args.rows[row]) || (args.grad && args.grad[row] == 0)) leave_out(args, row);
      else if (args.grad && args.of_other) backward_row<Kind, true>(args, row, params);
      else if (args.grad) backward_row<Kind, false>(args, row, params);
      else forward_row<Kind>(args, row, params);
    }
  });
}

template <class Logit, class T, class... Kind>
bool by_kind(const DivergenceArgs<Logit, T>& args, std::string_view kind, const Threads& threads,
             std::tuple<Kind...>*) {
  return ((kind == Kind::name && (all_rows<Kind>(args, threads), true)) || ...);
}

}  // namespace

template <class Logit, class T>
bool divergence(const DivergenceArgs<Logit, T>& args, const char* kind, const Threads& threads) {
  return by_kind(args, kind, threads, static_cast<Divergences*>(nullptr));
}

template bool divergence(const DivergenceArgs<float, float>&, const char*, const Threads&);
template bool divergence(const DivergenceArgs<double, double>&, const char*, const Threads&);
template bool divergence(const DivergenceArgs<BFloat16, float>&, const char*, const Threads&);
template bool divergence(const DivergenceArgs<Half, float>&, const char*, const Threads&);

}  // namespace tokenrl::cpu::TOKENRL_ISA
