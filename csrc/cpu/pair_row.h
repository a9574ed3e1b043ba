// A row of two heads' logits side by side, a block and a step at a time. Only for sources that are compiled once per
// instruction set.
#pragma once

#include "logit_row.h"

namespace tokenrl::cpu::TOKENRL_ISA {

// What makes log-probs of a row's y.
template <class T>
struct LogProbs {
  T factor, lse, lse_rest;

  template <class Logit>
  explicit inline LogProbs(const LogprobArgs<Logit, T>& args, int64_t row)
      : factor(RowTransform<T>(args.transform, row).factor), lse(args.lse[row]), lse_rest(args.lse_rest[row]) {}

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

// What loops over a row's own logits read. One for each type takes seconds to compile: fp16 does without, as T alone.
template <class Logit, class T>
using Read = std::conditional_t<std::is_same_v<Logit, Half>, T, Logit>;

// The same function of blocks of the logits themselves and of blocks of y as T.
template <class Logit, class T, class Result, class... Rest>
struct OfBlock {
  Result (*of_logits)(const Read<Logit, T>* y, const Read<Logit, T>* z, int64_t n, Rest...);
  Result (*of_numbers)(const T* y, const T* z, int64_t n, Rest...);

  template <class Stored>
  inline Result operator()(const Stored* y, const Stored* z, int64_t n, Rest... rest) const {
    if constexpr (std::is_same_v<Stored, T>) return of_numbers(y, z, n, rest...);
    else return of_logits(y, z, n, rest...);
  }
};

// visit(first, n, y, z) of each block of both rows: the logits themselves, or y as T.
template <class Logit, class T, class Visit>
inline void each_block(const Row<Logit, T>& p, const Row<Logit, T>& r, Visit&& visit) {
  constexpr bool kReadsLogits = std::is_same_v<Read<Logit, T>, Logit>;
  const bool plain = kReadsLogits && p.plain() && r.plain();
  for (int64_t first = 0; first < p.args.vocab; first += kBlock) {
    const int64_t n = smaller(kBlock, p.args.vocab - first);
    if constexpr (kReadsLogits)
      if (plain) {
        visit(first, n, p.logits() + first, r.logits() + first);
        continue;
      }
    T y[kBlock], z[kBlock];
    p.fill(first, n, y);
    r.fill(first, n, z);
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

template <class Kind, class T>
TRL_INLINE ParamsOf<Kind, T> params_of(const T* params) {
  return params_from<Kind, T>([params](size_t k) { return params[k]; });
}

// each(row, loops) of every row, with the loops of the kind of that name: all that depends on it. False where there is
// no such kind.
template <class Loops, class Logit, class T, class Each, class... Kind>
bool each_row(const DivergenceArgs<Logit, T>& args, const char* name, const Threads& threads, Each&& each,
              std::tuple<Kind...>*) {
  Loops loops;
  const bool known = ((std::strcmp(name, Kind::name) == 0 && (loops = Loops::template of<Kind>(), true)) || ...);
  const int64_t rows = args.of.batch * args.of.time, grain = larger(int64_t{1}, kPart / args.of.vocab);
  if (known)
    parallel(threads, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) each(row, loops);
    });
  return known;
}

}  // namespace tokenrl::cpu::TOKENRL_ISA
