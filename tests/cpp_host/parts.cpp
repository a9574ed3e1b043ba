// The statistics, the position-adaptive clip, the aggregation weights and the log-probs under several schedules,
// against loops in double.
#include <map>
#include <set>

#include "../../csrc/cuda/launch.h"
#include "batch.h"

namespace tokenrl {

template <class T>
void check_statistics(const Batch<T>& batch) {
  for (const Pair& pair : kPairs) {
    for (bool adjoint : {false, true}) {
      if (adjoint && !pair.through) continue;
      for (bool segments : {false, true}) {
        const std::string what =
            std::string(kStatistics[static_cast<int>(pair.statistic)]) + (adjoint ? " adjoint" : "");
        std::vector<int32_t> counts(batch.tokens);
        const auto out = under_all_schedules(what, [&] {
          std::vector<T> result(batch.tokens, static_cast<T>(std::nan("")));
          const StatisticArgs<T> args{batch.spans(true, segments), batch.logp.data(),
                                      adjoint ? nullptr : batch.old_logp.data(), result.data()};
          cuda::statistic(args, pair.statistic, adjoint, counts.data(), nullptr);
          return result;
        });
        std::vector<double> truth(batch.tokens, 0.0);
        for (int64_t i = 0; i < batch.sequences; ++i) {
          for (const auto& span : spans_of(batch.spans(true, segments), i)) {
            std::vector<double> x(span.size());
            for (size_t k = 0; k < x.size(); ++k)
              x[k] = static_cast<double>(batch.logp[span[k]]) -
                     (adjoint ? 0.0 : static_cast<double>(batch.old_logp[span[k]]));
            for (size_t k = 0; k < x.size(); ++k) {
              if (!adjoint)
                truth[span[k]] = statistic_at(pair.statistic, x, k);
              else
                for (size_t j = 0; j < x.size(); ++j) truth[span[k]] += entry(pair.statistic, j, k, x.size()) * x[j];
            }
          }
        }
        expect_close(out, truth, tolerance_of<T>(), what);
      }
    }
  }
}

template <class T>
void check_band(const Batch<T>& batch) {
  const auto out = under_all_schedules("band", [&] {
    std::vector<T> result(2 * batch.tokens, static_cast<T>(std::nan("")));
    const BandArgs<T> args{batch.spans(true, false),
                           batch.advantages.data(),
                           {{batch.bounds.data(), T(0)}, {nullptr, T(0.2)}, {nullptr, T(0.5)}},
                           result.data(),
                           result.data() + batch.tokens};
    cuda::position_adaptive_clip(args, nullptr);
    return result;
  });
  std::vector<double> truth(2 * batch.tokens, 0.0);
  for (int64_t i = 0; i < batch.sequences; ++i) {
    const auto valid = spans_of(batch.spans(true, false), i)[0];
    for (size_t k = 0; k < valid.size(); ++k) {
      const double x = batch.advantages[valid[k]], width = std::sqrt(k + 1.0), low = -batch.bounds[valid[k]] * width,
                   high = 0.2 * width;
      truth[valid[k]] = std::fmin(std::fmax(x, low), high);
      truth[batch.tokens + valid[k]] = x >= low && x <= high;
    }
  }
  expect_close(out, truth, tolerance_of<T>(), "band");
}

// 300 sequences, so that groups lie in more than one tile.
struct Groups {
  int64_t sequences = 300, tokens = 900;
  std::vector<int64_t> cu_seqlens, ids;
  std::vector<float> advantages;
  std::unique_ptr<bool[]> mask{new bool[tokens]};

