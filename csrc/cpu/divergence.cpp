// Divergences of two heads' distributions, row by row, and the gradient of either's logits.
// Compiled once per instruction set (TOKENRL_ISA): nothing here may leave a linkable copy of a shared function behind.
#include "logit_row.h"

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

// What makes log-probs of a row's y.
template <class T>
struct LogProbs {
  T factor, lse, lse_rest;

  // log p and p of a step; p is exactly 0 where log p is out of its range.
  template <class Stored>
  TRL_INLINE void of(const Stored* y, Vector<T> (&log_p)[kUnroll], Vector<T> (&p)[kUnroll]) const {
    const Exponential<T> e_to(1);
    Vector<T> bounded[kUnroll];
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      log_p[u] = (load(y + u * kWidth<T>) * factor - lse) - lse_rest;
      bounded[u] = e_to.bounded(log_p[u]);
    }
    e_to(bounded, p);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) p[u] = log_p[u] < bounded[u] ? Vector<T>{} : p[u];
  }
};
template <class Logit, class T>
struct Head {
  Row<Logit, T> row;
  LogProbs<T> log_probs;

  inline Head(const LogprobArgs<Logit, T>& args, int64_t index)
      : row(args, index), log_probs{row.transform.factor, args.lse[index], args.lse_rest[index]} {}
};

// A step of both rows, and what a kind makes of each of its vectors.
template <class Kind, class T>
struct Step {
  Pair<Vector<T>> pairs[kUnroll];
  Diverged<Vector<T>> found[kUnroll];

  template <class Stored>
  TRL_INLINE Step(const Stored* y, const Stored* z, const LogProbs<T>& of_p, const LogProbs<T>& of_r,
                  const ParamsOf<Kind, T>& params) {
    Vector<T> log_p[kUnroll], log_r[kUnroll], p[kUnroll], r[kUnroll];
    of_p.of(y, log_p, p);
    of_r.of(z, log_r, r);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      pairs[u] = {log_p[u], log_r[u], p[u], r[u]};
      found[u] = Kind::eval(pairs[u], params);
    }
  }
};

// visit(first, n, y, z) of each block of both rows: the logits themselves, or y as T.
template <class Logit, class T, class Visit>
inline void each_block(const Head<Logit, T>& p, const Head<Logit, T>& r, Visit&& visit) {
  // A loop for each type that it reads takes seconds to compile; fp16 does without its own.
  constexpr bool kReadsLogits = !std::is_same_v<Logit, Half>;
  const bool plain = kReadsLogits && p.row.plain() && r.row.plain();
  for (int64_t first = 0; first < p.row.args.vocab; first += kBlock) {
    const int64_t n = smaller(kBlock, p.row.args.vocab - first);
    if constexpr (kReadsLogits)
      if (plain) {
        visit(first, n, p.row.logits() + first, r.row.logits() + first);
        continue;
      }
    T y[kBlock], z[kBlock];
    p.row.fill(first, n, y);
    r.row.fill(first, n, z);
    visit(first, n, static_cast<const T*>(y), static_cast<const T*>(z));
  }
}

// visit(v, y, z) of each step of a block; what fills up the last one is in neither vocabulary.
template <class T, class Stored, class Visit>
TRL_INLINE void each_step(const Stored* y, const Stored* z, int64_t n, Visit&& visit) {
  const int64_t whole = n / kStepOf<T> * kStepOf<T>;
  const LastStep<Stored> last_y(y + whole, n - whole), last_z(z + whole, n - whole);
  for (int64_t v = 0; v < n; v += kStepOf<T>) {
    prefetch_after(y + v);
    prefetch_after(z + v);
    visit(v, v < whole ? y + v : last_y.numbers, v < whole ? z + v : last_z.numbers);
  }
}

// Where a row has no distribution, with a logit of inf or none but -inf, NaN, else 0.
template <class T>
inline T oddness(const LogProbs<T>& of_p, const LogProbs<T>& of_r) {
  return (of_p.lse - of_p.lse) + (of_r.lse - of_r.lse);
}

template <class T>
struct Sums {
  T value, by_p, by_r;
};

