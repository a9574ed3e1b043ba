// The objective's kernel under several schedules, against loops over pairs of tokens in double.
// `objective short` hands it a buffer that is one token short: the address sanitizer must notice.
#include "../../../csrc/cuda/launch.h"
#include "batch.h"

namespace tokenrl {

struct Options {
  StatisticFlow pair;
  bool masked, segments, per_token;
  double clamp, cap;
};

template <class T>
ObjectiveArgs<T> arguments(const Batch<T>& batch, const Options& options) {
  ObjectiveArgs<T> args{};
  args.spans = batch.spans(options.masked, options.segments);
  args.logp = batch.logp.data();
  args.old_logp = batch.old_logp.data();
  args.advantages = (options.per_token ? batch.advantages : batch.sequence_advantages).data();
  args.advantages_per_token = options.per_token;
  args.span_weight = batch.span_weight.data();
  args.normalizer = &batch.normalizer;
  args.token_weight = options.per_token ? batch.token_weight.data() : nullptr;
  for (auto& param : args.params) param = {nullptr, T(0.1)};
  if (options.per_token) args.params[0].tensor = batch.bounds.data();
  args.clamp = static_cast<T>(options.clamp);
  args.cap = static_cast<T>(options.cap);
  return args;
}

struct Truth {
  double loss = 0;
  std::vector<double> coef, metrics;
};

template <class Gate, class T>
Gated<double> gate_at(const ObjectiveArgs<T>& args, double advantage, int64_t token, double s, double x, double t) {
  const auto params = params_from<Gate, double>([&](size_t k) { return double(args.params[k].at(token)); });
  return Gate::eval(GateInput<double>{s, x, args.logp[token], advantage, position_power<Gate>(t, params)}, params);
}

template <class Gate, class T>
Truth truth_of(const ObjectiveArgs<T>& args, const Options& options) {
  Truth truth{0, std::vector<double>(args.spans.num_tokens, 0.0), std::vector<double>(kNumMetrics)};
  auto& metrics = truth.metrics;
  metrics[kRatioMin] = INFINITY;
  metrics[kRatioMax] = -INFINITY;
  for (int64_t i = 0; i < args.spans.num_sequences; ++i) {
    for (const auto& span : spans_of(args.spans, i)) {
      const size_t n = span.size();
      std::vector<double> x(n), pre(n), g(n), direct(n);
      for (size_t k = 0; k < n; ++k) {
        const double d = static_cast<double>(args.logp[span[k]]) - args.old_logp[span[k]];
        x[k] = std::fmax(std::fmin(d, args.clamp), -args.clamp);
        pre[k] = std::fabs(d) <= args.clamp;
      }
      for (size_t k = 0; k < n; ++k) {
        const double raw = statistic_at(options.pair.statistic, x, k), s = std::fmin(raw, args.cap);
        const double advantage = args.advantages[args.advantages_per_token ? span[k] : i];
        const auto gated = gate_at<Gate>(args, advantage, span[k], s, x[k], static_cast<double>(k + 1));
        const double w =
            args.span_weight[i] / *args.normalizer * (args.token_weight ? args.token_weight[span[k]] : 1.0);
        truth.loss += w * gated.value;
        g[k] = raw <= args.cap ? w * gated.d_s : 0.0;
        direct[k] = w * gated.d_logp;
        const double r = std::exp(s);
        metrics[2] = std::fmin(metrics[2], r);
        metrics[3] = std::fmax(metrics[3], r);
        const double low_pos = advantage > 0 ? gated.low : 0, high_pos = advantage > 0 ? gated.high : 0;
        const double sums[] = {
            1, r, 0, 0, gated.low, gated.high, gated.dual, std::expm1(x[k]) - x[k], r * r, x[k], low_pos, high_pos};
        for (int m = 0; m < kNumMetrics; ++m) metrics[m] += sums[m];
      }
      for (size_t j = 0; j < n; ++j) {
        double through = 0;
        for (size_t k = 0; k < n; ++k) through += entry(options.pair.statistic, k, j, n) * g[k];
        truth.coef[span[j]] = (options.pair.through ? pre[j] * through : g[j]) + direct[j];
      }
    }
  }
  return truth;
}

// Loss, metrics, coefficients, in this order.
template <class T>
std::vector<double> run(ObjectiveArgs<T> args, const Options& options, const char* gate) {
  std::vector<T> out(1 + args.spans.num_tokens, static_cast<T>(std::nan("")));
  std::vector<double> metrics(kNumMetrics, std::nan(""));
  args.loss = out.data();
  args.coef = args.loss + 1;
  args.metrics = metrics.data();
  std::vector<char> scratch(cuda::objective_scratch_bytes<T>(args.spans), '\xff');
  unsigned ticket = 0;
  const char* error =
      cuda::objective(args, options.pair.statistic, options.pair.through, gate, scratch.data(), &ticket, nullptr);
  expect(ticket == 0, "the ticket is not 0 again");
  expect(error == nullptr, std::string("the launcher says ") + (error ? error : ""));
  std::vector<double> all{out[0]};
  all.insert(all.end(), metrics.begin(), metrics.end());
  all.insert(all.end(), out.begin() + 1, out.end());
  return all;
}

template <class T, class Gate>
void check(const Batch<T>& batch, const Options& options) {
  const std::string what = std::string(Gate::name) + (sizeof(T) == 4 ? " float " : " double ") +
                           kStatistics[static_cast<int>(options.pair.statistic)] +
                           (options.pair.through ? " through" : " local") + (options.segments ? " segments" : "") +
                           (options.per_token ? " per token" : "");
  const auto args = arguments(batch, options);
  const auto out = under_all_schedules(what, [&] { return run(args, options, Gate::name); });
  const Truth truth = truth_of<Gate>(args, options);
  expect_close(std::vector<double>{out[0]}, {truth.loss}, 10 * tolerance_of<T>(), what + " loss");
  for (int m = 0; m < kNumMetrics; ++m)
    expect_close(std::vector<double>{out[1 + m]}, {truth.metrics[m]}, 10 * tolerance_of<T>(),
                 what + " metric " + std::to_string(m));
  expect_close(std::vector<double>(out.begin() + 1 + kNumMetrics, out.end()), truth.coef, tolerance_of<T>(),
               what + " coef");
}

// Every pair of statistic and flow, the gates taking turns so that each meets several of them.
template <class T, class... Gate>
void check_all(std::tuple<Gate...>*) {
  const Batch<T> batch;
  using Check = void (*)(const Batch<T>&, const Options&);
  const Check gates[] = {&check<T, Gate>...};
  int turn = sizeof(T) == 4 ? 0 : 5;
  for (const StatisticFlow& pair : kPairs)
    for (bool segments : {false, true})
      gates[(turn++ * 3) % sizeof...(Gate)](
          batch, {pair, true, segments, turn % 2 == 0, 0.15, turn % 3 == 0 ? 0.2 : INFINITY});
  gates[0](batch, {{Statistic::prefix_mean, true}, true, true, true, 0.15, INFINITY});
  check<T, LogBand>(batch, {{Statistic::span_mean, true}, true, true, false, 0.15, INFINITY});  // by the position
  gates[1](batch, {{Statistic::prefix_sum, false}, true, false, false, INFINITY, INFINITY});
}

template <class T>
void check_empty() {
  Batch<T> batch;
  Options options{{Statistic::span_mean, true}, true, true, false, INFINITY, INFINITY};
  auto args = arguments(batch, options);
  args.spans.num_sequences = 0;
  const auto none = run(args, options, "ppo_clip");
  std::vector<double> truth(none.size(), 0.0);
  truth[1 + kRatioMin] = INFINITY;
  truth[1 + kRatioMax] = -INFINITY;
  expect_close(none, truth, 0, "no sequences");
}

// A sequence whose tiles have a block each: the bits that one block finds.
void check_tiles() {
  const auto apart = Batch<float>::of_tiles(), together = apart.in_one_block();
  for (const StatisticFlow& pair : kPairs)
    for (const char* gate : {"log_band", "ppo_clip"}) {
      const Options options{pair, true, false, false, 0.15, INFINITY};
      auto one = run(arguments(together, options), options, gate);
      expect(
          same_bits(run(arguments(apart, options), options, gate), one),
          std::string(gate) + " " + kStatistics[static_cast<int>(pair.statistic)] + ": other bits in several blocks");
    }
}

}  // namespace tokenrl

int main(int argc, char**) {
  using namespace tokenrl;
  if (argc > 1) {
    const Batch<float> batch(1);
    const Options options{{Statistic::token, true}, false, false, false, INFINITY, INFINITY};
    run(arguments(batch, options), options, "ppo_clip");
    return 0;
  }
  check_all<float>(static_cast<TOKENRL_GATES*>(nullptr));
  check_all<double>(static_cast<TOKENRL_GATES*>(nullptr));
  check_empty<float>();
  check_tiles();
  std::printf("all as expected\n");
}
