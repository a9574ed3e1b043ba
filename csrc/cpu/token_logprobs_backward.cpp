// The gradient of the logits: each is read once and written once, maybe in its own place.
// Compiled once per instruction set (TOKENRL_ISA): nothing here may leave a linkable copy of a shared function behind.
#include "logit_row.h"

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

template <class T>
struct Lse {
  T rounded, rest;
};

// The gradient of a block in full precision, without the ids' own shares and the way back through the softcap; exactly
// 0 where p is.
inline void gradient_block(const double* y, int64_t n, double factor, const Lse<double>& lse,
                           const RowGradient<double>& g, double* grad) {
  const Exponential<double> e_to(1);
  for (int64_t v = 0; v < n; ++v) {
    const double log_p = (y[v] * factor - lse.rounded) - lse.rest, bounded = e_to.bounded(log_p);
    grad[v] = log_p < bounded ? 0 : g.at(bounded, e_to(bounded)) * factor;
  }
}

template <class Stored>
TRL_INLINE void gradient_step(const Stored* y, float factor, const Lse<float>& lse, const RowGradient<float>& g,
                              float* grad) {
  const Exponential<float> e_to(1);
  Floats log_p[kUnroll], bounded[kUnroll], p[kUnroll];
#pragma GCC unroll 4
  for (int u = 0; u < kUnroll; ++u) {
    log_p[u] = (load(y + u * kLanes) * factor - lse.rounded) - lse.rest;
    bounded[u] = e_to.bounded(log_p[u]);
  }
  e_to(bounded, p);
#pragma GCC unroll 4
  for (int u = 0; u < kUnroll; ++u) {
    const Floats value = g.at(bounded[u], p[u]) * factor;
    const Floats kept = log_p[u] < bounded[u] ? Floats{} : value;
    std::memcpy(grad + u * kLanes, &kept, sizeof kept);
  }
}

// grad has room for whole steps.
template <class Stored>
inline void gradient_block(const Stored* y, int64_t n, float factor, const Lse<float>& lse, const RowGradient<float>& g,
                           float* grad) {
  const LastStep<Stored> last(y + n / kStep * kStep, n % kStep);
  for (int64_t v = 0; v < n; v += kStep) gradient_step(v + kStep <= n ? y + v : last.numbers, factor, lse, g, grad + v);
}

template <class Logit, class T, class Stored>
inline void finish_gradient(const Row<Logit, T>& row, int64_t first, int64_t n, const Stored* y, T* grad) {
  const LogprobArgs<Logit, T>& args = row.args;
  for (int64_t k = 0; k < args.num_ids; ++k) {
    const int64_t at = args.ids[row.index * args.num_ids + k] - first;
    if (at >= 0 && at < n && !(row.keep() && !row.keep()[first + at]))
      grad[at] += row.transform.factor * RowGradient<T>::own_gradient(args, row.index, k);
  }
  if (!row.transform.capped) return;
  const RowTransform<T> transform = row.transform;
#pragma omp simd
  for (int64_t v = 0; v < n; ++v) grad[v] *= transform.slope(static_cast<T>(widen(y[v])));
}

template <class Logit, class T>
inline void backward_part(const LogprobArgs<Logit, T>& args, int64_t index, int64_t part) {
  const Row<Logit, T> row(args, index);
  Logit* out = row.grad();
  const int64_t begin = part * kPart, end = smaller(begin + kPart, args.vocab);
  if (RowGradient<T>::is_zero(args, index)) {
    std::memset(static_cast<void*>(out + begin), 0, sizeof(Logit) * static_cast<size_t>(end - begin));
    return;
  }
  const RowGradient<T> weights(args, index);
  const Lse<T> lse{args.lse[index], args.lse_rest[index]};
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = smaller(kBlock, end - first);
    T grad[kBlock];
    row.with_block(first, n, [&](const auto* y) {
      gradient_block(y, n, row.transform.factor, lse, weights, grad);
      finish_gradient(row, first, n, y, grad);
    });
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) out[first + v] = narrow<Logit>(grad[v]);
  }
}

}  // namespace

template <class Logit, class T>
void token_logprobs_backward(const LogprobArgs<Logit, T>& args, const Threads& threads) {
  const int64_t parts = parts_of(args), grain = larger(int64_t{1}, kPart / args.vocab);
  parallel(threads, args.batch * args.time * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) backward_part(args, i / parts, i % parts);
  });
}

template void token_logprobs_backward(const LogprobArgs<float, float>&, const Threads&);
template void token_logprobs_backward(const LogprobArgs<double, double>&, const Threads&);
template void token_logprobs_backward(const LogprobArgs<BFloat16, float>&, const Threads&);
template void token_logprobs_backward(const LogprobArgs<Half, float>&, const Threads&);

}  // namespace tokenrl::cpu::TOKENRL_ISA
