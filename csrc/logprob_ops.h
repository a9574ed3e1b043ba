// token_logprobs and its backward as ops: argument checks and allocation. Part of ops.cpp.
#pragma once

#include <algorithm>

#include "checks.h"
#include "devices.h"

namespace tokenrl {
namespace {

// f(Logit{}, T{}): how the logits are stored, and the precision of everything derived from them.
template <class F>
void by_logit(const Tensor& logits, F&& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(BFloat16{}, float{});
    case ScalarType::Half: return f(Half{}, float{});
    default:
      STD_TORCH_CHECK(false, "logits: got ", dtype_name(logits.scalar_type()),
                      ", expected bfloat16, float16, float32 or float64.");
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
  STD_TORCH_CHECK(
      x.dim() == 3 && x.size(0) == logits.size(0) && x.size(1) == logits.size(1) && x.size(2) == logits.size(2), name,
      ": expected [B, T, V].");
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
      : logp(empty(ids, sizes(ids), dtype)),
        entropy(empty(ids, rows(ids), dtype)),
        lse(empty(ids, rows(ids), dtype)),
        lse_rest(empty(ids, rows(ids), dtype)),
        log_sum_sq_probs(made(outputs, "log_sum_sq_probs", ids, rows(ids), dtype)),
        mean_logit(made(outputs, "mean_logit", ids, rows(ids), dtype)),
        max_prob(made(outputs, "max_prob", ids, rows(ids), dtype)),
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
    const Tensor& logits, const Tensor& ids, double temperature, const Optional& temperatures, double softcap,
    double logit_scale, const Optional& keep_mask, const std::vector<std::string>& outputs,
    bool /* inplace_backward: for the derivative */) {
  const LogprobResults results(ids, precision_of(logits), outputs);
  by_logit(logits, [&](auto logit, auto precision) {
    using T = decltype(precision);
    auto args =
        logprob_args<decltype(logit), T>(logits, ids, {temperature, temperatures, softcap, logit_scale, keep_mask});
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
  return std::make_tuple(r.logp, r.entropy, r.lse, r.lse_rest, r.log_sum_sq_probs, r.mean_logit, r.max_prob, r.is_top1,
                         r.rank);
}

// The upstream gradients and what the forward saved, as the ops' arguments order them.
struct LogprobBackward {
  const Optional &logp, &entropy, &lse, &log_sum_sq_probs;
  const Tensor &ids, &saved_lse, &saved_lse_rest, &saved_entropy, &saved_log_sum_sq_probs;
};

void run_logprobs_backward(const Tensor& logits, const Tensor& grad, const LogprobBackward& given,
                           const TransformOptions& options) {
  const ScalarType dtype = precision_of(logits);
  by_logit(logits, [&](auto logit, auto precision) {
    using T = decltype(precision);
    auto args = logprob_args<decltype(logit), T>(logits, given.ids, options);
    const int64_t rows = args.batch * args.time;
    check(given.saved_lse, "lse", dtype, rows, logits);
    check(given.saved_lse_rest, "lse_rest", dtype, rows, logits);
    check(given.saved_entropy, "entropy", dtype, rows, logits);
    check(given.saved_log_sum_sq_probs, "log_sum_sq_probs", dtype,
          given.log_sum_sq_probs ? rows : given.saved_log_sum_sq_probs.numel(), logits);
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

Tensor token_logprobs_backward(const Optional& grad_logp, const Optional& grad_entropy, const Optional& grad_lse,
                               const Optional& grad_log_sum_sq_probs, const Tensor& logits, const Tensor& ids,
                               const Tensor& lse, const Tensor& lse_rest, const Tensor& entropy,
                               const Tensor& log_sum_sq_probs, double temperature, const Optional& temperatures,
                               double softcap, double logit_scale, const Optional& keep_mask) {
  Tensor grad = empty(logits, {logits.size(0), logits.size(1), logits.size(2)}, logits.scalar_type());
  on_device_of(logits, [&](const auto& device) {
    device.announce_writes(grad.data_ptr(),
                           static_cast<size_t>(grad.numel()) * static_cast<size_t>(grad.element_size()));
  });
  run_logprobs_backward(
      logits, grad,
      {grad_logp, grad_entropy, grad_lse, grad_log_sum_sq_probs, ids, lse, lse_rest, entropy, log_sum_sq_probs},
      {temperature, temperatures, softcap, logit_scale, keep_mask});
  return grad;
}

// The gradient takes the place of the logits.
void token_logprobs_backward_(const Optional& grad_logp, const Optional& grad_entropy, const Optional& grad_lse,
                              const Optional& grad_log_sum_sq_probs, const Tensor& logits, const Tensor& ids,
                              const Tensor& lse, const Tensor& lse_rest, const Tensor& entropy,
                              const Tensor& log_sum_sq_probs, double temperature, const Optional& temperatures,
                              double softcap, double logit_scale, const Optional& keep_mask) {
  run_logprobs_backward(
      logits, logits,
      {grad_logp, grad_entropy, grad_lse, grad_log_sum_sq_probs, ids, lse, lse_rest, entropy, log_sum_sq_probs},
      {temperature, temperatures, softcap, logit_scale, keep_mask});
}

}  // namespace
}  // namespace tokenrl