template <class Kind, class Stored, class T>
__attribute__((noinline)) Sums<T> forward_block(const Stored* y, const Stored* z, int64_t n, const LogProbs<T> of_p,
                                                const LogProbs<T> of_r, const ParamsOf<Kind, T> params) {
  Vector<T> value[kUnroll]{}, by_p[kUnroll]{}, by_r[kUnroll]{};
  each_step<T>(y, z, n, [&](int64_t, const Stored* step_y, const Stored* step_z) TRL_INLINE_LAMBDA {
    const Step<Kind, T> step(step_y, step_z, of_p, of_r, params);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      value[u] += step.found[u].value;
      by_p[u] += step.found[u].by_p;
      by_r[u] += step.found[u].by_r;
    }
  });
  return {sum_of(value), sum_of(by_p), sum_of(by_r)};
}

template <class Kind, class Logit, class T>
inline void forward_row(const DivergenceArgs<Logit, T>& args, int64_t index, const ParamsOf<Kind, T>& params) {
  const Head<Logit, T> p(args.of, index), r(args.other, index);
  Sums<double> sums{};
  each_block(p, r, [&](int64_t, int64_t n, const auto* y, const auto* z) {
    const Sums<T> block = forward_block<Kind>(y, z, n, p.log_probs, r.log_probs, params);
    sums.value += static_cast<double>(block.value);
    sums.by_p += static_cast<double>(block.by_p);
    sums.by_r += static_cast<double>(block.by_r);
  });
  const T odd = oddness(p.log_probs, r.log_probs);
  args.value[index] = static_cast<T>(sums.value) + odd;
  args.by_p[index] = static_cast<T>(sums.by_p) + odd;
  args.by_r[index] = static_cast<T>(sums.by_r) + odd;
}

// dz = scale (by_p - p by), or with by_r and r of the other head; it has room for whole steps.
template <class Kind, bool kOfOther, class Stored, class T>
__attribute__((noinline)) void backward_block(const Stored* y, const Stored* z, int64_t n, const LogProbs<T> of_p,
                                              const LogProbs<T> of_r, const ParamsOf<Kind, T> params, T scale, T by,
                                              T* dz) {
  each_step<T>(y, z, n, [&](int64_t v, const Stored* step_y, const Stored* step_z) TRL_INLINE_LAMBDA {
    const Step<Kind, T> step(step_y, step_z, of_p, of_r, params);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const Pair<Vector<T>>& of = step.pairs[u];
      const Diverged<Vector<T>>& d = step.found[u];
      const Vector<T> dy = scale * (kOfOther ? d.by_r - of.r * by : d.by_p - of.p * by);
      const Vector<T> kept = (kOfOther ? of.log_r : of.log_p) == -infinity<T>() ? Vector<T>{} : dy;
      std::memcpy(dz + v + u * kWidth<T>, &kept, sizeof kept);
    }
  });
}

template <class Kind, bool kOfOther, class Logit, class T>
inline void backward_row(const DivergenceArgs<Logit, T>& args, int64_t index, const ParamsOf<Kind, T>& params) {
  const Head<Logit, T> p(args.of, index), r(args.other, index);
  const RowTransform<T> transform = (kOfOther ? r : p).row.transform;
  const T by = args.by_p[index], scale = args.grad[index] * transform.factor;
  Logit* out = p.row.grad();
  each_block(p, r, [&](int64_t first, int64_t n, const auto* y, const auto* z) {
    T dz[kBlock];
    backward_block<Kind, kOfOther>(y, z, n, p.log_probs, r.log_probs, params, scale, by, dz);
    if (transform.capped) {
      const RowTransform<T> local = transform;
#pragma omp simd
      for (int64_t v = 0; v < n; ++v) dz[v] *= local.slope(static_cast<T>(widen((kOfOther ? z : y)[v])));
    }
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) out[first + v] = narrow<Logit>(dz[v]);
  });
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
bool by_kind(const DivergenceArgs<Logit, T>& args, const char* kind, const Threads& threads, std::tuple<Kind...>*) {
  return ((std::strcmp(kind, Kind::name) == 0 && (all_rows<Kind>(args, threads), true)) || ...);
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
