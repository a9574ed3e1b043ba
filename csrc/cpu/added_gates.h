// Gates that are not in the table: their kernels come from libraries of their own (csrc/fused/library.cpp).
#pragma once

#include "kernels.h"

namespace tokenrl::cpu {

// The kernels of one gate, as TOKENRL_CPU_KERNELS has them.
struct AddedGate {
  template <class T>
  using Objective = bool (*)(const ObjectiveArgs<T>&, Statistic, bool through, const char* gate, const Threads&);

  const char* name;
  int num_params;
  int64_t bytes_of_arguments;  // kBytesOfArguments of whoever made the kernels
  Objective<float> of_floats;
  Objective<double> of_doubles;
};
inline constexpr int64_t kBytesOfArguments = sizeof(ObjectiveArgs<float>) * 4096 + sizeof(Spans) * 64 + kNumMetrics;

// The gate of that name that was added last, or null.
const AddedGate* added_gate(const char* name);

}  // namespace tokenrl::cpu
