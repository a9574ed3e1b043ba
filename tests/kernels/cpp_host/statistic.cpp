// The statistics and their adjoints under several schedules, against loops in double.
#include "../../../csrc/cuda/launch.h"
#include "batch.h"

namespace tokenrl {

template <class T>
std::vector<double> truth_of(const Batch<T>& batch, Statistic statistic, bool segments, bool adjoint) {
  std::vector<double> truth(batch.tokens, 0.0);
  for (int64_t i = 0; i < batch.sequences; ++i) {
    for (const auto& span : spans_of(batch.spans(true, segments), i)) {
      std::vector<double> x(span.size());
      for (size_t k = 0; k < x.size(); ++k)
        x[k] =
            static_cast<double>(batch.logp[span[k]]) - (adjoint ? 0.0 : static_cast<double>(batch.old_logp[span[k]]));
      for (size_t k = 0; k < x.size(); ++k) {
        if (!adjoint) truth[span[k]] = statistic_at(statistic, x, k);
        else
          for (size_t j = 0; j < x.size(); ++j) truth[span[k]] += entry(statistic, j, k, x.size()) * x[j];
      }
    }
  }
  return truth;
}

template <class T>
std::vector<T> run(const Batch<T>& batch, Statistic statistic, bool segments, bool adjoint) {
  std::vector<T> result(batch.tokens, static_cast<T>(std::nan("")));
  const StatisticArgs<T> args{batch.spans(true, segments), batch.logp.data(), adjoint ? nullptr : batch.old_logp.data(),
                              result.data()};
  std::vector<char> scratch(cuda::statistic_scratch_bytes(args), '\xff');
  cuda::statistic(args, statistic, adjoint, scratch.data(), nullptr);
  return result;
}

// check(statistic, segments, adjoint, what) for all that the op is asked for.
template <class Check>
void for_all_statistics(Check check) {
  for (const StatisticFlow& pair : kPairs)
    for (bool adjoint : {false, true})
      for (bool segments : {false, true})
        if (!adjoint || pair.through)
          check(pair.statistic, segments, adjoint,
                std::string(kStatistics[static_cast<int>(pair.statistic)]) + (adjoint ? " adjoint" : ""));
}

template <class T>
void check_statistics(const Batch<T>& batch) {
  for_all_statistics([&](Statistic statistic, bool segments, bool adjoint, const std::string& what) {
    const auto out = under_all_schedules(what, [&] { return run(batch, statistic, segments, adjoint); });
    expect_close(out, truth_of(batch, statistic, segments, adjoint), tolerance_of<T>(), what);
  });
}

// A block for each tile finds what one block for all of them does.
template <class T>
void check_tiles() {
  const auto apart = Batch<T>::of_tiles(), together = apart.in_one_block();
  for_all_statistics([&](Statistic statistic, bool segments, bool adjoint, const std::string& what) {
    const auto out = run(apart, statistic, segments, adjoint);
    expect(same_bits(out, run(together, statistic, segments, adjoint)), what + ": other bits in several blocks");
    if (sizeof(T) == 8 && segments)
      expect_close(out, truth_of(apart, statistic, segments, adjoint), tolerance_of<T>(), what + " in tiles");
  });
  const auto whole = Batch<double>::of_tiles();
  expect_close(run(whole, Statistic::prefix_mean, false, true), truth_of(whole, Statistic::prefix_mean, false, true),
               tolerance_of<double>(), "a mean's adjoint over tiles");
}

}  // namespace tokenrl

int main() {
  using namespace tokenrl;
  check_statistics(Batch<float>());
  check_statistics(Batch<double>());
  check_tiles<float>();
  check_tiles<double>();
  std::printf("all as expected\n");
}
