// The CPU kernels of the objective of one gate, as a library: tokenrl/fusion/ writes the gate and compiles this, with
// the flags of csrc/cpu/objective.cpp, for the machine's own instruction set. TOKENRL_FUSED_GATE: the file that defines
// tokenrl::fused::Gate.
#define TOKENRL_GATES fused::Gates
#include "../gates/table.h"
#include "functions.h"
#include "values.h"
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

#include "../cpu/added_gates.h"
#include "../cpu/objective.cpp"
#include "../cpu/threads.cpp"
#include "../introspection.h"

namespace tokenrl::fused {
namespace {

const cpu::AddedGate kGate{Gate::name, Gate::num_params, cpu::kBytesOfArguments, &cpu::TOKENRL_ISA::objective<float>,
                           &cpu::TOKENRL_ISA::objective<double>};

}  // namespace
}  // namespace tokenrl::fused

TOKENRL_EXPORT const void* tokenrl_fused_gate() { return &tokenrl::fused::kGate; }
TOKENRL_EXPORT void tokenrl_fused_values_float(const float* const* given, const double* params, int64_t n,
                                               float* const* out) {
  tokenrl::fused::gate_values<tokenrl::fused::Gate>(given, params, n, out);
}
TOKENRL_EXPORT void tokenrl_fused_values_double(const double* const* given, const double* params, int64_t n,
                                                double* const* out) {
  tokenrl::fused::gate_values<tokenrl::fused::Gate>(given, params, n, out);
}
