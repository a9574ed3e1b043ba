// The gradient of either head's logits: both are read once, one is written once.
// Compiled once per instruction set (TOKENRL_ISA): nothing here may leave a linkable copy of a shared function behind.
#include "pair_row.h"

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

// dz = scale (by_p - p by), or with by_r and r of the other head; it has room for whole steps.
template <class Kind, bool kOfOther, class Stored, class T>
__attribute__((noinline)) void gradient_block(const Stored* y, const Stored* z, int64_t n, const LogProbs<T> of_p,
                                              const LogProbs<T> of_r, const T* given, T scale, T by, T* dz) {
  const ParamsOf<Kind, T> params = params_of<Kind>(given);
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

template <class Logit, class T>
struct GradientLoops {
  using Loop = OfBlock<Logit, T, void, LogProbs<T>, LogProbs<T>, const T*, T, T, T*>;
  Loop of_p, of_r;

  template <class Kind>
  static GradientLoops of() {
    using Stored = Read<Logit, T>;
    return {{&gradient_block<Kind, false, Stored, T>, &gradient_block<Kind, false, T, T>},
            {&gradient_block<Kind, true, Stored, T>, &gradient_block<Kind, true, T, T>}};
  }
};

template <class Logit, class T>
inline void backward_row(const DivergenceArgs<Logit, T>& args, int64_t index, const GradientLoops<Logit, T>& loops) {
  const Row<Logit, T> p(args.of, index), r(args.other, index);
  const LogProbs<T> of_p(args.of, index), of_r(args.other, index);
  const bool of_other = args.of_other;
  const RowTransform<T> transform = (of_other ? r : p).transform;
  const T by = args.by[index], scale = args.grad[index] * transform.factor;
  Logit* out = p.grad();
  each_block(p, r, [&](int64_t first, int64_t n, const auto* y, const auto* z) {
    T dz[kBlock];
    (of_other ? loops.of_r : loops.of_p)(y, z, n, of_p, of_r, args.params, scale, by, dz);
    if (transform.capped) {
      const RowTransform<T> local = transform;
      const auto* own = of_other ? z : y;
#pragma omp simd
      for (int64_t v = 0; v < n; ++v) dz[v] *= local.slope(static_cast<T>(widen(own[v])));
    }
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) out[first + v] = narrow<Logit>(dz[v]);
  });
}

}  // namespace

template <class Logit, class T>
bool divergence_backward(const DivergenceArgs<Logit, T>& args, const char* kind, const Threads& threads) {
  const auto of_row = [&](int64_t row, const GradientLoops<Logit, T>& loops) {
    if ((args.rows && !args.rows[row]) || args.grad[row] == 0) {
      const size_t bytes = sizeof(Logit) * static_cast<size_t>(args.of.vocab);
      std::memset(static_cast<void*>(Row<Logit, T>(args.of, row).grad()), 0, bytes);
    } else {
      backward_row(args, row, loops);
    }
  };
  return each_row<GradientLoops<Logit, T>>(args, kind, threads, of_row, static_cast<Divergences*>(nullptr));
}

template bool divergence_backward(const DivergenceArgs<float, float>&, const char*, const Threads&);
template bool divergence_backward(const DivergenceArgs<double, double>&, const char*, const Threads&);
template bool divergence_backward(const DivergenceArgs<BFloat16, float>&, const char*, const Threads&);
template bool divergence_backward(const DivergenceArgs<Half, float>&, const char*, const Threads&);

}  // namespace tokenrl::cpu::TOKENRL_ISA
