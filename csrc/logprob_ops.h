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

Sizes sizes_of(const Tensor& x, int64_t dims) {
  Sizes sizes;
  for (int64_t i = 0; i < dims; ++i) sizes.push_back(x.size(i));
  return sizes;
}

// [B, T, V], or [N, V] as one batch of N rows.
struct LogitShape {
  int64_t dims, batch, time, vocab;

  explicit LogitShape(const Tensor& logits) : dims(logits.dim()) {
    STD_TORCH_CHECK(dims == 2 || dims == 3, "logits: expected [N, V] or [B, T, V].");
    batch = dims == 3 ? logits.size(0) : 1, time = logits.size(dims - 2), vocab = logits.size(dims - 1);
  }
  int64_t stride_batch(const Tensor& x) const { return dims == 3 ? x.stride(0) : 0; }
  int64_t stride_time(const Tensor& x) const { return x.stride(dims - 2); }
};

void check_strided(const Tensor& x, const char* name, const Tensor& logits) {
  const int64_t dims = logits.dim();
  STD_TORCH_CHECK(x.dim() == dims && sizes_of(x, dims) == sizes_of(logits, dims), name,
                  ": expected the shape of the logits.");
  STD_TORCH_CHECK(x.stride(dims - 1) == 1 || x.size(dims - 1) == 1, name, ": the last stride must be 1.");
}

// Ids are one per row, or K in a dimension of their own.
int64_t ids_per_row(const Tensor& ids, const LogitShape& shape) {
  return ids.dim() == shape.dims ? ids.size(shape.dims - 1) : 1;
}

// Without ids.
template <class Logit, class T>
LogprobArgs<Logit, T> logit_args(const Tensor& logits, const TransformOptions& options) {
  const LogitShape shape(logits);
  check_strided(logits, "logits", logits);
  STD_TORCH_CHECK(shape.vocab >= 1, "logits: expected V >= 1.");
  LogprobArgs<Logit, T> args{};
  args.batch = shape.batch, args.time = shape.time, args.vocab = shape.vocab;
  args.stride_batch = shape.stride_batch(logits), args.stride_time = shape.stride_time(logits);
  args.logits = pointer<Logit>(logits);
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
    transform.keep_stride_batch = shape.stride_batch(keep), transform.keep_stride_time = shape.stride_time(keep);
  }
  return args;
}

template <class Logit, class T>
LogprobArgs<Logit, T> logprob_args(const Tensor& logits, const Tensor& ids, const TransformOptions& options) {
  auto args = logit_args<Logit, T>(logits, options);
  const LogitShape shape(logits);
  const int64_t rows = shape.dims - 1;
  args.num_ids = ids_per_row(ids, shape);
  STD_TORCH_CHECK((ids.dim() == rows || ids.dim() == rows + 1) && sizes_of(ids, rows) == sizes_of(logits, rows) &&
                      args.num_ids >= 1,
                  "ids: expected one per row of logits, or K of them.");
  check(ids, "ids", ScalarType::Long, ids.numel(), logits);
  args.ids = pointer<int64_t>(ids);
  return args;
}

ScalarType precision_of(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The results of token_logprobs; those that were not asked for are empty.
struct LogprobResults {
  Tensor logp, entropy, lse, lse_rest, log_sum_sq_probs, mean_logit, max_prob, is_top1, rank;

  LogprobResults(const Tensor& logits, const Tensor& ids, ScalarType dtype, const std::vector<std::string>& outputs)
      : LogprobResults(ids, sizes_of(ids, ids.dim()), sizes_of(logits, logits.dim() - 1), dtype, outputs) {}

  LogprobResults(const Tensor& ids, const Sizes& each, const Sizes& rows, ScalarType dtype,
                 const std::vector<std::string>& outputs)
      : logp(empty(ids, each, dtype)),
        entropy(empty(ids, rows, dtype)),
        lse(empty(ids, rows, dtype)),
        lse_rest(empty(ids, rows, dtype)),
        log_sum_sq_probs(made(outputs, "log_sum_sq_probs", ids, rows, dtype)),
        mean_logit(made(outputs, "mean_logit", ids, rows, dtype)),
        max_prob(made(outputs, "max_prob", ids, rows, dtype)),
        is_top1(made(outputs, "is_top1", ids, each, ScalarType::Bool)),
        rank(made(outputs, "rank", ids, each, ScalarType::Long)) {}

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
  const LogprobResults results(logits, ids, precision_of(logits), outputs);
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
    const LogitShape shape(logits);
    args.grad_stride_batch = shape.stride_batch(grad), args.grad_stride_time = shape.stride_time(grad);
    if (rows > 0) on_device_of(logits, [&](const auto& device) { device.token_logprobs_backward(args); });
  });
}

Tensor token_logprobs_backward(const Optional& grad_logp, const Optional& grad_entropy, const Optional& grad_lse,
                               const Optional& grad_log_sum_sq_probs, const Tensor& logits, const Tensor& ids,
                               const Tensor& lse, const Tensor& lse_rest, const Tensor& entropy,
                               const Tensor& log_sum_sq_probs, double temperature, const Optional& temperatures,
                               double softcap, double logit_scale, const Optional& keep_mask) {
  Tensor grad = empty(logits, sizes_of(logits, logits.dim()), logits.scalar_type());
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
