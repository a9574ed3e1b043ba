// The table of gates: one functor each, the loss of one token and its partials. Formulas and sources:
// tokenrl/objectives/gates/. Each derivative stands on the line after its value.
#pragma once

#include <tuple>

#include "adaptive.h"
#include "bounded.h"
#include "kl.h"
#include "weighted.h"

namespace tokenrl {

using Gates =
    std::tuple<Ratio, PpoClip, PpoNtp, LogBand, Sapo, Dhpo, DhpoBranch, Hapo, Cispo, Reinforce, Quadratic, Topr, Vespo,
               Dppo, DppoTv, DppoKl, KlK1, KlAbs, KlK2, KlK3, KlK1Unbiased, KlAbsUnbiased, KlK3Unbiased, Identity>;

template <class... Gate>
constexpr int most_params(std::tuple<Gate...>*) {
  int most = 0;
  ((most = Gate::num_params > most ? Gate::num_params : most), ...);
  return most;
}
inline constexpr int kMaxParams = most_params(static_cast<Gates*>(nullptr));

}  // namespace tokenrl
