// The position-adaptive clip under several schedules, against a loop in double.
#include "../../../csrc/cuda/launch.h"
#include "batch.h"

namespace tokenrl {

template <class T>
void check_clip(const Batch<T>& batch) {
  const auto out = under_all_schedules("position-adaptive clip", [&] {
    std::vector<T> result(2 * batch.tokens, static_cast<T>(std::nan("")));
    const ClipArgs<T> args{batch.spans(true, false),
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
  expect_close(out, truth, tolerance_of<T>(), "position-adaptive clip");
}

}  // namespace tokenrl

int main() {
  using namespace tokenrl;
  check_clip(Batch<float>());
  check_clip(Batch<double>());
  std::printf("all as expected\n");
}
