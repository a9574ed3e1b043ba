// The CPU kernels of the objective of one gate, as a library: tokenrl/fusion/ writes the gate and compiles this, with
// the flags of csrc/cpu/objective.cpp, for the machine's own instruction set. TOKENRL_FUSED_GATE: the file that defines
// tokenrl::fused::Gate.
#include "../gates/table.h"
#include "functions.h"
#include TOKENRL_FUSED_GATE

namespace tokenrl {
namespace fused {
using Gates = std::tuple<Gate>;
}
// Such gates take the position itself.
template <>
TRL_HD float position_power<fused::Gate>(float t, const fused::Gate::Params<float>&) {
  return t;
}
template <>
TRL_HD double position_power<fused::Gate>(double t, const fused::Gate::Params<double>&) {
  return t;
}
}  // namespace tokenrl

#define TOKENRL_GATES fused::Gates
#include "../cpu/added_gates.h"
#include "../cpu/objective.cpp"
#include "../cpu/threads.cpp"
#include "../introspection.h"

namespace tokenrl::fused {
namespace {

// The gate of n single tokens. given: s, x, logp, advantages, t; out: value, d_s, d_logp, low, high, dual; [n] each.
template <class T>
void gate_values(const T* const* given, const double* params, int64_t n, T* const* out) {
  const auto of_gate = params_from<Gate, T>([&](size_t k) { return static_cast<T>(params[k]); });
  for (int64_t i = 0; i < n; ++i) {
    const GateInput<T> in{given[0][i], given[1][i], given[2][i], given[3][i], given[4][i]};
    const Gated<T> g = Gate::eval(in, of_gate);
    const T row[] = {g.value, g.d_s, g.d_logp, g.low, g.high, g.dual};
    for (int k = 0; k < 6; ++k) out[k][i] = row[k];
  }
}

const cpu::AddedGate kGate{Gate::name, Gate::num_params, cpu::kBytesOfArguments, &cpu::TOKENRL_ISA::objective<float>,
                           &cpu::TOKENRL_ISA::objective<double>};

}  // namespace
}  // namespace tokenrl::fused

TOKENRL_EXPORT const void* tokenrl_fused_gate() { return &tokenrl::fused::kGate; }
TOKENRL_EXPORT void tokenrl_fused_values_float(const float* const* given, const double* params, int64_t n,
                                               float* const* out) {
  tokenrl::fused::gate_values(given, params, n, out);
}
TOKENRL_EXPORT void tokenrl_fused_values_double(const double* const* given, const double* params, int64_t n,
                                                double* const* out) {
  tokenrl::fused::gate_values(given, params, n, out);
}
