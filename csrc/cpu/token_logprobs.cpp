// The statistics of each row of logits in one pass.
// Compiled once per instruction set (TOKENRL_ISA): nothing here may leave a linkable copy of a shared function behind.
#include <initializer_list>

#include "logit_row.h"
#include "scratch.h"

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

// With fewer rows than these, threads share the parts of a row.
constexpr int64_t kFewRows = 256;

// NaN where there is one: no comparison sees it.
template <class T, class Stored>
inline T nan_or_zero(const Stored* y, int64_t n) {
  for (int64_t v = 0; v < n; ++v)
    if (widen(y[v]) != widen(y[v])) return std::numeric_limits<T>::quiet_NaN();
  return 0;
}

// The sums of a block relative to `max`, and its own maximum. The squares only where they are asked for.
template <bool kSquares>
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
    if (kSquares) chain.squares += e * e;
  }
  Softmax<double> block = chains[0];
  for (int k = 1; k < kChains; ++k)
    block = {larger(block.max, chains[k].max), block.sum + chains[k].sum, block.weighted + chains[k].weighted,
             block.squares + chains[k].squares};
  return block;
}

// What fills up the last step weighs nothing.
template <bool kSquares, class Stored>
inline Softmax<float> sum_block(const Stored* y, int64_t n, float max, const Exponential<float>& given) {
  const Exponential<float> e_to = given;
  const LastStep<Stored> last(y + n / kStep * kStep, n % kStep);
  Floats highest[kUnroll], sum[kUnroll], weighted[kUnroll], squares[kUnroll];
#pragma GCC unroll 4
  for (int u = 0; u < kUnroll; ++u) highest[u] = all(-infinity<float>()), sum[u] = weighted[u] = squares[u] = Floats{};
  for (int64_t v = 0; v < n; v += kStep) {
    const Stored* from = v + kStep <= n ? y + v : last.numbers;
    prefetch_after(y + v);
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
      if (kSquares) squares[u] += e[u] * e[u];
    }
  }
  return {highest_of(highest), sum_of(sum), sum_of(weighted), sum_of(squares)};
}

// How far above the maximum that its sums refer to a z may rise before they are taken anew, relative to a higher one.
constexpr double kHeadroom = 8;

// Adds a block to a state whose maximum is that of the first block, until one rises above it by the headroom: so nearly
// every logit is visited once. The largest of all goes to `highest`.
template <bool kSquares, class T, class Stored>
inline void take_block(Softmax<T>& state, T& highest, const Stored* y, int64_t n, T factor,
                       const Exponential<T>& e_to) {
  if (state.max == -infinity<T>()) {
    state.max = largest<T>(y, n);
    if (state.max == -infinity<T>()) {
      state.sum += nan_or_zero<T>(y, n);
      return;
    }
  }
  Softmax<T> block = sum_block<kSquares>(y, n, state.max, e_to);
  if ((block.max - state.max) * factor > kHeadroom) {
    state = rescaled(state, block.max, factor);
    block = sum_block<kSquares>(y, n, state.max, e_to);
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
    row.with_block(first, n, [&](const auto* y) {
      if (row.args.log_sum_sq_probs) take_block<true>(state, highest, y, n, factor, e_to);
      else take_block<false>(state, highest, y, n, factor, e_to);
    });
  }
  if (highest > state.max) state = rescaled(state, highest, factor);
  // The 2^-125 of logits that are -inf are not to be seen in a row without entropy; the sum is at least 1.
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
      double block = 0;
      int32_t kept = 0;
#pragma omp simd reduction(+ : block, kept)
      for (int64_t v = 0; v < n; ++v) {
        const bool counts = !keep || keep[v];
        block += counts ? static_cast<double>(widen(y[v])) : 0.0;
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
  const Scratch<Softmax<T>> states(rows * parts);
  parallel(threads, rows * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!is_ignored(args, i / parts)) states.at[i] = part_softmax(Row<Logit, T>(args, i / parts), i % parts);
  });
  parallel(threads, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      if (is_ignored(args, index)) {
        store_zeros(args, index);
        continue;
      }
      const Row<Logit, T> row(args, index);
      store_row(row, merged(states.at + index * parts, parts, row.transform.factor));
    }
  });
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

template void token_logprobs(const LogprobArgs<float, float>&, const Threads&);
template void token_logprobs(const LogprobArgs<double, double>&, const Threads&);
template void token_logprobs(const LogprobArgs<BFloat16, float>&, const Threads&);
template void token_logprobs(const LogprobArgs<Half, float>&, const Threads&);

}  // namespace tokenrl::cpu::TOKENRL_ISA