  Groups() : cu_seqlens(sequences + 1), ids(sequences), advantages(tokens) {
    for (int64_t i = 0; i < sequences; ++i) {
      cu_seqlens[i + 1] = cu_seqlens[i] + i % 7;
      ids[i] = (i * 31 % 11) - 5;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      mask[t] = t % 5 != 2;
      advantages[t] = mask[t] ? static_cast<float>(t * 37 % 19 - 9) : std::nanf("");
    }
    for (int64_t t = cu_seqlens[20]; t < cu_seqlens[22]; ++t) advantages[t] = 0;
  }
};

void check_weights(const Groups& batch, Span span, Unit unit) {
  const std::string what =
      std::string("weights ") + kSpans[static_cast<int>(span)] + " " + kUnits[static_cast<int>(unit)];
  const bool balanced = span == Span::balanced;
  const auto out = under_all_schedules(what, [&] {
    std::vector<double> weight(batch.sequences + 1, std::nan(""));
    int64_t count = 0;
    std::vector<char> scratch(cuda::aggregation_weights_scratch_bytes(batch.sequences), '\xff');
    const WeightArgs args{{batch.tokens, batch.sequences, batch.cu_seqlens.data(), batch.mask.get(), nullptr},
                          balanced ? batch.advantages.data() : nullptr,
                          false,
                          true,
                          balanced || span == Span::group ? batch.ids.data() : nullptr,
                          weight.data(),
                          &count};
    cuda::aggregation_weights(args, span, unit, scratch.data(), nullptr);
    weight.back() = static_cast<double>(count);
    return weight;
  });
  std::map<int64_t, std::map<int, std::pair<double, double>>> groups;  // group -> sign -> rows, tokens
  std::vector<std::pair<double, int>> own(batch.sequences);            // tokens, sign
  double tokens = 0, rows = 0;
  for (int64_t i = 0; i < batch.sequences; ++i) {
    double n = 0, sum = 0;
    for (int64_t t = batch.cu_seqlens[i]; t < batch.cu_seqlens[i + 1]; ++t)
      if (batch.mask[t]) n += 1, sum += batch.advantages[t];
    own[i] = {n, balanced ? (sum > 0) - (sum < 0) : 0};
    if (n == 0) continue;
    tokens += n;
    rows += 1;
    auto& cell = groups[batch.ids[i]][own[i].second];
    cell.first += 1;
    cell.second += n;
  }
  std::vector<double> truth(batch.sequences + 1, 0.0);
  for (int64_t i = 0; i < batch.sequences; ++i) {
    const auto [n, sign] = own[i];
    if (n == 0) continue;
    auto& group = groups[batch.ids[i]];
    if (span == Span::one) truth[i] = 1;
    if (span == Span::inverse_length) truth[i] = 1 / n;
    if (span == Span::group) truth[i] = 1 / group[0].second;
    if (balanced && sign != 0) truth[i] = group[sign].first / (group[1].first + group[-1].first) / group[sign].second;
  }
  truth.back() = unit == Unit::tokens ? tokens : unit == Unit::rows ? rows : static_cast<double>(groups.size());
  expect_close(out, truth, 1e-14, what);
}

template <class Logit, class T>
std::vector<Logit> random_logits(int64_t n) {
  std::mt19937 random(5);
  std::normal_distribution<double> normal(0.0, 2.0);
  std::vector<Logit> logits(n);
  for (auto& x : logits) {
    const double z = normal(random);
    x = narrow<Logit>(static_cast<T>(z < -3.5 ? -INFINITY : z));
  }
  return logits;
}

// Two rows of three tokens, of which the last is ignored; `gap` logits between tokens leave rows at every alignment.
template <class Logit, class T>
void check_logprobs(int64_t vocab, int64_t gap) {
  const int64_t rows = 6, stride = vocab + gap, stride_batch = 3 * stride + 1;
  auto logits = random_logits<Logit, T>(stride_batch + 2 * stride + vocab);
  const std::vector<int64_t> ids{0, vocab - 1, vocab / 2, vocab / 3, vocab + 4, kIgnoredId};
  const std::vector<T> grad_logp{1, T(-0.5), 0, 2, 1, 3}, grad_entropy{0, 1, T(0.25), -1, 1, 3};
  const std::string what =
      "logprobs V=" + std::to_string(vocab) + " gap=" + std::to_string(gap) + " bytes=" + std::to_string(sizeof(Logit));
  const T temperature = T(0.8);
  LogprobArgs<Logit, T> args{2,  3,  vocab, stride_batch, stride, logits.data(), ids.data(), temperature, {},
                             {}, {}, {},    {},           {}};
  const auto out = under_all_schedules(what, [&] {
    std::vector<T> result(3 * rows, static_cast<T>(std::nan("")));
    args.logp = result.data();
    args.entropy = args.logp + rows;
    args.lse = args.entropy + rows;
    cuda::token_logprobs(args, nullptr);
    return result;
  });
  std::vector<T> saved = out;
  args.entropy = saved.data() + rows;
  args.lse = args.entropy + rows;
  args.grad_logp = grad_logp.data();
  args.grad_entropy = grad_entropy.data();
  const auto grads = under_all_schedules(what + " backward", [&] {
    std::vector<Logit> grad(rows * vocab, narrow<Logit>(static_cast<T>(std::nan(""))));
    args.grad_logits = grad.data();
    cuda::token_logprobs_backward(args, nullptr);
    return grad;
  });
  std::vector<double> truth(3 * rows, 0.0), grad_truth(rows * vocab, 0.0), grad_kernel(rows * vocab);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t v = 0; v < vocab; ++v) grad_kernel[i * vocab + v] = widen(grads[i * vocab + v]);
    if (ids[i] == kIgnoredId) continue;
    const Logit* row = logits.data() + i / 3 * stride_batch + i % 3 * stride;
    double sum = 0, entropy = 0;
    for (int64_t v = 0; v < vocab; ++v) sum += std::exp(widen(row[v]) / static_cast<double>(temperature));
    const double lse = std::log(sum);
    const auto log_p = [&](int64_t v) { return widen(row[v]) / static_cast<double>(temperature) - lse; };
    for (int64_t v = 0; v < vocab; ++v)
      if (std::isfinite(log_p(v))) entropy -= std::exp(log_p(v)) * log_p(v);
    truth[i] = ids[i] < vocab ? log_p(ids[i]) : std::nan("");
    truth[rows + i] = sum > 0 ? entropy : std::nan("");  // as torch has it for a row of nothing but -inf
    truth[2 * rows + i] = lse;
    for (int64_t v = 0; v < vocab; ++v) {
      const double p = std::exp(log_p(v)), pull = p > 0 ? p * (log_p(v) + entropy) : 0.0;
      grad_truth[i * vocab + v] = (grad_logp[i] * ((v == ids[i]) - p) - grad_entropy[i] * pull) / temperature;
    }
  }
  expect_close(out, truth, tolerance_of<T>(), what);
  expect_close(grad_kernel, grad_truth, sizeof(Logit) == 2 ? 4e-3 : tolerance_of<T>(), what + " backward");
}

template <class Logit, class T>
void check_all_logprobs() {
  for (const auto& [vocab, gap] : {std::pair<int64_t, int64_t>{1, 0}, {7, 0}, {64, 0}, {333, 1}, {1000, 3}, {4099, 0}})
    check_logprobs<Logit, T>(vocab, gap);
}

}  // namespace tokenrl

int main() {
  using namespace tokenrl;
  check_statistics(Batch<float>());
  check_statistics(Batch<double>());
  check_band(Batch<float>());
  check_band(Batch<double>());
  const Groups groups;
  for (Span span : {Span::one, Span::inverse_length, Span::group, Span::balanced})
    for (Unit unit : {Unit::tokens, Unit::rows, Unit::groups})
      if (unit != Unit::groups || span == Span::group || span == Span::balanced) check_weights(groups, span, unit);
  check_all_logprobs<float, float>();
  check_all_logprobs<double, double>();
  check_all_logprobs<BFloat16, float>();
  check_all_logprobs<Half, float>();
  std::printf("all as expected\n");
}
