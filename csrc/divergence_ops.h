// divergence and its backward as ops: argument checks and allocation. Part of ops.cpp.
#pragma once

#include "logprob_ops.h"

namespace tokenrl {
namespace {

// What both directions are given beside the logits. rows: which there are.
struct PairOptions {
  const Optional& rows;
  TransformOptions of, other;
  const std::string& kind;
  const std::vector<double>& params;
};

template <class... Kind>
size_t num_params_of_divergence(std::tuple<Kind...>*, const std::string& kind) {
  static constexpr const char* kNames[] = {Kind::name...};
  constexpr int kCounts[] = {Kind::num_params...};
  return static_cast<size_t>(kCounts[named(kNames, kind, "kind")]);
}

// statistics: [4, rows], lse and lse_rest of the logits and of the other ones.
template <class Logit, class T>
DivergenceArgs<Logit, T> divergence_args(const Tensor& logits, const Tensor& other, const Tensor& statistics,
                                         const PairOptions& options) {
  STD_TORCH_CHECK(other.scalar_type() == logits.scalar_type(), "other_logits: expected the dtype of the logits.");
  check_strided(other, "other_logits", logits);
  const size_t count = num_params_of_divergence(static_cast<Divergences*>(nullptr), options.kind);
  STD_TORCH_CHECK(options.params.size() == count, "params: got ", options.params.size(), ", expected ", count, ".");
  DivergenceArgs<Logit, T> args{};
  args.of = logit_args<Logit, T>(logits, options.of);
  args.other = logit_args<Logit, T>(other, options.other);
  for (size_t k = 0; k < count; ++k) args.params[k] = static_cast<T>(options.params[k]);
  const int64_t rows = args.of.batch * args.of.time;
  args.rows = checked<bool>(options.rows, "rows", ScalarType::Bool, rows, logits);
  check(statistics, "statistics", precision_of(logits), 4 * rows, logits);
  T* each = output<T>(statistics);
  for (T** of : {&args.of.lse, &args.of.lse_rest, &args.other.lse, &args.other.lse_rest}) *of = each, each += rows;
  return args;
}

// statistics: where another kind of the same logits has found them.
std::tuple<Tensor, Tensor, Tensor, Tensor> divergence(
    const Tensor& logits, const Tensor& other_logits, const Optional& statistics, const Optional& rows,
    double temperature, const Optional& temperatures, double softcap, double logit_scale, const Optional& keep_mask,
    double other_temperature, const Optional& other_temperatures, double other_softcap, double other_logit_scale,
    const Optional& other_keep_mask, const std::string& kind, const std::vector<double>& params) {
  const Sizes sizes = sizes_of(logits, logits.dim() - 1);
  Sizes four{4};
  four.insert(four.end(), sizes.begin(), sizes.end());
  const ScalarType dtype = precision_of(logits);
  const Tensor value = empty(logits, sizes, dtype), by_p = empty(logits, sizes, dtype),
               by_r = empty(logits, sizes, dtype),
               found = statistics ? torch::stable::clone(*statistics) : empty(logits, four, dtype);
  by_logit(logits, [&](auto logit, auto precision) {
    using T = decltype(precision);
    auto args = divergence_args<decltype(logit), T>(
        logits, other_logits, found,
        {rows,
         {temperature, temperatures, softcap, logit_scale, keep_mask},
         {other_temperature, other_temperatures, other_softcap, other_logit_scale, other_keep_mask},
         kind,
         params});
    args.statistics_known = statistics.has_value();
    args.value = output<T>(value), args.by_p = output<T>(by_p), args.by_r = output<T>(by_r);
    if (value.numel() > 0) on_device_of(logits, [&](const auto& device) { device.divergence(args, kind.c_str()); });
  });
  return std::make_tuple(value, by_p, by_r, found);
}

// of: "logits" or "other_logits", whose gradient it is; by: that sum of the forward's, by_p or by_r.
Tensor divergence_backward(const Tensor& grad, const Tensor& logits, const Tensor& other_logits, const Tensor& by,
                           const std::string& of, const Tensor& statistics, const Optional& rows, double temperature,
                           const Optional& temperatures, double softcap, double logit_scale, const Optional& keep_mask,
                           double other_temperature, const Optional& other_temperatures, double other_softcap,
                           double other_logit_scale, const Optional& other_keep_mask, const std::string& kind,
                           const std::vector<double>& params) {
  static constexpr const char* kSides[] = {"logits", "other_logits"};
  const bool of_other = named(kSides, of, "of") == 1;
  const Tensor out = empty(logits, sizes_of(logits, logits.dim()), logits.scalar_type());
  by_logit(logits, [&](auto logit, auto precision) {
    using T = decltype(precision);
    auto args = divergence_args<decltype(logit), T>(
        logits, other_logits, statistics,
        {rows,
         {temperature, temperatures, softcap, logit_scale, keep_mask},
         {other_temperature, other_temperatures, other_softcap, other_logit_scale, other_keep_mask},
         kind,
         params});
    const int64_t count = args.of.batch * args.of.time;
    check(grad, "grad", precision_of(logits), count, logits);
    check(by, "by", precision_of(logits), count, logits);
    args.grad = pointer<T>(grad), args.by = pointer<T>(by), args.of_other = of_other;
    args.of.grad_logits = output<decltype(logit)>(out);
    const LogitShape shape(out);
    args.of.grad_stride_batch = shape.stride_batch(out), args.of.grad_stride_time = shape.stride_time(out);
    on_device_of(logits, [&](const auto& device) {
      device.announce_writes(out.data_ptr(), static_cast<size_t>(out.numel() * out.element_size()));
      if (count > 0) device.divergence_backward(args, kind.c_str());
    });
  });
  return out;
}

}  // namespace
}  // namespace tokenrl
