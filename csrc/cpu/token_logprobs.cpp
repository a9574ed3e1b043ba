// The statistics of each row of logits in one pass, and the gradient of the logits.
// Compiled once per instruction set (TOKENRL_ISA): nothing here may leave a linkable copy of a shared function behind.
#include <cstdlib>
#include <initializer_list>

#include "kernels.h"
#include "lanes.h"

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

// Logits whose sums are taken in one vector loop: one long fp32 sum would lose digits of the entropy.
constexpr int64_t kBlock = 2048;
// Logits of a row that one thread takes at least. A row's state is that of its parts, merged: its bits do not depend on
// how many threads there are.
constexpr int64_t kPart = 32768;
// With fewer rows than these, threads share the parts of a row.
constexpr int64_t kFewRows = 256;

// e^(factor d) for d <= 0.
template <class T>
struct Exponential;

template <>
struct Exponential<double> {
  double factor;

  explicit Exponential(double given) : factor(given) {}
  TRL_INLINE double operator()(double d) const { return exponential(factor * d); }
  TRL_INLINE double bounded(double d) const { return d < -1e300 ? -1e300 : d; }
};

// 2^t for t = d factor log2(e), whose constant is kept in two pieces: t = n + r, 2^r = 1 + r q(r) within 1e-7, and n goes
// straight into the exponent's bits. Below 2^-126, where they end, d is held: -inf then weighs 1e-38.
template <>
struct Exponential<float> {
  float high, low, least;

  explicit Exponential(double factor)
      : high(static_cast<float>(factor * 1.4426950408889634)),
        low(static_cast<float>(factor * 1.4426950408889634 - static_cast<double>(high))),
        least(static_cast<float>(-126 / (factor * 1.4426950408889634))) {}
  // For each vector of d: every step for all of them before the next.
  TRL_INLINE void operator()(const Floats (&d)[kUnroll], Floats (&e)[kUnroll]) const {
    Floats shifted[kUnroll], r[kUnroll];
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      // Adding and taking away 1.5 * 2^23 rounds; the sum's lowest bits are the integer.
      shifted[u] = d[u] * high + 12582912.0f;
      r[u] = (d[u] * high - (shifted[u] - 12582912.0f)) + d[u] * low;
      e[u] = r[u] * 0.001326472731f + 0.009671512991f;
    }
    horner(e, r, 0.05550733581f);
    horner(e, r, 0.2402224243f);
    horner(e, r, 0.6931470037f);
    horner(e, r, 1.0f);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u)
      e[u] = (Floats)((Words)e[u] + ((Words)shifted[u] << 23));
  }
  TRL_INLINE Floats bounded(Floats d) const { return higher(all(least), d); }

 private:
  TRL_INLINE static void horner(Floats (&e)[kUnroll], const Floats (&r)[kUnroll], float coefficient) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) e[u] = e[u] * r[u] + coefficient;
  }
};

// Where a block's y come from: the logits themselves, or a buffer of them after softcap and keep mask.
template <class Logit, class T>
struct Row {
  const LogprobArgs<Logit, T>& args;
  int64_t index, batch, time;
  RowTransform<T> transform;

  inline Row(const LogprobArgs<Logit, T>& given, int64_t row)
      : args(given), index(row), batch(row / given.time), time(row % given.time), transform(given.transform, row) {}
  inline const Logit* logits() const { return args.logits + batch * args.stride_batch + time * args.stride_time; }
  inline Logit* grad() const { return args.grad_logits + batch * args.grad_stride_batch + time * args.grad_stride_time; }
  inline const bool* keep() const {
    const Transform<T>& t = args.transform;
    return t.keep ? t.keep + batch * t.keep_stride_batch + time * t.keep_stride_time : nullptr;
  }
  inline bool plain() const { return !transform.capped && !args.transform.keep; }
  inline T at(int64_t v) const {
    const T x = static_cast<T>(widen(logits()[v]));
    return keep() && !keep()[v] ? -infinity<T>() : transform.capped ? transform.cap(x) : x;
  }
  // y of logits first to first + n.
  inline void fill(int64_t first, int64_t n, T* y) const {
    const Logit* x = logits() + first;
    if (transform.capped) {
      const RowTransform<T> local = transform;
#pragma omp simd
      for (int64_t v = 0; v < n; ++v) y[v] = local.cap(static_cast<T>(widen(x[v])));
    } else {
#pragma omp simd
      for (int64_t v = 0; v < n; ++v) y[v] = static_cast<T>(widen(x[v]));
    }
    if (!args.transform.keep) return;
    const bool* kept = keep() + first;
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) y[v] = kept[v] ? y[v] : -infinity<T>();
  }
  // f(y, n) with the y of a block, in whatever type they are stored.
  template <class F>
  inline auto with_block(int64_t first, int64_t n, F&& f) const {
    if (plain()) return f(logits() + first);
    T y[kBlock];
    fill(first, n, y);
    return f(static_cast<const T*>(y));
  }
};

