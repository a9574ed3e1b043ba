// Each statistic x flow through the whole CPU objective: coef against central differences of the loss (flow "through"),
// and against the formula w d_s + w d_logp (flow "local"), with a hole, two segments and a span without valid tokens.
#include <vector>

#include "check.h"
#include "cpu/kernels.h"

using namespace tokenrl;

namespace {

const cpu::Threads kInline{
    [](int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, n); }};

struct Batch {
  std::vector<double> logp{-1, -2, -0.5, -1.5, -0.7, -1.1, -2.2, -0.3},
      old_logp{-1.2, -1.9, -0.9, -1.45, -0.8, -1.0, -2.0, -0.31};
  std::vector<double> advantages{0.9, -1.3, 0.4}, span_weight{0.5, 0.25, 1.0}, normalizer{2.0};
  std::vector<int64_t> cu_seqlens{0, 5, 7, 8};
  bool mask[8] = {true, true, false, true, true, true, true, false}, starts[8] = {};
  double loss = 0, coef[8], metrics[kNumMetrics];

  void run(Statistic statistic, bool through, const char* gate) {
    ObjectiveArgs<double> args{};
    args.spans = {8, 3, cu_seqlens.data(), mask, starts};
    args.logp = logp.data();
    args.old_logp = old_logp.data();
    args.advantages = advantages.data();
    args.span_weight = span_weight.data();
    args.normalizer = normalizer.data();
    const double params[kMaxParams] = {0.02, 0.03, 0.5, 0.5};
    for (int k = 0; k < kMaxParams; ++k) args.params[k] = {nullptr, params[k]};
    if (std::string(gate) == "sapo") args.params[0].value = args.params[1].value = 1.0;
    args.clamp = 20;
    args.cap = 10;
    args.loss = &loss;
    args.coef = coef;
    args.metrics = metrics;
    if (!cpu::objective(args, statistic, through, gate, kInline)) near(std::string("there is a gate ") + gate, 0, 1, 0);
  }
};

void check_through(Statistic statistic, const char* gate, bool segments) {
  Batch batch;
  batch.starts[3] = segments;
  batch.run(statistic, true, gate);
  const Batch truth = batch;
  for (int i = 0; i < 8; ++i) {
    double loss[2];
    for (int side = 0; side < 2; ++side) {
      batch.logp = truth.logp;
      batch.logp[i] += side ? 1e-6 : -1e-6;
      batch.run(statistic, true, gate);
      loss[side] = batch.loss;
    }
    near(std::string(kStatistics[static_cast<int>(statistic)]) + " through " + gate + " token " + std::to_string(i),
         truth.coef[i], (loss[1] - loss[0]) / 2e-6, 1e-7);
  }
}

// Under flow "local" kl_k2 has coef w s, and identity with weight 1 leaves w: s is read off and compared with sums
// written out.
void check_local(Statistic statistic) {
  Batch batch;
  batch.run(statistic, false, "kl_k2");
  const double w = 0.5 / 2, x[] = {0.2, -0.1, 0, -0.05, 0.1}, m[] = {1, 1, 0, 1, 1};
  double sum = 0, least = 0, total = 0.15;
  int count = 0;
  for (int i = 0; i < 5; ++i) {
    if (m[i] == 0) continue;
    const double before = count ? least : 0;
    sum += x[i];
    least = count ? std::fmin(least, x[i]) : x[i];
    ++count;
    const double s[] = {x[i], sum, sum / count, before + x[i], std::fmin(before, 0.0) + x[i], total, total / 4};
    near(std::string(kStatistics[static_cast<int>(statistic)]) + " local token " + std::to_string(i), batch.coef[i],
         w * s[static_cast<int>(statistic)], 1e-12);
  }
  near("masked cell", batch.coef[2], 0, 0);
  near("tokens", batch.metrics[kTokens], 6, 0);
}

}  // namespace

int main() {
  for (Statistic statistic :
       {Statistic::token, Statistic::prefix_sum, Statistic::prefix_mean, Statistic::span_sum, Statistic::span_mean})
    for (const char* gate : {"kl_k2", "kl_k3", "sapo", "kl_k1"})
      for (bool segments : {false, true}) check_through(statistic, gate, segments);
  for (Statistic statistic : {Statistic::prefix_sum, Statistic::prefix_mean, Statistic::prefix_min,
                              Statistic::prefix_min_capped, Statistic::span_sum, Statistic::span_mean})
    check_local(statistic);
  return report("statistic");
}
