// How the objective is launched: its scratch memory, and the kernel of the gate that is named.
#pragma once

#include "launch.h"
#include "objective.cuh"

namespace tokenrl::cuda {

template <class T, class... Gate>
bool list_objectives(std::tuple<Gate...>*, const std::string& type) {
  return (list_kernel("objective " + std::string(Gate::name) + " " + type, &objective_kernel<T, Gate>) && ...);
}

inline size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

template <class T>
size_t objective_scratch_bytes(int64_t num_tokens, int64_t num_sequences) {
  return aligned(num_sequences * sizeof(SequenceTotals<T>)) + aligned(num_tokens * sizeof(T)) +
         aligned(num_tokens * sizeof(int32_t));
}

template <class T>
ObjectiveScratch<T> objective_scratch(void* memory, unsigned* ticket, const Spans& spans) {
  auto* at = static_cast<char*>(memory);
  ObjectiveScratch<T> scratch;
  scratch.ticket = ticket;
  scratch.totals = reinterpret_cast<SequenceTotals<T>*>(at);
  scratch.direct = reinterpret_cast<T*>(at += aligned(spans.num_sequences * sizeof(SequenceTotals<T>)));
  scratch.counts = reinterpret_cast<int32_t*>(at += aligned(spans.num_tokens * sizeof(T)));
  return scratch;
}

template <class T, class Gate>
bool launch_if_named(const ObjectiveArgs<T>& args, Statistic statistic, bool through, const char* gate,
                     const ObjectiveScratch<T>& scratch, void* stream) {
  if (std::strcmp(Gate::name, gate) != 0) return false;
  TRL_LAUNCH((objective_kernel<T, Gate>), blocks_of(args.spans), kThreads, 0, stream, args, scratch, statistic,
             through);
  return true;
}

template <class T, class... Gate>
bool launch_named(std::tuple<Gate...>*, const ObjectiveArgs<T>& args, Statistic statistic, bool through,
                  const char* gate, const ObjectiveScratch<T>& scratch, void* stream) {
  return (launch_if_named<T, Gate>(args, statistic, through, gate, scratch, stream) || ...);
}

template <class T>
const char* objective(const ObjectiveArgs<T>& args, Statistic statistic, bool through, const char* gate, void* memory,
                      unsigned* ticket, void* stream) {
  const auto scratch = objective_scratch<T>(memory, ticket, args.spans);
  if (!launch_named(static_cast<Gates*>(nullptr), args, statistic, through, gate, scratch, stream))
    return "no gate of that name";
  return launch_error();
}

}  // namespace tokenrl::cuda
