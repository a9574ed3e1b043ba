// The launchers of preference losses, as those of launch.h.
#pragma once

#include <cstddef>

#include "../preference.h"

namespace tokenrl::cuda {

size_t preference_scratch_bytes(const LinkArgs& links);
// Sets sequences and memory of the links itself.
template <class T>
const char* preference(const PreferenceTokens<T>& tokens, const char* score, const char* link, const LinkArgs& links,
                       void* scratch, void* stream);
template <class T>
const char* preference_backward(const TokenGradients<T>& args, void* stream);

}  // namespace tokenrl::cuda
