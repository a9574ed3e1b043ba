// How the objective is launched: its scratch memory, and around the kernel of the gate that is named the statistic and
// its adjoint.
#pragma once

#include "launch.h"
#include "objective.cuh"

namespace tokenrl::cuda {

template <class T, class... Gate>
bool list_objectives(std::tuple<Gate...>*, const std::string& type) {
  return (list_kernel("objective " + std::string(Gate::name) + " " + type, &objective_kernel<T, Gate>) && ...);
}

template <class T>
size_t objective_scratch_bytes(const Spans& spans) {
  return statistic_scratch<T>(spans) + aligned(num_slots(spans) * sizeof(TileTotals<T>)) +
         aligned(spans.num_tokens * sizeof(T));
}

template <class T>
ObjectiveScratch<T> objective_scratch(void* memory, unsigned* ticket, const Spans& spans) {
  auto* at = static_cast<char*>(memory);
  const auto next = [&](size_t bytes) { return std::exchange(at, at + aligned(bytes)); };
  ObjectiveScratch<T> scratch{};
  scratch.counts = reinterpret_cast<int32_t*>(next(spans.num_tokens * sizeof(int32_t)));
  scratch.sums = reinterpret_cast<Running<T>*>(next(num_slots(spans) * sizeof(Running<T>)));
  scratch.totals = reinterpret_cast<TileTotals<T>*>(next(num_slots(spans) * sizeof(TileTotals<T>)));
  scratch.direct = reinterpret_cast<T*>(next(0));
  scratch.ticket = ticket;
  return scratch;
}

template <class T, class Gate>
bool launch_if_named(const ObjectiveArgs<T>& args, Statistic statistic, bool through, const char* gate,
                     const ObjectiveScratch<T>& scratch, void* stream) {
  if (std::strcmp(Gate::name, gate) != 0) return false;
  ObjectiveKind kind{statistic == Statistic::token, through, through && statistic != Statistic::token, false, false};
  for (int k = 0; k < Gate::num_params; ++k) kind.params_per_token |= args.params[k].tensor != nullptr;
  kind.aligned = are_aligned(args.spans, args.logp, args.old_logp, args.coef, scratch.counts, scratch.direct,
                             args.token_weight, args.advantages_per_token ? args.advantages : nullptr);
  StatisticRun<T> run{
      {args.spans, args.logp, args.old_logp, args.coef}, args.clamp, scratch.counts, scratch.sums, {}, false};
  // Of a token alone a gate may still ask for the position, which a prefix counts.
  if (!kind.is_token) launch_statistic(run, statistic, false, stream);
  else if (Gate::positional) launch_statistic(run, Statistic::prefix_sum, false, stream);
  const bool apart = are_tiles_apart(args.spans);
  TRL_LAUNCH((objective_kernel<T, Gate>), blocks_of(args.spans, apart), kThreads, 0, stream, args, scratch, kind,
             apart);
  if (!kind.spreads_back) return true;
  run.args.input = args.coef, run.args.input2 = nullptr;
  run.own = {args.logp, args.old_logp, scratch.direct};
  launch_statistic(run, statistic, true, stream);
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
  if (!launch_named(static_cast<TOKENRL_GATES*>(nullptr), args, statistic, through, gate, scratch, stream))
    return "no gate of that name";
  return launch_error();
}

}  // namespace tokenrl::cuda
