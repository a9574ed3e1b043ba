// Every gate x statistic x flow through the CPU objective in double, on ragged sequences with segments, holes full of
// NaN, weights and bounds per token, a cap and a clamp: against the definition, one product per pair of tokens, and
// against differences.
#include <algorithm>
#include <memory>
#include <vector>

#include "../cpp_host/definition.h"
#include "check.h"
#include "cpu/kernels.h"

using namespace tokenrl;

namespace {

constexpr double kClamp = 0.9, kCap = 0.8;

const cpu::Threads kInline{
    [](int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, n); }};
// Uneven shares in another order, as threads may take them.
const cpu::Threads kShares{[](int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t ends[] = {0, n / 5, n / 2, n};
  for (int k : {2, 0, 1})
    if (ends[k] < ends[k + 1]) body(context, ends[k], ends[k + 1]);
}};

struct Batch {
  std::vector<int64_t> cu_seqlens{2, 2, 3, 20, 90, 97};
  int64_t sequences = 5, tokens = 99;
  std::vector<double> logp, old_logp, advantages, token_weight, bounds[kMaxParams],
      span_weight{1.0, 0.5, 0.25, 2.0, 0.75};
  std::unique_ptr<bool[]> mask{new bool[tokens]}, starts{new bool[tokens]};
  double normalizer = 3;

  explicit Batch(const std::string& gate)
      : logp(tokens), old_logp(tokens), advantages(sequences), token_weight(tokens) {
    // A fixed sequence of numbers in [-1, 1): random enough, and the same everywhere.
    uint64_t state = 12345;
    const auto next = [&state] {
      state = state * 6364136223846793005u + 1442695040888963407u;
      return static_cast<double>(state >> 11) / 4503599627370496.0 - 1;
    };
    const bool ratio_dual = gate == "ppo_clip" || gate == "ppo_ntp" || gate == "hapo";
    const double low[] = {0.1, 0.12, ratio_dual ? 1.3 : 0.3, 0.4, 0.2, 0.5};
    for (int64_t k = 0; k < kMaxParams; ++k) bounds[k].resize(tokens);
    for (double& a : advantages) a = next();
    for (int64_t i = 0; i < tokens; ++i) {
      logp[i] = -1.5 + next();
      old_logp[i] = logp[i] - 0.35 * next() - (i % 13 == 5 ? 1.2 : 0);  // some are beyond the clamp
      token_weight[i] = i % 7 == 3 ? 0 : 1 + next();
      mask[i] = next() < 0.6;
      starts[i] = mask[i] && next() > 0.7;
      for (int k = 0; k < kMaxParams; ++k) bounds[k][i] = low[k] + 0.05 * next();
      if (mask[i]) continue;
      logp[i] = old_logp[i] = token_weight[i] = NAN;
      for (auto& bound : bounds) bound[i] = NAN;
    }
  }
};

struct Result {
  double loss, metrics[kNumMetrics];
  std::vector<double> coef;
};

Result evaluate(const Batch& batch, const std::string& gate, int num_params, StatisticFlow pair,
                const cpu::Threads& threads = kInline) {
  Result result{0, {}, std::vector<double>(batch.tokens, NAN)};
  ObjectiveArgs<double> args{};
  args.spans = {batch.tokens, batch.sequences, batch.cu_seqlens.data(), batch.mask.get(), batch.starts.get()};
  args.logp = batch.logp.data();
  args.old_logp = batch.old_logp.data();
  args.advantages = batch.advantages.data();
  args.span_weight = batch.span_weight.data();
  args.normalizer = &batch.normalizer;
  args.token_weight = batch.token_weight.data();
  for (int k = 0; k < num_params; ++k) args.params[k] = {batch.bounds[k].data(), 0};
  args.clamp = kClamp;
  args.cap = kCap;
  args.loss = &result.loss;
  args.coef = result.coef.data();
  args.metrics = result.metrics;
  near("the kernel knows " + gate, cpu::objective(args, pair.statistic, pair.through, gate.c_str(), threads), 1, 0);
  return result;
}

// The valid tokens of every span, and the sequence it lies in.
struct Span {
  int64_t sequence;
  std::vector<int64_t> tokens;
};
std::vector<Span> spans_of(const Batch& batch) {
  std::vector<Span> spans;
  for (int64_t i = 0; i < batch.sequences; ++i) {
    spans.push_back({i, {}});
    for (int64_t t = batch.cu_seqlens[i]; t < batch.cu_seqlens[i + 1]; ++t) {
      if (!batch.mask[t]) continue;
      if (batch.starts[t]) spans.push_back({i, {}});
      spans.back().tokens.push_back(t);
    }
  }
  return spans;
}

double log_ratio(const Batch& batch, int64_t token) {
  return std::clamp(batch.logp[token] - batch.old_logp[token], -kClamp, kClamp);
}

double statistic_at(const Batch& batch, const Span& span, Statistic statistic, size_t k) {
  std::vector<double> x;
  for (const int64_t token : span.tokens) x.push_back(log_ratio(batch, token));
  return tokenrl::statistic_at(statistic, x, k);
}

