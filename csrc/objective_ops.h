// The objective and its building blocks as ops: argument checks and allocation. Part of ops.cpp.
#pragma once

#include "checks.h"
#include "devices.h"

namespace tokenrl {
namespace {

Statistic statistic_named(const std::string& statistic) {
  return static_cast<Statistic>(named(kStatistics, statistic, "statistic"));
}

// Of a gate of the table, or of one that was added where x is.
size_t num_params_of(const std::string& gate, const Tensor& x) {
  const cpu::AddedGate* added = nullptr;
  on_device_of(x, [&](const auto& device) { added = device.added_gate(gate.c_str()); });
  return added ? static_cast<size_t>(added->num_params) : num_params_of(static_cast<Gates*>(nullptr), gate);
}

std::tuple<Tensor, Tensor, Tensor> objective(const Tensor& logp, const Tensor& old_logp, const Optional& advantages,
                                             const Optional& mask, const Tensor& cu_seqlens, const Optional& starts,
                                             const Tensor& span_weight, const Tensor& normalizer,
                                             const Optional& token_weight, const std::string& statistic,
                                             const std::string& flow, const std::string& gate,
                                             const std::vector<double>& params,
                                             const std::vector<Optional>& param_tensors, double clamp, double cap) {
  const ScalarType dtype = logp.scalar_type();
  const int64_t n = logp.numel();
  const Spans spans = spans_of(mask, cu_seqlens, starts, n);
  const Statistic which = statistic_named(statistic);
  const bool through = is_through(flow);
  STD_TORCH_CHECK(!through || !is_minimum(which), "flow: got 'through' for ", statistic, ", accepted: local.");
  const size_t num_params = num_params_of(gate, logp);
  check(cu_seqlens, "cu_seqlens", ScalarType::Long, spans.num_sequences + 1, logp);
  check(span_weight, "span_weight", ScalarType::Double, spans.num_sequences, logp);
  check(normalizer, "normalizer", ScalarType::Double, 1, logp);
  const bool per_token = advantages && advantages->numel() == n;
  return by_precision(logp, "logp", [&](auto precision) {
    using T = decltype(precision);
    Tensor loss = empty(logp, {}, dtype), coef = empty(logp, {n}, dtype);
    Tensor metrics = empty(logp, {kNumMetrics}, ScalarType::Double);
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
    args.clamp = static_cast<T>(clamp), args.cap = static_cast<T>(cap);
    args.loss = output<T>(loss), args.coef = output<T>(coef), args.metrics = output<double>(metrics);
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
    const StatisticArgs<T> args{spans_of(mask, cu_seqlens, starts, n), pointer<T>(input),
                                input2 ? pointer<T>(*input2) : nullptr, output<T>(out)};
    on_device_of(input, [&](const auto& device) { device.statistic(args, statistic, adjoint); });
    return out;
  });
}

Tensor statistic(const Tensor& logp, const Tensor& old_logp, const Optional& mask, const Tensor& cu_seqlens,
                 const Optional& starts, const std::string& statistic, const std::string& /* of the derivative */) {
  const Statistic which = statistic_named(statistic);
  return run_statistic(logp, &old_logp, mask, cu_seqlens, starts, which, false);
}

Tensor statistic_backward(const Tensor& grad, const Optional& mask, const Tensor& cu_seqlens, const Optional& starts,
                          const std::string& statistic, const std::string& flow) {
  const Statistic which = statistic_named(statistic);
  const bool masked = !is_through(flow) || is_minimum(which) || which == Statistic::token;
  return run_statistic(grad, nullptr, mask, cu_seqlens, starts, masked ? Statistic::token : which, !masked);
}

std::tuple<Tensor, Tensor> position_adaptive_clip(const Tensor& log_ratio, const Optional& mask,
                                                  const Tensor& cu_seqlens, const std::vector<double>& params,
                                                  const std::vector<Optional>& param_tensors) {
  const int64_t n = log_ratio.numel();
  const ScalarType dtype = log_ratio.scalar_type();
  return by_precision(log_ratio, "log_ratio", [&](auto precision) {
    using T = decltype(precision);
    check(log_ratio, "log_ratio", dtype, n, cu_seqlens);
    Tensor clipped = empty(log_ratio, {n}, dtype), inside = empty(log_ratio, {n}, dtype);
    ClipArgs<T> args{};
    args.spans = spans_of(mask, cu_seqlens, std::nullopt, n);
    args.log_ratio = pointer<T>(log_ratio);
    fill_params(args.params, PositionAdaptiveClip::num_params, params, param_tensors, n, log_ratio);
    args.clipped = output<T>(clipped);
    args.inside = output<T>(inside);
    on_device_of(log_ratio, [&](const auto& device) { device.position_adaptive_clip(args); });
    return std::make_tuple(clipped, inside);
  });
}

std::tuple<Tensor, Tensor> aggregation_weights(const Optional& mask, const Tensor& cu_seqlens, int64_t num_tokens,
                                               const Optional& advantages, const Optional& group_ids,
                                               const std::string& span, const std::string& unit, double scale) {
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
    check(*advantages, "advantages", args.advantages_double ? ScalarType::Double : ScalarType::Float, expected,
          cu_seqlens);
    args.advantages = advantages->data_ptr();
  }
  Tensor span_weight = empty(cu_seqlens, {args.spans.num_sequences}, ScalarType::Double);
  Tensor normalizer = empty(cu_seqlens, {}, ScalarType::Double);
  args.scale = scale;
  args.span_weight = output<double>(span_weight);
  args.normalizer = output<double>(normalizer);
  on_device_of(cu_seqlens, [&](const auto& device) { device.aggregation_weights(args, which, counted); });
  return std::make_tuple(span_weight, normalizer);
}

}  // namespace
}  // namespace tokenrl
