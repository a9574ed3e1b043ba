// The ops: schemas, argument checks and allocation, once for both devices, on LibTorch's stable ABI.
// With -DTOKENRL_SIM the CPU key runs the CUDA kernels, compiled for the host (csrc/host/): the test-only library tokenrl_sim.
#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "devices.h"

#ifndef TOKENRL_LIBRARY
#define TOKENRL_LIBRARY tokenrl
#endif

namespace tokenrl {
namespace {

std::tuple<Tensor, Tensor, Tensor> objective(
    const Tensor& logp, const Tensor& old_logp, const Optional& advantages, const Optional& mask, const Tensor& cu_seqlens,
    const Optional& starts, const Tensor& span_weight, const Tensor& normalizer, const Optional& token_weight,
    const std::string& statistic, const std::string& flow, const std::string& gate, const std::vector<double>& params,
    const std::vector<Optional>& param_tensors, double clamp, double cap) {
  const ScalarType dtype = logp.scalar_type();
  const int64_t n = logp.numel();
  const Spans spans = spans_of(mask, cu_seqlens, starts, n);
  const auto which = static_cast<Statistic>(named(kStatistics, statistic, "statistic"));
  const bool through = is_through(flow);
  STD_TORCH_CHECK(!through || which != Statistic::prefix_min, "flow: got 'through' for prefix_min, accepted: local.");
  const size_t num_params = num_params_of(static_cast<Gates*>(nullptr), gate);
  check(cu_seqlens, "cu_seqlens", ScalarType::Long, spans.num_sequences + 1, logp);
  check(span_weight, "span_weight", ScalarType::Double, spans.num_sequences, logp);
  check(normalizer, "normalizer", ScalarType::Double, 1, logp);
  const bool per_token = advantages && advantages->numel() == n;
  return by_precision(logp, "logp", [&](auto precision) {
    using T = decltype(precision);
    Tensor loss = empty(logp, {}, dtype), coef = empty(logp, {n}, dtype), metrics = empty(logp, {kNumMetrics}, dtype);
    check(logp, "logp", dtype, n, logp);
    check(old_logp, "old_logp", dtype, n, logp);
    ObjectiveArgs<T> args{};
    args.spans = spans;
    args.logp = pointer<T>(logp);
    args.old_logp = pointer<T>(old_logp);
    args.advantages = checked<T>(advantages, "advantages", dtype, per_token ? n : spans.num_sequences, logp);
    args.advantages_per_token = per_token;
    args.span_weight = pointer<double>(span_weight);
    args.normalizer = pointer<double>(normalizer);
    args.token_weight = checked<T>(token_weight, "token_weight", dtype, n, logp);
    fill_params(args.params, num_params, params, param_tensors, n, logp);
    args.clamp = static_cast<T>(clamp);
    args.cap = static_cast<T>(cap);
    args.loss = output<T>(loss);
    args.coef = output<T>(coef);
    args.metrics = output<T>(metrics);
    on_device_of(logp, [&](const auto& device) { device.objective(args, which, through, gate.c_str()); });
    return std::make_tuple(loss, coef, metrics);
  });
}

Tensor run_statistic(const Tensor& input, const Tensor* input2, const Optional& mask, const Tensor& cu_seqlens,
                     const Optional& starts, Statistic statistic, bool adjoint) {
  const int64_t n = input.numel();
  return by_precision(input, "logp", [&](auto precision) {
    using T = decltype(precision);
    check(input, "logp", input.scalar_type(), n, cu_seqlens);
    if (input2) check(*input2, "old_logp", input.scalar_type(), n, input);
    Tensor out = empty(input, {n}, input.scalar_type());
    const StatisticArgs<T> args{spans_of(mask, cu_seqlens, starts, n), pointer<T>(input), input2 ? pointer<T>(*input2) : nullptr,
                                output<T>(out)};
    on_device_of(input, [&](const auto& device) { device.statistic(args, statistic, adjoint); });
    return out;
  });
}

Tensor statistic(const Tensor& logp, const Tensor& old_logp, const Optional& mask, const Tensor& cu_seqlens, const Optional& starts,
                 const std::string& statistic) {
  const auto which = static_cast<Statistic>(named(kStatistics, statistic, "statistic"));
  return run_statistic(logp, &old_logp, mask, cu_seqlens, starts, which, false);
}

Tensor statistic_backward(const Tensor& grad, const Optional& mask, const Tensor& cu_seqlens, const Optional& starts,
                          const std::string& statistic, const std::string& flow) {
  const auto which = static_cast<Statistic>(named(kStatistics, statistic, "statistic"));
  const bool masked = !is_through(flow) || which == Statistic::prefix_min || which == Statistic::token;
  return run_statistic(grad, nullptr, mask, cu_seqlens, starts, masked ? Statistic::token : which, !masked);
}

std::tuple<Tensor, Tensor> position_adaptive_clip(const Tensor& log_ratio, const Optional& mask, const Tensor& cu_seqlens,
                                                  const std::vector<double>& params, const std::vector<Optional>& param_tensors) {
  const int64_t n = log_ratio.numel();
  const ScalarType dtype = log_ratio.scalar_type();
  return by_precision(log_ratio, "log_ratio", [&](auto precision) {
    using T = decltype(precision);
    check(log_ratio, "log_ratio", dtype, n, cu_seqlens);
    Tensor clipped = empty(log_ratio, {n}, dtype), inside = empty(log_ratio, {n}, dtype);
    BandArgs<T> args{};
    args.spans = spans_of(mask, cu_seqlens, std::nullopt, n);
    args.log_ratio = pointer<T>(log_ratio);
    fill_params(args.params, 3, params, param_tensors, n, log_ratio);
    args.clipped = output<T>(clipped);
    args.inside = output<T>(inside);
    on_device_of(log_ratio, [&](const auto& device) { device.position_adaptive_clip(args); });
    return std::make_tuple(clipped, inside);
  });
}

std::tuple<Tensor, Tensor> aggregation_weights(const Optional& mask, const Tensor& cu_seqlens, int64_t num_tokens,
                                               const Optional& advantages, const Optional& group_ids, const std::string& span,
                                               const std::string& unit) {
  WeightArgs args{};
  args.spans = spans_of(mask, cu_seqlens, std::nullopt, num_tokens);
  const auto which = static_cast<Span>(named(kSpans, span, "span"));
  const auto counted = static_cast<Unit>(named(kUnits, unit, "unit"));
  const bool by_group = which == Span::group || which == Span::balanced || counted == Unit::groups;
  STD_TORCH_CHECK(!by_group || group_ids, "group_ids: got none; span '", span, "' with unit '", unit, "' needs them.");
  STD_TORCH_CHECK(which != Span::balanced || advantages, "advantages: got none; span 'balanced' needs them.");
  args.group_ids = checked<int64_t>(group_ids, "group_ids", ScalarType::Long, args.spans.num_sequences, cu_seqlens);
  if (advantages) {
    args.advantages_double = advantages->scalar_type() == ScalarType::Double;
    args.advantages_per_token = advantages->numel() == num_tokens;
    const int64_t expected = args.advantages_per_token ? num_tokens : args.spans.num_sequences;
    check(*advantages, "advantages", args.advantages_double ? ScalarType::Double : ScalarType::Float, expected, cu_seqlens);
    args.advantages = advantages->data_ptr();
  }
  Tensor span_weight = empty(cu_seqlens, {args.spans.num_sequences}, ScalarType::Double);
  Tensor count = torch::stable::new_zeros(cu_seqlens, {}, ScalarType::Long);
  args.span_weight = output<double>(span_weight);
  args.count = output<int64_t>(count);
  if (args.spans.num_sequences > 0) on_device_of(cu_seqlens, [&](const auto& device) { device.aggregation_weights(args, which, counted); });
  return std::make_tuple(span_weight, count);
}

// f(Logit{}, T{}): how the logits are stored, and the precision of everything derived from them.
template <class F>
void by_logit(const Tensor& logits, F&& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(BFloat16{}, float{});
    case ScalarType::Half: return f(Half{}, float{});
    default:
      STD_TORCH_CHECK(false, "logits: got ", dtype_name(logits.scalar_type()), ", expected bfloat16, float16, float32 or float64.");
  }
}

// How the model's logits become the ones of the softmax: the arguments of the ops, in their order.
struct TransformOptions {
  double temperature;
  const Optional& temperatures;
  double softcap, logit_scale;
  const Optional& keep_mask;
};

void check_strided(const Tensor& x, const char* name, const Tensor& logits) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == logits.size(0) && x.size(1) == logits.size(1) && x.size(2) == logits.size(2),
                  name, ": expected [B, T, V].");
  STD_TORCH_CHECK(x.stride(2) == 1 || x.size(2) == 1, name, ": the last stride must be 1.");
}