struct Expected {
  double loss = 0;
  std::vector<double> coef;
};

template <class Gate>
Gated<double> gated(const Batch& batch, const Span& span, size_t k, double s) {
  const int64_t token = span.tokens[k];
  const double x = log_ratio(batch, token), logp = batch.logp[token], advantage = batch.advantages[span.sequence];
  const auto params = params_from<Gate, double>([&](size_t j) { return batch.bounds[j][token]; });
  const double t = static_cast<double>(k + 1);
  return Gate::eval(GateInput<double>{s, x, logp, advantage, position_power<Gate>(t, params)}, params);
}

// The definition: s_t's own effect on l_t (local), or that of x_t on all of its span (through), one product per pair of
// tokens.
template <class Gate>
Expected expected(const Batch& batch, StatisticFlow pair) {
  Expected out{0, std::vector<double>(batch.tokens)};
  for (const Span& span : spans_of(batch)) {
    for (size_t k = 0; k < span.tokens.size(); ++k) {
      const int64_t token = span.tokens[k];
      const double weight = batch.span_weight[span.sequence] / batch.normalizer * batch.token_weight[token];
      const double s = statistic_at(batch, span, pair.statistic, k), capped = std::fmin(s, kCap);
      const Gated<double> g = gated<Gate>(batch, span, k, capped);
      out.loss += weight * g.value;
      const double shared = s <= kCap ? weight * g.d_s : 0;
      out.coef[token] += weight * g.d_logp;
      for (size_t j = 0; j < span.tokens.size(); ++j) {
        const int64_t to = span.tokens[j];
        const bool inside = std::fabs(batch.logp[to] - batch.old_logp[to]) <= kClamp;
        const double own = pair.through ? (inside ? entry(pair.statistic, k, j, span.tokens.size()) : 0) : j == k;
        out.coef[to] += shared * own;
      }
    }
  }
  return out;
}

// Whether a bound becomes active or inactive in between.
bool crosses(const Result& a, const Result& b) {
  return !std::equal(std::begin(a.metrics) + kLow, std::begin(a.metrics) + kKlSum, std::begin(b.metrics) + kLow);
}

template <class Gate>
void check_differences(const Batch& given, StatisticFlow pair, const std::vector<double>& coef,
                       const std::string& what) {
  const std::string name = Gate::name;
  // Stopped gradients have no difference.
  const auto stopped = [&](const char* part) { return name.find(part) != std::string::npos; };
  if (!pair.through || stopped("cispo") || stopped("topr") || stopped("vespo") || stopped("dppo") || stopped("rec") ||
      stopped("unbiased"))
    return;
  Batch batch(name);
  int compared = 0;
  for (int64_t token = 0; token < batch.tokens; ++token) {
    if (!batch.mask[token]) continue;
    const double h = 1e-5, distance = std::fabs(given.logp[token] - given.old_logp[token]) - kClamp;
    const auto moved = [&](double by) {
      batch.logp[token] = given.logp[token] + by;
      const Result result = evaluate(batch, name, Gate::num_params, pair);
      batch.logp[token] = given.logp[token];
      return result;
    };
    const Result before = moved(-h), here = moved(0), after = moved(h);
    const double left = (here.loss - before.loss) / h, right = (after.loss - here.loss) / h;
    if (crosses(before, after) || std::fabs(distance) < 2 * h || std::fabs(left - right) > 1e-3) continue;  // an edge
    if (distance > 0 && stopped("dhpo")) continue;  // its own ratio's derivative is 1 beyond the clamp too
    near(what + " difference at " + std::to_string(token), coef[token], (after.loss - before.loss) / (2 * h), 1e-7);
    ++compared;
  }
  near(what + ": enough tokens lie away from edges", compared > 30, 1, 0);
}

template <class Gate>
void check_pair(StatisticFlow pair) {
  const std::string gate = Gate::name, statistic = kStatistics[static_cast<int>(pair.statistic)];
  const std::string what = gate + " " + statistic + (pair.through ? " through" : " local");
  const Batch batch(gate);
  const Result kernel = evaluate(batch, gate, Gate::num_params, pair);
  const Expected truth = expected<Gate>(batch, pair);
  near(what + " loss", kernel.loss, truth.loss, 1e-12);
  for (int64_t token = 0; token < batch.tokens; ++token)
    near(what + " coef " + std::to_string(token), kernel.coef[token], truth.coef[token], 1e-12);
  check_differences<Gate>(batch, pair, kernel.coef, what);
  const Result shared = evaluate(batch, gate, Gate::num_params, pair, kShares);
  const bool same_metrics = std::equal(kernel.metrics, kernel.metrics + kNumMetrics, shared.metrics);
  near(what + ": the same bits in other shares",
       shared.loss == kernel.loss && shared.coef == kernel.coef && same_metrics, 1, 0);
}

template <class... Gate>
void check_all(std::tuple<Gate...>*) {
  for (const StatisticFlow pair : kPairs) (check_pair<Gate>(pair), ...);
}

}  // namespace

int main() {
  check_all(static_cast<Gates*>(nullptr));
  return report("objective");
}
