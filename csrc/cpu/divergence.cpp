// Divergences of two heads' distributions, row by row, with the lse of both.
// Compiled once per instruction set (TOKENRL_ISA): nothing here may leave a linkable copy of a shared function behind.
#include "pair_row.h"

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

// In the place of a kind: the weights alone are summed.
struct NoKind {};

// Above this a log weight is held; far below it a block's sum tells that its origin is to be another.
constexpr double kHighestLog = 80;
constexpr float kHighestSum = 1 << 20;

// Weights e^(z - origin), z = factor y.
template <class T>
struct Weights {
  T factor, origin, most;
  Exponential<T> e_to;

  explicit inline Weights(T given)
      : factor(given),
        origin(-infinity<T>()),
        most(static_cast<T>(kHighestLog / static_cast<double>(given))),
        e_to(static_cast<double>(given)) {}

  // y - origin of a step, and its weights; a y of -inf still weighs 2e-38.
  template <class Stored>
  TRL_INLINE void of(const Stored* y, Vector<T> (&d)[kUnroll], Vector<T> (&w)[kUnroll]) const {
    Vector<T> held[kUnroll];
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      d[u] = load(y + u * kWidth<T>) - origin;
      held[u] = lower(all(most), e_to.bounded(d[u]));
    }
    e_to(held, w);
  }
  TRL_INLINE Vector<T> without_bounded(Vector<T> d, Vector<T> w) const { return d < e_to.bounded(d) ? Vector<T>{} : w; }
};

template <class T>
struct WeightSums {
  T p, r, value;
};

template <class Kind, class Stored, class T>
__attribute__((noinline)) WeightSums<T> sum_weights(const Stored* y, const Stored* z, int64_t n, const Weights<T> of_p,
                                                    const Weights<T> of_r) {
  Vector<T> p_sum[kUnroll]{}, r_sum[kUnroll]{}, value[kUnroll]{};
  each_step<T>(y, z, n, [&](int64_t, const Stored* step_y, const Stored* step_z) TRL_INLINE_LAMBDA {
    Vector<T> d_p[kUnroll], d_r[kUnroll], p[kUnroll], r[kUnroll];
    of_p.of(step_y, d_p, p);
    of_r.of(step_z, d_r, r);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      if constexpr (kWeighsLogs<Kind>) {
        if constexpr (Kind::weight == Weight::p) p[u] = of_p.without_bounded(d_p[u], p[u]);
        else r[u] = of_r.without_bounded(d_r[u], r[u]);
        const Pair<Vector<T>> pair{d_p[u] * of_p.factor, d_r[u] * of_r.factor, p[u], r[u]};
        value[u] += Kind::eval(pair, ParamsOf<Kind, T>{}).value;
      }
      p_sum[u] += p[u];
      r_sum[u] += r[u];
    }
  });
  return {sum_of(p_sum), sum_of(r_sum), sum_of(value)};
}

