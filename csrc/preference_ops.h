// preference and its backward as ops: argument checks and allocation. Part of ops.cpp.
#pragma once

#include "checks.h"
#include "devices.h"

namespace tokenrl {
namespace {

template <class T>
PreferenceTokens<T> preference_tokens(const Tensor& logp, const Optional& divergence, const Optional& token_weight,
                                      const Optional& divergence_weight, const Optional& ref_logp, const Optional& mask,
                                      const Tensor& cu_seqlens, const Optional& nll_mask) {
  const ScalarType dtype = logp.scalar_type();
  const int64_t n = logp.numel();
  check(logp, "logp", dtype, n, cu_seqlens);
  PreferenceTokens<T> tokens{};
  tokens.spans = spans_of(mask, cu_seqlens, std::nullopt, n);
  tokens.logp = pointer<T>(logp);
  tokens.ref_logp = checked<T>(ref_logp, "ref_logp", dtype, n, logp);
  tokens.divergence = checked<T>(divergence, "divergence", dtype, n, logp);
  tokens.token_weight = checked<T>(token_weight, "token_weight", dtype, n, logp);
  tokens.divergence_weight = checked<T>(divergence_weight, "divergence_weight", dtype, n, logp);
  tokens.nll_mask = checked<bool>(nll_mask, "nll_mask", ScalarType::Bool, n, logp);
  return tokens;
}

template <class... Functor>
size_t num_params_named(std::tuple<Functor...>*, const std::string& name, const char* argument) {
  static constexpr const char* kNames[] = {Functor::name...};
  constexpr int kCounts[] = {Functor::num_params...};
  return static_cast<size_t>(kCounts[named(kNames, name, argument)]);
}

template <class Table>
void check_params(const char* argument, const std::string& name, const std::vector<double>& params) {
  const size_t count = num_params_named(static_cast<Table*>(nullptr), name, argument);
  STD_TORCH_CHECK(params.size() == count, argument, "_params: got ", params.size(), ", expected ", count, ".");
}

SumSlopes slopes_in(const Tensor& slopes, int64_t sequences) {
  double* at = output<double>(slopes);
  return {at, at + sequences, at + 2 * sequences};
}

PreferenceRow preference_row(const std::string& link, const std::vector<double>& link_params, const std::string& score,
                             const std::vector<double>& score_params, const std::string& statistic,
                             const std::string& coupling, const std::string& divergence_flow) {
  static constexpr const char* kSumOrMean[] = {"sum", "mean"};
  static constexpr const char* kDivergenceFlows[] = {"both", "rejected"};
  check_params<Links>("link", link, link_params);
  check_params<Scores>("score", score, score_params);
  PreferenceRow row{};
  row.coupling = static_cast<Coupling>(named(kCouplings, coupling, "coupling"));
  row.mean = named(kSumOrMean, statistic, "statistic") == 1;
  row.divergence_of_rejected_alone = named(kDivergenceFlows, divergence_flow, "divergence_flow") == 1;
  if (!score_params.empty()) row.score_param = score_params[0];
  std::copy(link_params.begin(), link_params.end(), row.link_params);
  return row;
}

// What is given of sequences and of losses.
LinkArgs link_args(const PreferenceRow& row, const Tensor& like, int64_t sequences, const Optional& pairs,
                   const Optional& desirable, const Optional& base, const Optional& pair_weight,
                   const Optional& normalizer, const Optional& nll_normalizer) {
  LinkArgs args{};
  args.row = row;
  STD_TORCH_CHECK(args.labelled() == desirable.has_value(), "desirable: expected with coupling 'labels' alone.");
  args.num_sequences = sequences;
  args.num_losses = args.labelled() ? sequences : (pairs ? pairs->numel() : sequences) / 2;
  args.pairs = checked<int64_t>(pairs, "pairs", ScalarType::Long, 2 * args.num_losses, like);
  args.desirable = checked<bool>(desirable, "desirable", ScalarType::Bool, sequences, like);
  args.base = checked<double>(base, "base", ScalarType::Double, 1, like);
  args.pair_weight = checked<double>(pair_weight, "pair_weight", ScalarType::Double, args.num_losses, like);
  args.normalizer = checked<double>(normalizer, "normalizer", ScalarType::Double, 1, like);
  args.nll_normalizer = checked<double>(nll_normalizer, "nll_normalizer", ScalarType::Double, 1, like);
  return args;
}

// (loss, slopes [3, S], rewards [3, M], accuracy); M losses, one per pair or per labelled sequence.
std::tuple<Tensor, Tensor, Tensor, Tensor> preference(
    const Tensor& logp, const Optional& divergence, const Optional& token_weight, const Optional& divergence_weight,
    const Optional& ref_logp, const Optional& mask, const Tensor& cu_seqlens, const Optional& pairs,
    const Optional& desirable, const Optional& base, const Optional& pair_weight, const Optional& normalizer,
    const Optional& nll_mask, const Optional& nll_normalizer, const std::string& link,
    const std::vector<double>& link_params, const std::string& score, const std::vector<double>& score_params,
    const std::string& statistic, const std::string& coupling, double divergence_factor,
    const std::string& divergence_flow, double length, double nll) {
  const int64_t sequences = cu_seqlens.numel() - 1;
  auto row = preference_row(link, link_params, score, score_params, statistic, coupling, divergence_flow);
  row.divergence = divergence_factor, row.length = length, row.nll = nll;
  auto links = link_args(row, logp, sequences, pairs, desirable, base, pair_weight, normalizer, nll_normalizer);
  links.nll_of_all = nll_mask.has_value();
  const Tensor loss = empty(logp, {}, logp.scalar_type()), slopes = empty(logp, {3, sequences}, ScalarType::Double);
  const Tensor rewards = empty(logp, {3, links.num_losses}, ScalarType::Double);
  const Tensor accuracy = empty(logp, {}, ScalarType::Double);
  links.slopes = slopes_in(slopes, sequences);
  links.rewards = output<double>(rewards), links.accuracy = output<double>(accuracy);
  links.loss = loss.data_ptr(), links.loss_double = logp.scalar_type() == ScalarType::Double;
  by_precision(logp, "logp", [&](auto precision) {
    auto tokens = preference_tokens<decltype(precision)>(logp, divergence, token_weight, divergence_weight, ref_logp,
                                                         mask, cu_seqlens, nll_mask);
    tokens.sums_reference = row.coupling == Coupling::sorted_margins && ref_logp.has_value();
    tokens.sums_nll = nll > 0;
    on_device_of(logp, [&](const auto& device) { device.preference(tokens, score.c_str(), link.c_str(), links); });
  });
  return std::make_tuple(loss, slopes, rewards, accuracy);
}

// The gradients of logp, divergence, token_weight and divergence_weight, in this order; empty where not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor> preference_backward(
    const Tensor& grad, const Tensor& slopes, const Tensor& logp, const Optional& divergence,
    const Optional& token_weight, const Optional& divergence_weight, const Optional& ref_logp, const Optional& mask,
    const Tensor& cu_seqlens, const Optional& nll_mask, bool nll, const std::vector<bool>& wanted) {
  const ScalarType dtype = logp.scalar_type();
  const int64_t n = logp.numel(), sequences = cu_seqlens.numel() - 1;
  STD_TORCH_CHECK(wanted.size() == 4, "wanted: got ", wanted.size(), " entries, expected 4.");
  check(grad, "grad", dtype, 1, logp);
  check(slopes, "slopes", ScalarType::Double, 3 * sequences, logp);
  const auto made = [&](size_t k) { return empty(logp, {wanted[k] ? n : 0}, dtype); };
  const Tensor of_logp = made(0), of_divergence = made(1), of_weight = made(2), of_divergence_weight = made(3);
  by_precision(logp, "logp", [&](auto precision) {
    using T = decltype(precision);
    TokenGradients<T> args{};
    args.tokens =
        preference_tokens<T>(logp, divergence, token_weight, divergence_weight, ref_logp, mask, cu_seqlens, nll_mask);
    args.tokens.sums_nll = nll;
    args.upstream = pointer<T>(grad), args.slopes = slopes_in(slopes, sequences);
    const auto at = [&](size_t k, const Tensor& x) { return wanted[k] ? output<T>(x) : nullptr; };
    args.of_logp = at(0, of_logp), args.of_divergence = at(1, of_divergence);
    args.of_token_weight = at(2, of_weight), args.of_divergence_weight = at(3, of_divergence_weight);
    on_device_of(logp, [&](const auto& device) { device.preference_backward(args); });
  });
  return std::make_tuple(of_logp, of_divergence, of_weight, of_divergence_weight);
}

}  // namespace
}  // namespace tokenrl
