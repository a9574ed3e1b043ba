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
void check_statistics(const Batch<T>& batch) {
  for (const StatisticFlow& pair : kPairs) {
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
        expect_close(out, truth_of(batch, pair.statistic, segments, adjoint), tolerance_of<T>(), what);
      }
    }
  }
}

}  // namespace tokenrl

int main() {
  using namespace tokenrl;
  check_statistics(Batch<float>());
  check_statistics(Batch<double>());
  std::printf("all as expected\n");
}