template <class Logit, class T>
LogprobArgs<Logit, T> logprob_args(const Tensor& logits, const Tensor& ids, const TransformOptions& options) {
  check_strided(logits, "logits", logits);
  STD_TORCH_CHECK(logits.size(2) >= 1, "logits: expected V >= 1.");
  STD_TORCH_CHECK(ids.dim() == 3 && ids.size(0) == logits.size(0) && ids.size(1) == logits.size(1) && ids.size(2) >= 1,
                  "ids: expected [B, T, K] for logits [B, T, V].");
  check(ids, "ids", ScalarType::Long, ids.numel(), logits);
  LogprobArgs<Logit, T> args{};
  args.batch = logits.size(0), args.time = logits.size(1), args.vocab = logits.size(2), args.num_ids = ids.size(2);
  args.stride_batch = logits.stride(0), args.stride_time = logits.stride(1);
  args.logits = pointer<Logit>(logits);
  args.ids = pointer<int64_t>(ids);
  Transform<T>& transform = args.transform;
  transform.temperature = static_cast<T>(options.temperature);
  transform.softcap = static_cast<T>(options.softcap);
  transform.logit_scale = static_cast<T>(options.logit_scale);
  const ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  transform.temperatures = checked<T>(options.temperatures, "temperatures", dtype, args.batch * args.time, logits);
  if (options.keep_mask) {
    const Tensor& keep = *options.keep_mask;
    check_strided(keep, "keep_mask", logits);
    STD_TORCH_CHECK(keep.scalar_type() == ScalarType::Bool, "keep_mask: expected bool.");
    transform.keep = pointer<bool>(keep);
    transform.keep_stride_batch = keep.stride(0), transform.keep_stride_time = keep.stride(1);
  }
  return args;
}

