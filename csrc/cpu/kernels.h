// The CPU kernels. Those of TOKENRL_CPU_KERNELS are compiled once per instruction set, each time in a namespace of its
// own.
#pragma once

#include "../kernels.h"
#include "../statistics.h"
#include "../vocabulary.h"

namespace tokenrl::cpu {

// How a kernel gets its threads: body(context, begin, end) over disjoint ranges of [0, n) of at least `grain` each.
struct Threads {
  void (*run)(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
};

// Runs it: the first exception of a body leaves this call, and not its thread. Subnormal results are 0 in the bodies,
// where a processor takes a hundred times as long for them.
void run(const Threads& threads, int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

template <class F>
inline void parallel(const Threads& threads, int64_t n, int64_t grain, F&& f) {
  run(
      threads, n, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); },
      &f);
}

// The objective is false when there is no gate of that name, a divergence when there is no such kind. The sums are what
// machine_limits.cpp measures.
#define TOKENRL_CPU_KERNELS                                                                                 \
  template <class T>                                                                                        \
  bool objective(const ObjectiveArgs<T>& args, Statistic statistic, bool through, const char* gate,         \
                 const Threads& threads);                                                                   \
  template <class Logit, class T>                                                                           \
  void token_logprobs(const LogprobArgs<Logit, T>& args, const Threads& threads);                           \
  template <class Logit, class T>                                                                           \
  void token_logprobs_backward(const LogprobArgs<Logit, T>& args, const Threads& threads);                  \
  template <class Logit, class T>                                                                           \
  bool divergence(const DivergenceArgs<Logit, T>& args, const char* kind, const Threads& threads);          \
  template <class Logit, class T>                                                                           \
  bool divergence_backward(const DivergenceArgs<Logit, T>& args, const char* kind, const Threads& threads); \
  uint64_t sum_words(const uint64_t* words, int64_t n);                                                     \
  float sum_exponentials(const float* values, int64_t n, int64_t rounds);

namespace portable {
TOKENRL_CPU_KERNELS
}
#ifdef __x86_64__
namespace avx2 {
TOKENRL_CPU_KERNELS
}
namespace avx512 {
TOKENRL_CPU_KERNELS
}
#endif
// On the instruction set in use.
TOKENRL_CPU_KERNELS
#undef TOKENRL_CPU_KERNELS

enum class Isa { portable, avx2, avx512 };
inline constexpr const char* kIsas[] = {"portable", "avx2", "avx512"};

// The widest instruction set of this CPU, or the one that TOKENRL_CPU_ISA names; read once.
Isa instruction_set();

// For flow "local" and for the minima, whose adjoints are the mask, ask for the statistic `token` of the gradient.
template <class T>
void statistic(const StatisticArgs<T>& args, Statistic statistic, bool adjoint, const Threads& threads);
template <class T>
void position_adaptive_clip(const ClipArgs<T>& args, const Threads& threads);
void aggregation_weights(const WeightArgs& args, Span span, Unit unit, const Threads& threads);

}  // namespace tokenrl::cpu