template <class Kind, class Stored, class T>
__attribute__((noinline)) Diverged<T> sum_values(const Stored* y, const Stored* z, int64_t n, const LogProbs<T> of_p,
                                                 const LogProbs<T> of_r, const T* given) {
  const ParamsOf<Kind, T> params = params_of<Kind>(given);
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

// How a kind's sum changes with the scale of the weights, and that of each head with the logarithm of its weights.
using Shift = double (*)(const WeightSums<double>& sums, double scale_p, double scale_r, double by_p, double by_r);
template <class Kind>
double shifted_value(const WeightSums<double>& sums, double scale_p, double scale_r, double by_p, double by_r) {
  constexpr bool kOfP = Kind::weight == Weight::p;
  return shifted<Kind>(sums.value, kOfP ? sums.p : sums.r, kOfP ? scale_p : scale_r, by_p, by_r);
}

template <class Kind>
Diverged<double> all_sums(double value) {
  return of_value<Kind>(value);
}

// All of the forward that depends on the kind. One that weighs logs has no values of its own: its sums are made of one.
template <class Logit, class T>
struct SumLoops {
  OfBlock<Logit, T, WeightSums<T>, Weights<T>, Weights<T>> weights;
  OfBlock<Logit, T, Diverged<T>, LogProbs<T>, LogProbs<T>, const T*> values;
  Shift shift;
  Diverged<double> (*all_sums_of)(double value);

  template <class Kind>
  static SumLoops of() {
    using Stored = Read<Logit, T>;
    if constexpr (kWeighsLogs<Kind>)
      return {{&sum_weights<Kind, Stored, T>, &sum_weights<Kind, T, T>}, {}, &shifted_value<Kind>, &all_sums<Kind>};
    else
      return {{&sum_weights<NoKind, Stored, T>, &sum_weights<NoKind, T, T>},
              {&sum_values<Kind, Stored, T>, &sum_values<Kind, T, T>},
              nullptr,
              nullptr};
  }
};

// Both rows' weights, summed over the blocks so far, and a kind's value of them in the place of p and r. An origin is
// the largest y of the first block that has one above -inf, or of a later block that outgrew it.
template <class Logit, class T>
class Sweep {
 public:
  inline Sweep(const SumLoops<Logit, T>& loops, T factor_p, T factor_r) : loops_(loops), p_(factor_p), r_(factor_r) {}

  template <class Stored>
  inline void take(const Stored* y, const Stored* z, int64_t n) {
    if (p_.origin == -infinity<T>()) p_.origin = largest<T>(y, n);
    if (r_.origin == -infinity<T>()) r_.origin = largest<T>(z, n);
    WeightSums<T> block = loops_.weights(y, z, n, finite(p_), finite(r_));
    if (block.p > kHighestSum || block.r > kHighestSum) {
      raise(larger(p_.origin, largest<T>(y, n)), larger(r_.origin, largest<T>(z, n)));
      block = loops_.weights(y, z, n, finite(p_), finite(r_));
    }
    sums_.p += static_cast<double>(block.p);
    sums_.r += static_cast<double>(block.r);
    sums_.value += static_cast<double>(block.value);
  }
  inline Softmax<double> p() const { return {static_cast<double>(p_.origin), sums_.p, 0, 0}; }
  inline Softmax<double> r() const { return {static_cast<double>(r_.origin), sums_.r, 0, 0}; }
  // The kind's, of p and r.
  inline double value() const {
    return loops_.shift(sums_, 1 / sums_.p, 1 / sums_.r, -::log(sums_.p), -::log(sums_.r));
  }

 private:
  // Where every logit so far is -inf any origin will do.
  static inline Weights<T> finite(Weights<T> of) {
    if (of.origin == -infinity<T>()) of.origin = 0;
    return of;
  }
  // What logits of -inf weigh, next to nothing, it weighs relative to any.
  static inline double shift(const Weights<T>& of, T origin) {
    const double by = static_cast<double>(of.origin) - static_cast<double>(origin);
    return of.origin == -infinity<T>() ? 0 : by * static_cast<double>(of.factor);
  }
  inline void raise(T origin_p, T origin_r) {
    const double by_p = shift(p_, origin_p), by_r = shift(r_, origin_r);
    const double scale_p = ::exp(by_p), scale_r = ::exp(by_r);
    if (loops_.shift) sums_.value = loops_.shift(sums_, scale_p, scale_r, by_p, by_r);
    sums_.p *= scale_p, sums_.r *= scale_r;
    p_.origin = origin_p, r_.origin = origin_r;
  }

  const SumLoops<Logit, T>& loops_;
  Weights<T> p_, r_;
  WeightSums<double> sums_{};
};

template <class Logit, class T>
inline void store_lse(const LogprobArgs<Logit, T>& args, int64_t index, const Softmax<double>& state, T factor) {
  const double by = static_cast<double>(factor);
  args.lse[index] = static_cast<T>(lse_of(state, by));
  args.lse_rest[index] = static_cast<T>(lse_rest_of(state, by, static_cast<double>(args.lse[index])));
}

// Of whole rows; stores lse and lse_rest of both.
template <class Logit, class T>
inline Sweep<Logit, T> swept_row(const DivergenceArgs<Logit, T>& args, int64_t index, const SumLoops<Logit, T>& loops) {
  const Row<Logit, T> p(args.of, index), r(args.other, index);
  Sweep<Logit, T> sweep(loops, p.transform.factor, r.transform.factor);
  each_block(p, r, [&](int64_t, int64_t n, const auto* y, const auto* z) { sweep.take(y, z, n); });
  store_lse(args.of, index, sweep.p(), p.transform.factor);
  store_lse(args.other, index, sweep.r(), r.transform.factor);
  return sweep;
}

template <class Logit, class T>
inline Diverged<double> sums_of_row(const DivergenceArgs<Logit, T>& args, int64_t index,
                                    const SumLoops<Logit, T>& loops) {
  const Row<Logit, T> p(args.of, index), r(args.other, index);
  const LogProbs<T> of_p(args.of, index), of_r(args.other, index);
  Diverged<double> sums{};
  each_block(p, r, [&](int64_t, int64_t n, const auto* y, const auto* z) {
    const Diverged<T> block = loops.values(y, z, n, of_p, of_r, args.params);
    sums.value += static_cast<double>(block.value);
    sums.by_p += static_cast<double>(block.by_p);
    sums.by_r += static_cast<double>(block.by_r);
  });
  return sums;
}

template <class Logit, class T>
inline void forward_row(const DivergenceArgs<Logit, T>& args, int64_t index, const SumLoops<Logit, T>& loops) {
  Diverged<double> sums;
  if (loops.all_sums_of) {
    sums = loops.all_sums_of(swept_row(args, index, loops).value());
  } else {
    if (!args.statistics_known) swept_row(args, index, loops);
    sums = sums_of_row(args, index, loops);
  }
  // Where a row has no distribution, with a logit of inf or none but -inf, its lse is no number.
  const T odd = (args.of.lse[index] - args.of.lse[index]) + (args.other.lse[index] - args.other.lse[index]);
  args.value[index] = static_cast<T>(sums.value) + odd;
  args.by_p[index] = static_cast<T>(sums.by_p) + odd;
  args.by_r[index] = static_cast<T>(sums.by_r) + odd;
}

template <class Logit, class T>
inline void leave_out(const DivergenceArgs<Logit, T>& args, int64_t index) {
  for (T* out : {args.value, args.by_p, args.by_r, args.of.lse, args.of.lse_rest, args.other.lse, args.other.lse_rest})
    out[index] = 0;
}

}  // namespace

template <class Logit, class T>
bool divergence(const DivergenceArgs<Logit, T>& args, const char* kind, const Threads& threads) {
  const auto of_row = [&](int64_t row, const SumLoops<Logit, T>& loops) {
    if (args.rows && !args.rows[row]) leave_out(args, row);
    else forward_row(args, row, loops);
  };
  return each_row<SumLoops<Logit, T>>(args, kind, threads, of_row, static_cast<Divergences*>(nullptr));
}

template bool divergence(const DivergenceArgs<float, float>&, const char*, const Threads&);
template bool divergence(const DivergenceArgs<double, double>&, const char*, const Threads&);
template bool divergence(const DivergenceArgs<BFloat16, float>&, const char*, const Threads&);
template bool divergence(const DivergenceArgs<Half, float>&, const char*, const Threads&);

}  // namespace tokenrl::cpu::TOKENRL_ISA