template <class T, class Stored>
inline T largest(const Stored* y, int64_t n) {
  T highest = -infinity<T>();
#pragma omp simd reduction(max : highest)
  for (int64_t v = 0; v < n; ++v) {
    const T value = static_cast<T>(widen(y[v]));
    highest = highest < value ? value : highest;  // in this form it is one instruction
  }
  return highest;
}

// NaN where there is one: no comparison sees it.
template <class T, class Stored>
inline T nan_or_zero(const Stored* y, int64_t n) {
  for (int64_t v = 0; v < n; ++v)
    if (widen(y[v]) != widen(y[v])) return std::numeric_limits<T>::quiet_NaN();
  return 0;
}

// The sums of a block relative to `max`, and its own maximum.
inline Softmax<double> sum_block(const double* y, int64_t n, double max, const Exponential<double>& e_to) {
  constexpr int kChains = 8;
  Softmax<double> chains[kChains];
  for (Softmax<double>& chain : chains) chain = no_logits<double>();
  for (int64_t v = 0; v < n; ++v) {
    const double d = e_to.bounded(y[v] - max), e = e_to(d);
    Softmax<double>& chain = chains[v % kChains];
    chain.max = larger(chain.max, y[v]);
    chain.sum += e;
    chain.weighted += e * d;
    chain.squares += e * e;
  }
  Softmax<double> block = chains[0];
  for (int k = 1; k < kChains; ++k)
    block = {larger(block.max, chains[k].max), block.sum + chains[k].sum, block.weighted + chains[k].weighted,
             block.squares + chains[k].squares};
  return block;
}

// What fills up the last step weighs nothing.
template <class Stored>
inline Softmax<float> sum_block(const Stored* y, int64_t n, float max, const Exponential<float>& given) {
  const Exponential<float> e_to = given;
  const LastStep<Stored> last(y + n / kStep * kStep, n % kStep);
  Floats highest[kUnroll], sum[kUnroll], weighted[kUnroll], squares[kUnroll];
#pragma GCC unroll 4
  for (int u = 0; u < kUnroll; ++u) highest[u] = all(-infinity<float>()), sum[u] = weighted[u] = squares[u] = Floats{};
  for (int64_t v = 0; v < n; v += kStep) {
    const Stored* from = v + kStep <= n ? y + v : last.numbers;
    Floats d[kUnroll], e[kUnroll];
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const Floats value = load(from + u * kLanes);
      highest[u] = higher(value, highest[u]);
      d[u] = e_to.bounded(value - max);
    }
    e_to(d, e);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      sum[u] += e[u];
      weighted[u] += e[u] * d[u];
      squares[u] += e[u] * e[u];
    }
  }
  return {highest_of(highest), sum_of(sum), sum_of(weighted), sum_of(squares)};
}

// How far above the maximum that its sums refer to a z may rise before they are taken anew, relative to a higher one.
constexpr double kHeadroom = 8;

// Adds a block to a state whose maximum is that of the first block, until one rises above it by the headroom: so nearly
// every logit is visited once. The largest of all goes to `highest`.
template <class T, class Stored>
inline void take_block(Softmax<T>& state, T& highest, const Stored* y, int64_t n, T factor, const Exponential<T>& e_to) {
  if (state.max == -infinity<T>()) {
    state.max = largest<T>(y, n);
    if (state.max == -infinity<T>()) {
      state.sum += nan_or_zero<T>(y, n);
      return;
    }
  }
  Softmax<T> block = sum_block(y, n, state.max, e_to);
  if ((block.max - state.max) * factor > kHeadroom) {
    state = rescaled(state, block.max, factor);
    block = sum_block(y, n, state.max, e_to);
  }
  highest = larger(highest, block.max);
  state.sum += block.sum;
  state.weighted += block.weighted;
  state.squares += block.squares;
}

template <class Logit, class T>
inline Softmax<T> part_softmax(const Row<Logit, T>& row, int64_t part) {
  const Exponential<T> e_to(row.transform.factor);
  const T factor = row.transform.factor;
  Softmax<T> state = no_logits<T>();
  T highest = state.max;
  const int64_t end = smaller((part + 1) * kPart, row.args.vocab);
  for (int64_t first = part * kPart; first < end; first += kBlock) {
    const int64_t n = smaller(kBlock, end - first);
    row.with_block(first, n, [&](const auto* y) { take_block(state, highest, y, n, factor, e_to); });
  }
  if (highest > state.max) state = rescaled(state, highest, factor);
  // The 2^-126 of logits that are -inf are not to be seen in a row without entropy; the sum is at least 1.
  if (state.weighted > T(-1e-30)) state.weighted = 0;
  return state;
}

