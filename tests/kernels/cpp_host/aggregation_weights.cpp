// The aggregation weights under several schedules, against loops in double.
#include <map>

#include "../../../csrc/cuda/launch.h"
#include "batch.h"

namespace tokenrl {

constexpr double kScale = 0.3;

// 300 sequences, so that groups lie in more than one tile.
struct Groups {
  int64_t sequences = 300, tokens = 1092;
  std::vector<int64_t> cu_seqlens, ids;
  std::vector<float> advantages;
  std::unique_ptr<bool[]> mask{new bool[tokens]};

  Groups() : cu_seqlens(sequences + 1), ids(sequences), advantages(tokens) {
    for (int64_t i = 0; i < sequences; ++i) {
      cu_seqlens[i + 1] = cu_seqlens[i] + (i == 5 ? 3 * 64 + 5 : i % 7);  // one is read 16 bytes at a time
      ids[i] = (i * 31 % 11) - 5;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      mask[t] = t % 5 != 2;
      advantages[t] = mask[t] ? static_cast<float>(t * 37 % 19 - 9) : std::nanf("");
    }
    for (int64_t t = cu_seqlens[20]; t < cu_seqlens[22]; ++t) advantages[t] = 0;
  }
};

// The weights, then the normalizer.
std::vector<double> truth_of(const Groups& batch, Span span, Unit unit) {
  const bool balanced = span == Span::balanced;
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
    if (balanced && sign != 0)
      truth[i] = group[sign].first / (group[0].first + group[1].first + group[-1].first) / group[sign].second;
  }
  const double counted[] = {1, tokens, rows, static_cast<double>(groups.size())};
  truth.back() = kScale * counted[static_cast<int>(unit)];
  return truth;
}

void check_weights(const Groups& batch, Span span, Unit unit) {
  const std::string what =
      std::string("weights ") + kSpans[static_cast<int>(span)] + " " + kUnits[static_cast<int>(unit)];
  const bool balanced = span == Span::balanced;
  const auto out = under_all_schedules(what, [&] {
    std::vector<double> weight(batch.sequences + 1, std::nan(""));
    unsigned ticket = 0;
    std::vector<char> scratch(cuda::aggregation_weights_scratch_bytes(batch.sequences), '\xff');
    const WeightArgs args{{batch.tokens, batch.sequences, batch.cu_seqlens.data(), batch.mask.get(), nullptr},
                          balanced ? batch.advantages.data() : nullptr,
                          false,
                          true,
                          balanced || span == Span::group ? batch.ids.data() : nullptr,
                          kScale,
                          weight.data(),
                          &weight.back()};
    cuda::aggregation_weights(args, span, unit, scratch.data(), &ticket, nullptr);
    expect(ticket == 0, what + ": the ticket is not 0 again");
    return weight;
  });
  expect_close(out, truth_of(batch, span, unit), 1e-14, what);
}

}  // namespace tokenrl

int main() {
  using namespace tokenrl;
  const Groups groups;
  for (Span span : {Span::one, Span::inverse_length, Span::group, Span::balanced})
    for (Unit unit : {Unit::one, Unit::tokens, Unit::rows, Unit::groups})
      if (unit != Unit::groups || span == Span::group || span == Span::balanced) check_weights(groups, span, unit);
  std::printf("all as expected\n");
}
