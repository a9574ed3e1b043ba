// The table of gates: one functor each, the loss of one token and its partials. Formulas and sources:
// tokenrl/objectives/gates/. Each derivative stands on the line after its value.
#pragma once

#include "adaptive.h"
#include "bounded.h"
#include "kl.h"
#include "weighted.h"

namespace tokenrl {

using Gates = std::tuple<Ratio, PpoClip, PpoNtp, LogBand, Sapo, Cfpo, SppoToken, PrimeRl, Dhpo, DhpoBranch, Hapo, Cispo,
                         Reinforce, Rec, Quadratic, Topr, Vespo, Dppo, DppoTv, DppoKl, KlK1, KlAbs, KlK2, KlK3,
                         KlK1Unbiased, KlAbsUnbiased, KlK3Unbiased, Identity>;

inline constexpr int kMaxParams = most_params(static_cast<Gates*>(nullptr));

// The gates that the objective is compiled for: all, unless a build names a tuple of others or of a few.
#ifndef TOKENRL_GATES
#define TOKENRL_GATES Gates
#endif

}  // namespace tokenrl
