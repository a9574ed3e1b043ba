// The CPU kernels of preference losses. Sums and shares of tokens are compiled once per instruction set, as those of
// kernels.h.
#pragma once

#include "../preference.h"
#include "kernels.h"

namespace tokenrl::cpu {

#define TOKENRL_PREFERENCE_KERNELS                                                                   \
  template <class T>                                                                                 \
  void sequence_sums(const PreferenceTokens<T>& tokens, SequenceSums* sums, const Threads& threads); \
  template <class T>                                                                                 \
  void preference_backward(const TokenGradients<T>& args, const Threads& threads);

namespace portable {
TOKENRL_PREFERENCE_KERNELS
}
#ifdef __x86_64__
namespace avx2 {
TOKENRL_PREFERENCE_KERNELS
}
namespace avx512 {
TOKENRL_PREFERENCE_KERNELS
}
#endif
// On the instruction set in use.
TOKENRL_PREFERENCE_KERNELS
#undef TOKENRL_PREFERENCE_KERNELS

// False when there is no score or no link of that name. Sets sequences and memory of the links itself.
template <class T>
bool preference(const PreferenceTokens<T>& tokens, const char* score, const char* link, LinkArgs links,
                const Threads& threads);

}  // namespace tokenrl::cpu