// How many logits are larger than x, and how many of the first `before` are equal to it: raw logits, those kept.
struct Order {
  int64_t above, equal_before;
};
template <class Logit, class T>
inline Order order_of(const Row<Logit, T>& row, T own, int64_t before) {
  const Logit* x = row.logits();
  const bool* keep = row.keep();
  Order order{0, 0};
  for (int64_t first = 0; first < row.args.vocab; first += kBlock) {
    const int64_t last = smaller(first + kBlock, row.args.vocab);
    int32_t above = 0, equal = 0;
#pragma omp simd reduction(+ : above, equal)
    for (int64_t v = first; v < last; ++v) {
      const T value = keep && !keep[v] ? -infinity<T>() : static_cast<T>(widen(x[v]));
      above += value > own;
      equal += (value == own) & (v < before);
    }
    order.above += above;
    order.equal_before += equal;
  }
  return order;
}

template <class Logit, class T>
inline T mean_of(const Row<Logit, T>& row) {
  double sum = 0;
  int64_t count = 0;
  for (int64_t first = 0; first < row.args.vocab; first += kBlock) {
    const int64_t n = smaller(kBlock, row.args.vocab - first);
    const bool* keep = row.keep() ? row.keep() + first : nullptr;
    row.with_block(first, n, [&](const auto* y) {
      T block = 0;
      int32_t kept = 0;
#pragma omp simd reduction(+ : block, kept)
      for (int64_t v = 0; v < n; ++v) {
        const bool counts = !keep || keep[v];
        block += counts ? static_cast<T>(widen(y[v])) : T(0);
        kept += counts;
      }
      sum += block;
      count += kept;
    });
  }
  return static_cast<T>(sum / static_cast<double>(count) * static_cast<double>(row.transform.factor));
}

template <class Logit, class T>
inline void store_ids(const Row<Logit, T>& row, const Softmax<T>& state) {
  const LogprobArgs<Logit, T>& args = row.args;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for (int64_t k = row.index * args.num_ids; k < (row.index + 1) * args.num_ids; ++k) {
    const int64_t id = args.ids[k];
    const bool known = id >= 0 && id < args.vocab;
    args.logp[k] = id == kIgnoredId ? T(0) : !known ? nan : logp_of(state, row.at(id), row.transform.factor);
    if (!args.is_top1 && !args.rank) continue;
    const bool kept = known && !(row.keep() && !row.keep()[id]);
    const T own = kept ? static_cast<T>(widen(row.logits()[id])) : -infinity<T>();
    const Order order = known ? order_of(row, own, id) : Order{-1, 0};
    if (args.is_top1) args.is_top1[k] = order.above == 0 && order.equal_before == 0;
    if (args.rank) args.rank[k] = order.above + 1;
  }
}

template <class Logit, class T>
inline void store_zeros(const LogprobArgs<Logit, T>& args, int64_t row) {
  for (T* out : {args.entropy, args.lse, args.lse_rest, args.log_sum_sq_probs, args.mean_logit, args.max_prob})
    if (out) out[row] = 0;
  for (int64_t k = row * args.num_ids; k < (row + 1) * args.num_ids; ++k) {
    args.logp[k] = 0;
    if (args.is_top1) args.is_top1[k] = false;
    if (args.rank) args.rank[k] = 0;
  }
}

template <class Logit, class T>
inline void store_row(const Row<Logit, T>& row, const Softmax<T>& state) {
  const LogprobArgs<Logit, T>& args = row.args;
  const T factor = row.transform.factor;
  args.lse[row.index] = lse_of(state, factor);
  args.lse_rest[row.index] = lse_rest_of(state, factor, args.lse[row.index]);
  args.entropy[row.index] = entropy_of(state, factor);
  if (args.log_sum_sq_probs) args.log_sum_sq_probs[row.index] = log_sum_sq_probs_of(state);
  if (args.max_prob) args.max_prob[row.index] = max_prob_of(state);
  if (args.mean_logit) args.mean_logit[row.index] = mean_of(row);
  store_ids(row, state);
}

template <class T>
inline Softmax<T> merged(const Softmax<T>* parts, int64_t count, T factor) {
  Softmax<T> state = parts[0];
  for (int64_t part = 1; part < count; ++part) state = merge(state, parts[part], factor);
  return state;
}

