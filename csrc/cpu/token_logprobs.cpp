// Log-prob, entropy and log-sum-exp of each row of logits in one pass, and the gradient of the logits.
// Compiled once per instruction set (TOKENRL_ISA): nothing here may leave a linkable copy of a shared function behind.
#include "kernels.h"

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

// A row is summed in blocks whose sums are then merged: one long fp32 sum would lose digits of the entropy.
constexpr int64_t kBlock = 512;

// z of up to kBlock logits in full precision, and their maximum; -inf fills up the block.
template <class Logit, class T>
inline T widen_block(const Logit* logits, int64_t n, T inverse, T* z) {
  T highest = -infinity<T>();
#pragma omp simd reduction(max : highest)
  for (int64_t v = 0; v < n; ++v) {
    z[v] = static_cast<T>(widen(logits[v])) * inverse;
    highest = z[v] > highest ? z[v] : highest;
  }
  return highest;
}

// Sums of e^(z - max) and e^(z - max) (z - max), max finite or of no consequence; a z of -inf has no weight.
template <class T>
inline Softmax<T> sum_block(const T* z, int64_t n, T max) {
  T sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t v = 0; v < n; ++v) {
    const T shift = z[v] - max, e = exponential(shift);
    sum += e;
    weighted += z[v] == -infinity<T>() ? T(0) : e * shift;
  }
  return {max, sum, weighted};
}

template <class Logit, class T>
inline Softmax<T> row_softmax(const Logit* logits, int64_t vocab, T inverse) {
  T z[kBlock];
  Softmax<T> row = no_logits<T>();
  for (int64_t first = 0; first < vocab; first += kBlock) {
    const int64_t n = smaller(kBlock, vocab - first);
    const T highest = widen_block(logits + first, n, inverse, z);
    // One max per row keeps the sums comparable; it moves rarely.
    if (highest > row.max) row = rescaled(row, highest);
    if (row.max == -infinity<T>()) continue;
    const Softmax<T> block = sum_block(z, n, row.max);
    row.sum += block.sum;
    row.weighted += block.weighted;
  }
  return row;
}

template <class Logit, class T>
inline const Logit* row_of(const LogprobArgs<Logit, T>& args, int64_t row) {
  return args.logits + row / args.time * args.stride_batch + row % args.time * args.stride_time;
}

template <class Logit, class T>
inline void forward_row(const LogprobArgs<Logit, T>& args, int64_t row) {
  const int64_t id = args.ids[row];
  if (id == kIgnoredId) {
    args.logp[row] = args.entropy[row] = args.lse[row] = 0;
    return;
  }
  const Logit* logits = row_of(args, row);
  const T inverse = T(1) / args.temperature;
  const Softmax<T> state = row_softmax(logits, args.vocab, inverse);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const bool empty = state.max == -infinity<T>(), known = id >= 0 && id < args.vocab;
  const T log_mass = ::log(state.sum);
  args.lse[row] = empty ? nan : state.max + log_mass;
  args.entropy[row] = empty ? nan : entropy_of(state);
  // z - max first: exact, where z - lse would round twice at large offsets.
  args.logp[row] = empty || !known ? nan : static_cast<T>(widen(logits[id])) * inverse - state.max - log_mass;
}

template <class Logit, class T>
inline void backward_row(const LogprobArgs<Logit, T>& args, int64_t row) {
  Logit* grad = args.grad_logits + row * args.vocab;
  const int64_t id = args.ids[row];
  const T grad_logp = args.grad_logp ? args.grad_logp[row] : T(0), grad_entropy = args.grad_entropy ? args.grad_entropy[row] : T(0);
  if (id == kIgnoredId || (grad_logp == 0 && grad_entropy == 0)) {
    std::memset(static_cast<void*>(grad), 0, sizeof(Logit) * static_cast<size_t>(args.vocab));
    return;
  }
  const Logit* logits = row_of(args, row);
  const T inverse = T(1) / args.temperature, lse = args.lse[row], entropy = args.entropy[row];
#pragma omp simd
  for (int64_t v = 0; v < args.vocab; ++v) {
    const T z = static_cast<T>(widen(logits[v])) * inverse;
    grad[v] = narrow<Logit>(logit_gradient(z, lse, entropy, grad_logp, grad_entropy, false) * inverse);
  }
  if (id < 0 || id >= args.vocab) return;
  const T z = static_cast<T>(widen(logits[id])) * inverse;
  grad[id] = narrow<Logit>(logit_gradient(z, lse, entropy, grad_logp, grad_entropy, true) * inverse);
}

}  // namespace

template <class Logit, class T>
void token_logprobs(const LogprobArgs<Logit, T>& args, const Threads& threads) {
  const int64_t grain = larger(int64_t{1}, 32768 / args.vocab);
  parallel(threads, args.batch * args.time, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) forward_row(args, row);
  });
}

template <class Logit, class T>
void token_logprobs_backward(const LogprobArgs<Logit, T>& args, const Threads& threads) {
  const int64_t grain = larger(int64_t{1}, 32768 / args.vocab);
  parallel(threads, args.batch * args.time, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) backward_row(args, row);
  });
}

#define TOKENRL_INSTANTIATE(Logit, T)                                              \
  template void token_logprobs(const LogprobArgs<Logit, T>&, const Threads&); \
  template void token_logprobs_backward(const LogprobArgs<Logit, T>&, const Threads&);
TOKENRL_INSTANTIATE(float, float)
TOKENRL_INSTANTIATE(double, double)
TOKENRL_INSTANTIATE(BFloat16, float)
TOKENRL_INSTANTIATE(Half, float)

}  // namespace tokenrl::cpu::TOKENRL_ISA
