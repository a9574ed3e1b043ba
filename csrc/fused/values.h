// What a gate gives of single tokens, without an objective around it.
#pragma once

#include "../gates/base.h"

namespace tokenrl::fused {

// Of n tokens. given: s, x, logp, advantages, t; out: value, d_s, d_logp, low, high, dual; [n] each.
template <class Gate, class T>
void gate_values(const T* const* given, const double* params, int64_t n, T* const* out) {
  const auto of_gate = params_from<Gate, T>([&](size_t k) { return static_cast<T>(params[k]); });
  for (int64_t i = 0; i < n; ++i) {
    const GateInput<T> in{given[0][i], given[1][i], given[2][i], given[3][i], given[4][i]};
    const Gated<T> g = Gate::eval(in, of_gate);
    const T row[] = {g.value, g.d_s, g.d_logp, g.low, g.high, g.dual};
    for (int k = 0; k < 6; ++k) out[k][i] = row[k];
  }
}

}  // namespace tokenrl::fused