ScalarType precision_of(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The results of token_logprobs; those that were not asked for are empty.
struct LogprobResults {
  Tensor logp, entropy, lse, lse_rest, log_sum_sq_probs, mean_logit, max_prob, is_top1, rank;

  LogprobResults(const Tensor& ids, ScalarType dtype, const std::vector<std::string>& outputs)
      : logp(empty(ids, sizes(ids), dtype)), entropy(empty(ids, rows(ids), dtype)), lse(empty(ids, rows(ids), dtype)),
        lse_rest(empty(ids, rows(ids), dtype)),
        log_sum_sq_probs(made(outputs, "log_sum_sq_probs", ids, rows(ids), dtype)),
        mean_logit(made(outputs, "mean_logit", ids, rows(ids), dtype)), max_prob(made(outputs, "max_prob", ids, rows(ids), dtype)),
        is_top1(made(outputs, "is_top1", ids, sizes(ids), ScalarType::Bool)),
        rank(made(outputs, "rank", ids, sizes(ids), ScalarType::Long)) {}

  static Sizes rows(const Tensor& ids) { return {ids.size(0), ids.size(1)}; }
  static Sizes sizes(const Tensor& ids) { return {ids.size(0), ids.size(1), ids.size(2)}; }
  static Tensor made(const std::vector<std::string>& outputs, const char* name, const Tensor& ids, const Sizes& sizes,
                     ScalarType dtype) {
    const bool wanted = std::find(outputs.begin(), outputs.end(), name) != outputs.end();
    return empty(ids, wanted ? sizes : Sizes{0}, dtype);
  }
};

template <class T>
T* output_or_null(const Tensor& x) {
  return x.numel() > 0 ? output<T>(x) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_logprobs(
    const Tensor& logits, const Tensor& ids, double temperature, const Optional& temperatures, double softcap, double logit_scale,
    const Optional& keep_mask, const std::vector<std::string>& outputs, bool /* inplace_backward: for the derivative */) {
  const LogprobResults results(ids, precision_of(logits), outputs);
  by_logit(logits, [&](auto logit, auto precision) {
    using T = decltype(precision);
    auto args = logprob_args<decltype(logit), T>(logits, ids, {temperature, temperatures, softcap, logit_scale, keep_mask});
    args.logp = output<T>(results.logp);
    args.entropy = output<T>(results.entropy);
    args.lse = output<T>(results.lse);
    args.lse_rest = output<T>(results.lse_rest);
    args.log_sum_sq_probs = output_or_null<T>(results.log_sum_sq_probs);
    args.mean_logit = output_or_null<T>(results.mean_logit);
    args.max_prob = output_or_null<T>(results.max_prob);
    args.is_top1 = output_or_null<bool>(results.is_top1);
    args.rank = output_or_null<int64_t>(results.rank);
    if (ids.numel() > 0) on_device_of(logits, [&](const auto& device) { device.token_logprobs(args); });
  });
  const LogprobResults& r = results;
  return std::make_tuple(r.logp, r.entropy, r.lse, r.lse_rest, r.log_sum_sq_probs, r.mean_logit, r.max_prob, r.is_top1, r.rank);
}

// The upstream gradients and what the forward saved, as the ops' arguments order them.
struct LogprobBackward {
  const Optional &logp, &entropy, &lse, &log_sum_sq_probs;
  const Tensor &ids, &saved_lse, &saved_lse_rest, &saved_entropy, &saved_log_sum_sq_probs;
};

void run_logprobs_backward(const Tensor& logits, const Tensor& grad, const LogprobBackward& given, const TransformOptions& options) {
  const ScalarType dtype = precision_of(logits);
  by_logit(logits, [&](auto logit, auto precision) {
    using T = decltype(precision);
    auto args = logprob_args<decltype(logit), T>(logits, given.ids, options);
    const int64_t rows = args.batch * args.time;
    check(given.saved_lse, "lse", dtype, rows, logits);
    check(given.saved_lse_rest, "lse_rest", dtype, rows, logits);
    check(given.saved_entropy, "entropy", dtype, rows, logits);
    check(given.saved_log_sum_sq_probs, "log_sum_sq_probs", dtype, given.log_sum_sq_probs ? rows : given.saved_log_sum_sq_probs.numel(), logits);
    args.lse = output<T>(given.saved_lse);
    args.lse_rest = output<T>(given.saved_lse_rest);
    args.entropy = output<T>(given.saved_entropy);
    args.log_sum_sq_probs = output_or_null<T>(given.saved_log_sum_sq_probs);
    args.grad_logp = checked<T>(given.logp, "grad_logp", dtype, rows * args.num_ids, logits);
    args.grad_entropy = checked<T>(given.entropy, "grad_entropy", dtype, rows, logits);
    args.grad_lse = checked<T>(given.lse, "grad_lse", dtype, rows, logits);
    args.grad_log_sum_sq_probs = checked<T>(given.log_sum_sq_probs, "grad_log_sum_sq_probs", dtype, rows, logits);
    args.grad_logits = output<decltype(logit)>(grad);
    args.grad_stride_batch = grad.stride(0), args.grad_stride_time = grad.stride(1);
    if (rows > 0) on_device_of(logits, [&](const auto& device) { device.token_logprobs_backward(args); });
  });
}

Tensor token_logprobs_backward(
    const Optional& grad_logp, const Optional& grad_entropy, const Optional& grad_lse, const Optional& grad_log_sum_sq_probs,
    const Tensor& logits, const Tensor& ids, const Tensor& lse, const Tensor& lse_rest, const Tensor& entropy, const Tensor& log_sum_sq_probs,
    double temperature, const Optional& temperatures, double softcap, double logit_scale, const Optional& keep_mask) {
  Tensor grad = empty(logits, {logits.size(0), logits.size(1), logits.size(2)}, logits.scalar_type());
  on_device_of(logits, [&](const auto& device) {
    device.announce_writes(grad.data_ptr(), static_cast<size_t>(grad.numel()) * static_cast<size_t>(grad.element_size()));
  });
  run_logprobs_backward(logits, grad, {grad_logp, grad_entropy, grad_lse, grad_log_sum_sq_probs, ids, lse, lse_rest, entropy, log_sum_sq_probs},
                        {temperature, temperatures, softcap, logit_scale, keep_mask});
  return grad;
}

// The gradient takes the place of the logits.
void token_logprobs_backward_(
    const Optional& grad_logp, const Optional& grad_entropy, const Optional& grad_lse, const Optional& grad_log_sum_sq_probs,
    const Tensor& logits, const Tensor& ids, const Tensor& lse, const Tensor& lse_rest, const Tensor& entropy, const Tensor& log_sum_sq_probs,
    double temperature, const Optional& temperatures, double softcap, double logit_scale, const Optional& keep_mask) {
  run_logprobs_backward(logits, logits, {grad_logp, grad_entropy, grad_lse, grad_log_sum_sq_probs, ids, lse, lse_rest, entropy, log_sum_sq_probs},
                        {temperature, temperatures, softcap, logit_scale, keep_mask});
}

}  // namespace
}  // namespace tokenrl

