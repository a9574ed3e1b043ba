// The ops by schema, once for both devices, on LibTorch's stable ABI: objective_ops.h and logprob_ops.h implement them.
// With -DTOKENRL_SIM the CPU key runs the CUDA kernels, compiled for the host (csrc/host/): the test-only library
// tokenrl_sim.
#include <torch/csrc/stable/library.h>

#include "divergence_ops.h"
#include "logprob_ops.h"
#include "objective_ops.h"

#ifdef TOKENRL_SIM
#include "host/fibres.h"
#include "introspection.h"

// How many kernels the calling thread has launched.
TOKENRL_EXPORT int64_t tokenrl_launches() { return tokenrl::host::launches(); }
#endif

#ifndef TOKENRL_LIBRARY
#define TOKENRL_LIBRARY tokenrl
#endif

#define TOKENRL_IMPLEMENT(m)                                                         \
  m.impl("objective", TORCH_BOX(&tokenrl::objective));                               \
  m.impl("statistic", TORCH_BOX(&tokenrl::statistic));                               \
  m.impl("statistic_backward", TORCH_BOX(&tokenrl::statistic_backward));             \
  m.impl("position_adaptive_clip", TORCH_BOX(&tokenrl::position_adaptive_clip));     \
  m.impl("aggregation_weights", TORCH_BOX(&tokenrl::aggregation_weights));           \
  m.impl("token_logprobs", TORCH_BOX(&tokenrl::token_logprobs));                     \
  m.impl("token_logprobs_backward", TORCH_BOX(&tokenrl::token_logprobs_backward));   \
  m.impl("token_logprobs_backward_", TORCH_BOX(&tokenrl::token_logprobs_backward_)); \
  m.impl("divergence", TORCH_BOX(&tokenrl::divergence));                             \
  m.impl("divergence_backward", TORCH_BOX(&tokenrl::divergence_backward))

// One more step of expansion: torch's macros paste their argument.
#define TOKENRL_DEFINE(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define TOKENRL_IMPL_FOR(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

TOKENRL_DEFINE(TOKENRL_LIBRARY, m) {
  m.def(
      "objective(Tensor logp, Tensor old_logp, Tensor? advantages, Tensor? mask, Tensor cu_seqlens, Tensor? starts, "
      "Tensor span_weight, Tensor normalizer, Tensor? token_weight, str statistic, str flow, str gate, float[] params, "
      "Tensor?[] param_tensors, float clamp, float cap) -> (Tensor loss, Tensor coef, Tensor metrics)");
  m.def(
      "statistic(Tensor logp, Tensor old_logp, Tensor? mask, Tensor cu_seqlens, Tensor? starts, str statistic, str "
      "flow) -> "
      "Tensor");
  m.def(
      "statistic_backward(Tensor grad, Tensor? mask, Tensor cu_seqlens, Tensor? starts, str statistic, str flow) -> "
      "Tensor");
  m.def(
      "position_adaptive_clip(Tensor log_ratio, Tensor? mask, Tensor cu_seqlens, float[] params, "
      "Tensor?[] param_tensors) -> (Tensor clipped, Tensor inside)");
  m.def(
      "aggregation_weights(Tensor? mask, Tensor cu_seqlens, SymInt num_tokens, Tensor? advantages, Tensor? group_ids, "
      "str span, str unit, float scale) -> (Tensor span_weight, Tensor normalizer)");
#define TRL_TRANSFORM "float temperature, Tensor? temperatures, float softcap, float logit_scale, Tensor? keep_mask"
#define TRL_UPSTREAM "(Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse, Tensor? grad_log_sum_sq_probs, "
#define TRL_SAVED "Tensor ids, Tensor lse, Tensor lse_rest, Tensor entropy, Tensor log_sum_sq_probs, "
  m.def("token_logprobs(Tensor logits, Tensor ids, " TRL_TRANSFORM
        ", str[] outputs, bool inplace_backward) -> (Tensor logp, Tensor entropy, Tensor lse, Tensor lse_rest, "
        "Tensor log_sum_sq_probs, Tensor mean_logit, Tensor max_prob, Tensor is_top1, Tensor rank)");
  m.def("token_logprobs_backward" TRL_UPSTREAM "Tensor logits, " TRL_SAVED TRL_TRANSFORM ") -> Tensor");
  m.def("token_logprobs_backward_" TRL_UPSTREAM "Tensor(a!) logits, " TRL_SAVED TRL_TRANSFORM ") -> ()");
#define TRL_PAIR                                                                                                  \
  "Tensor? rows, " TRL_TRANSFORM                                                                                  \
  ", float other_temperature, Tensor? other_temperatures, float other_softcap, float other_logit_scale, Tensor? " \
  "other_keep_mask, str kind, float[] params"
  m.def("divergence(Tensor logits, Tensor other_logits, Tensor? statistics, " TRL_PAIR
        ") -> (Tensor value, Tensor by_p, Tensor by_r, Tensor statistics)");
  m.def(
      "divergence_backward(Tensor grad, Tensor logits, Tensor other_logits, Tensor by, str of, Tensor "
      "statistics, " TRL_PAIR ") -> Tensor");
}

TOKENRL_IMPL_FOR(TOKENRL_LIBRARY, CPU, m) { TOKENRL_IMPLEMENT(m); }
#ifdef TOKENRL_WITH_CUDA
TOKENRL_IMPL_FOR(TOKENRL_LIBRARY, CUDA, m) { TOKENRL_IMPLEMENT(m); }
#endif