template <class Logit, class T>
inline void forward_row(const LogprobArgs<Logit, T>& args, int64_t index, int64_t parts) {
  if (is_ignored(args, index)) return store_zeros(args, index);
  const Row<Logit, T> row(args, index);
  Softmax<T> state = part_softmax(row, 0);
  for (int64_t part = 1; part < parts; ++part) state = merge(state, part_softmax(row, part), row.transform.factor);
  store_row(row, state);
}

// Threads share rows: every part's state first, then each row's.
template <class Logit, class T>
inline void forward_parts(const LogprobArgs<Logit, T>& args, int64_t parts, const Threads& threads) {
  const int64_t rows = args.batch * args.time;
  auto* states = static_cast<Softmax<T>*>(std::malloc(sizeof(Softmax<T>) * static_cast<size_t>(rows * parts)));
  if (!states) std::abort();
  parallel(threads, rows * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!is_ignored(args, i / parts)) states[i] = part_softmax(Row<Logit, T>(args, i / parts), i % parts);
  });
  parallel(threads, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      if (is_ignored(args, index)) {
        store_zeros(args, index);
        continue;
      }
      const Row<Logit, T> row(args, index);
      store_row(row, merged(states + index * parts, parts, row.transform.factor));
    }
  });
  std::free(states);
}

template <class T>
struct Lse {
  T rounded, rest;
};

// The gradient of a block in full precision, without the ids' own shares and the way back through the softcap; exactly 0
// where p is.
inline void gradient_block(const double* y, int64_t n, double factor, const Lse<double>& lse, const RowGradient<double>& g, double* grad) {
  const Exponential<double> e_to(1);
  for (int64_t v = 0; v < n; ++v) {
    const double log_p = (y[v] * factor - lse.rounded) - lse.rest, bounded = e_to.bounded(log_p);
    grad[v] = log_p < bounded ? 0 : g.at(bounded, e_to(bounded)) * factor;
  }
}

template <class Stored>
TRL_INLINE void gradient_step(const Stored* y, float factor, const Lse<float>& lse, const RowGradient<float>& g, float* grad) {
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
inline void gradient_block(const Stored* y, int64_t n, float factor, const Lse<float>& lse, const RowGradient<float>& g, float* grad) {
  const LastStep<Stored> last(y + n / kStep * kStep, n % kStep);
  for (int64_t v = 0; v < n; v += kStep)
    gradient_step(v + kStep <= n ? y + v : last.numbers, factor, lse, g, grad + v);
}

template <class Logit, class T>
inline void finish_gradient(const Row<Logit, T>& row, int64_t first, int64_t n, T* grad) {
  const LogprobArgs<Logit, T>& args = row.args;
  for (int64_t k = 0; k < args.num_ids; ++k) {
    const int64_t at = args.ids[row.index * args.num_ids + k] - first;
    if (at >= 0 && at < n && !(row.keep() && !row.keep()[first + at]))
      grad[at] += row.transform.factor * RowGradient<T>::own_gradient(args, row.index, k);
  }
  if (!row.transform.capped) return;
  for (int64_t v = 0; v < n; ++v) grad[v] *= row.transform.slope(row.at(first + v));
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
    row.with_block(first, n, [&](const auto* y) { gradient_block(y, n, row.transform.factor, lse, weights, grad); });
    finish_gradient(row, first, n, grad);
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) out[first + v] = narrow<Logit>(grad[v]);
  }
}

template <class Logit, class T>
inline int64_t parts_of(const LogprobArgs<Logit, T>& args) {
  return (args.vocab + kPart - 1) / kPart;
}

}  // namespace

template <class Logit, class T>
void token_logprobs(const LogprobArgs<Logit, T>& args, const Threads& threads) {
  const int64_t rows = args.batch * args.time, parts = parts_of(args);
  if (parts > 1 && rows < kFewRows) return forward_parts(args, parts, threads);
  parallel(threads, rows, larger(int64_t{1}, kPart / args.vocab), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) forward_row(args, row, parts);
  });
}

template <class Logit, class T>
void token_logprobs_backward(const LogprobArgs<Logit, T>& args, const Threads& threads) {
  const int64_t parts = parts_of(args), grain = larger(int64_t{1}, kPart / args.vocab);
  parallel(threads, args.batch * args.time * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) backward_part(args, i / parts, i % parts);
  });
}

#define TOKENRL_INSTANTIATE(Logit, T)                                         \
  template void token_logprobs(const LogprobArgs<Logit, T>&, const Threads&); \
  template void token_logprobs_backward(const LogprobArgs<Logit, T>&, const Threads&);
TOKENRL_INSTANTIATE(float, float)
TOKENRL_INSTANTIATE(double, double)
TOKENRL_INSTANTIATE(BFloat16, float)
TOKENRL_INSTANTIATE(Half, float)

}  // namespace tokenrl::cpu::TOKENRL_ISA