#define TOKENRL_IMPLEMENT(m)                                                                   \
  m.impl("objective", TORCH_BOX(&tokenrl::objective));                                         \
  m.impl("statistic", TORCH_BOX(&tokenrl::statistic));                                         \
  m.impl("statistic_backward", TORCH_BOX(&tokenrl::statistic_backward));                       \
  m.impl("position_adaptive_clip", TORCH_BOX(&tokenrl::position_adaptive_clip));               \
  m.impl("aggregation_weights", TORCH_BOX(&tokenrl::aggregation_weights));                     \
  m.impl("token_logprobs", TORCH_BOX(&tokenrl::token_logprobs));                               \
  m.impl("token_logprobs_backward", TORCH_BOX(&tokenrl::token_logprobs_backward));             \
  m.impl("token_logprobs_backward_", TORCH_BOX(&tokenrl::token_logprobs_backward_))

// One more step of expansion: torch's macros paste their argument.
#define TOKENRL_DEFINE(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define TOKENRL_IMPL_FOR(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

TOKENRL_DEFINE(TOKENRL_LIBRARY, m) {
  m.def(
      "objective(Tensor logp, Tensor old_logp, Tensor? advantages, Tensor? mask, Tensor cu_seqlens, Tensor? starts, "
      "Tensor span_weight, Tensor normalizer, Tensor? token_weight, str statistic, str flow, str gate, float[] params, "
      "Tensor?[] param_tensors, float clamp, float cap) -> (Tensor loss, Tensor coef, Tensor metrics)");
  m.def("statistic(Tensor logp, Tensor old_logp, Tensor? mask, Tensor cu_seqlens, Tensor? starts, str statistic) -> Tensor");
  m.def("statistic_backward(Tensor grad, Tensor? mask, Tensor cu_seqlens, Tensor? starts, str statistic, str flow) -> Tensor");
  m.def(
      "position_adaptive_clip(Tensor log_ratio, Tensor? mask, Tensor cu_seqlens, float[] params, Tensor?[] param_tensors) "
      "-> (Tensor clipped, Tensor inside)");
  m.def(
      "aggregation_weights(Tensor? mask, Tensor cu_seqlens, int num_tokens, Tensor? advantages, Tensor? group_ids, str span, "
      "str unit) -> (Tensor span_weight, Tensor count)");
#define TRL_TRANSFORM "float temperature, Tensor? temperatures, float softcap, float logit_scale, Tensor? keep_mask"
#define TRL_UPSTREAM "(Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse, Tensor? grad_log_sum_sq_probs, "
#define TRL_SAVED "Tensor ids, Tensor lse, Tensor lse_rest, Tensor entropy, Tensor log_sum_sq_probs, "
  m.def("token_logprobs(Tensor logits, Tensor ids, " TRL_TRANSFORM
        ", str[] outputs, bool inplace_backward) -> (Tensor logp, Tensor entropy, Tensor lse, Tensor lse_rest, Tensor log_sum_sq_probs, "
        "Tensor mean_logit, Tensor max_prob, Tensor is_top1, Tensor rank)");
  m.def("token_logprobs_backward" TRL_UPSTREAM "Tensor logits, " TRL_SAVED TRL_TRANSFORM ") -> Tensor");
  m.def("token_logprobs_backward_" TRL_UPSTREAM "Tensor(a!) logits, " TRL_SAVED TRL_TRANSFORM ") -> ()");
}

TOKENRL_IMPL_FOR(TOKENRL_LIBRARY, CPU, m) { TOKENRL_IMPLEMENT(m); }
#ifdef TOKENRL_WITH_CUDA
TOKENRL_IMPL_FOR(TOKENRL_LIBRARY, CUDA, m) { TOKENRL_IMPLEMENT(m); }
#endif
