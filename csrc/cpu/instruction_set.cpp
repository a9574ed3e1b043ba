// Which instruction set the kernels run on: those compiled once for each are handed on to the one in use.
#include <algorithm>
#include <cstdlib>

#include "../introspection.h"
#include "added_gates.h"
#include "kernels.h"

namespace tokenrl::cpu {
namespace {

Isa widest() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

}  // namespace

Isa instruction_set() {
  static const Isa chosen = [] {
    const char* named = std::getenv("TOKENRL_CPU_ISA");
    const int found = named ? find_name(kIsas, named) : -1;
    return found < 0 ? widest() : std::min(widest(), static_cast<Isa>(found));
  }();
  return chosen;
}

#ifdef __x86_64__
#define TOKENRL_BY_ISA(call)                   \
  switch (instruction_set()) {                 \
    case Isa::avx512: return avx512::call;     \
    case Isa::avx2: return avx2::call;         \
    case Isa::portable: return portable::call; \
  }                                            \
  return portable::call
#else
#define TOKENRL_BY_ISA(call) return portable::call
#endif

template <class T>
bool objective(const ObjectiveArgs<T>& args, Statistic statistic, bool through, const char* gate,
               const Threads& threads) {
  if (const AddedGate* added = added_gate(gate)) {
    if constexpr (std::is_same_v<T, float>) return added->of_floats(args, statistic, through, gate, threads);
    else return added->of_doubles(args, statistic, through, gate, threads);
  }
  TOKENRL_BY_ISA(objective(args, statistic, through, gate, threads));
}
template <class Logit, class T>
void token_logprobs(const LogprobArgs<Logit, T>& args, const Threads& threads) {
  TOKENRL_BY_ISA(token_logprobs(args, threads));
}
template <class Logit, class T>
void token_logprobs_backward(const LogprobArgs<Logit, T>& args, const Threads& threads) {
  TOKENRL_BY_ISA(token_logprobs_backward(args, threads));
}
template <class Logit, class T>
bool divergence(const DivergenceArgs<Logit, T>& args, const char* kind, const Threads& threads) {
  TOKENRL_BY_ISA(divergence(args, kind, threads));
}
template <class Logit, class T>
bool divergence_backward(const DivergenceArgs<Logit, T>& args, const char* kind, const Threads& threads) {
  TOKENRL_BY_ISA(divergence_backward(args, kind, threads));
}
uint64_t sum_words(const uint64_t* words, int64_t n) { TOKENRL_BY_ISA(sum_words(words, n)); }
float sum_exponentials(const float* values, int64_t n, int64_t rounds) {
  TOKENRL_BY_ISA(sum_exponentials(values, n, rounds));
}

template bool objective(const ObjectiveArgs<float>&, Statistic, bool, const char*, const Threads&);
template bool objective(const ObjectiveArgs<double>&, Statistic, bool, const char*, const Threads&);
#define TOKENRL_INSTANTIATE(Logit, T)                                                     \
  template void token_logprobs(const LogprobArgs<Logit, T>&, const Threads&);             \
  template void token_logprobs_backward(const LogprobArgs<Logit, T>&, const Threads&);    \
  template bool divergence(const DivergenceArgs<Logit, T>&, const char*, const Threads&); \
  template bool divergence_backward(const DivergenceArgs<Logit, T>&, const char*, const Threads&);
TOKENRL_INSTANTIATE(float, float)
TOKENRL_INSTANTIATE(double, double)
TOKENRL_INSTANTIATE(BFloat16, float)
TOKENRL_INSTANTIATE(Half, float)

}  // namespace tokenrl::cpu

const char* tokenrl_instruction_set() { return tokenrl::cpu::kIsas[static_cast<int>(tokenrl::cpu::instruction_set())]; }
