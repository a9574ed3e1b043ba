// The preference loss: sums over tokens (preference_sums.cpp), then the links of the sequences' scores.
#include "preference.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

namespace tokenrl::cpu {
namespace {

double base_of(const LinkArgs& args) {
  if (!args.labelled()) return 0;
  if (args.base) return *args.base;
  double sum = 0;
  for (int64_t i = 0; i < args.num_sequences; ++i) sum += args.sequences[i].score;
  return sum / static_cast<double>(larger(args.num_sequences, int64_t{1}));
}

void sort(const double* x, int64_t n, int64_t* order) {
  std::iota(order, order + n, int64_t{0});
  std::sort(order, order + n, [x](int64_t i, int64_t j) { return comes_before(x, i, j); });
}

// Its value; slopes.nll says of each sequence whether it has a part, and then what a token of it is worth.
double nll_term(const LinkArgs& args) {
  double *by = args.slopes.nll, sum = 0, tokens = 0;
  if (args.row.nll == 0) return 0;
  for (int64_t i = 0; i < args.num_sequences; ++i)
    by[i] = args.nll_of_all || (args.labelled() && args.desirable[i]) ? 1.0 : 0.0;
  for (int64_t m = 0; m < args.num_losses && !args.labelled(); ++m)
    if (const Sides sides = sides_of(args, m); are_sequences(args, sides)) by[sides.chosen] = 1;
  for (int64_t i = 0; i < args.num_sequences; ++i)
    if (by[i] != 0) sum += args.sequences[i].nll, tokens += args.sequences[i].nll_tokens;
  const double per_token = args.row.nll / (args.nll_normalizer ? *args.nll_normalizer : larger(tokens, 1.0));
  for (int64_t i = 0; i < args.num_sequences; ++i) by[i] = by[i] != 0 ? -per_token : 0.0;
  return -per_token * sum;
}

template <class Link>
void run_links(const LinkArgs& args) {
  const int64_t count = args.num_losses;
  for (double* slopes : {args.slopes.log_ratio, args.slopes.divergence, args.slopes.nll})
    std::fill_n(slopes, args.num_sequences, 0.0);
  const double base = base_of(args), least = static_cast<double>(larger(count, int64_t{1}));
  const double normalizer = args.normalizer ? *args.normalizer : least;
  int64_t successes = 0;
  for (int64_t m = 0; m < count; ++m) successes += take_scores(args, base, m);
  *args.accuracy = static_cast<double>(successes) / least;
  if (args.memory.chosen_order) {
    sort(args.memory.chosen, count, args.memory.chosen_order);
    sort(args.memory.rejected, count, args.memory.rejected_order);
  }
  double loss = 0;
  for (int64_t k = 0; k < count; ++k) loss += link_scores<Link>(args, normalizer, k);
  for (int64_t m = 0; m < count; ++m) {
    const Sides sides = args.labelled() ? Sides{m, m} : sides_of(args, m);
    if (!are_sequences(args, sides)) continue;
    add_slopes(args, m, sides.chosen);
    if (sides.rejected != sides.chosen) add_slopes(args, m, sides.rejected);
  }
  write_loss(args, loss / normalizer + nll_term(args));
}

template <class... Link>
bool run_links(std::tuple<Link...>*, const char* name, const LinkArgs& args) {
  return ((std::strcmp(Link::name, name) == 0 && (run_links<Link>(args), true)) || ...);
}

template <class... Score>
bool run_scores(std::tuple<Score...>*, const char* name, const SequenceSums* sums, SequenceScore* scores,
                const LinkArgs& args) {
  const auto run = [&](auto score) {
    for (int64_t i = 0; i < args.num_sequences; ++i) scores[i] = score_of<decltype(score)>(sums[i], args.row);
    return true;
  };
  return ((std::strcmp(Score::name, name) == 0 && run(Score{})) || ...);
}

}  // namespace

template <class T>
bool preference(const PreferenceTokens<T>& tokens, const char* score, const char* link, LinkArgs args,
                const Threads& threads) {
  const size_t sequences = static_cast<size_t>(args.num_sequences), count = static_cast<size_t>(args.num_losses);
  std::vector<SequenceSums> sums(sequences);
  std::vector<SequenceScore> scores(sequences);
  std::vector<double> values(4 * count);
  std::vector<int64_t> orders(is_sorted(args.row.coupling) ? 2 * count : 0);
  sequence_sums(tokens, sums.data(), threads);
  args.sequences = scores.data();
  double* at = values.data();
  int64_t* order = orders.empty() ? nullptr : orders.data();
  args.memory = {at, at + count, at + 2 * count, at + 3 * count, order, order ? order + count : nullptr};
  return run_scores(static_cast<Scores*>(nullptr), score, sums.data(), scores.data(), args) &&
         run_links(static_cast<Links*>(nullptr), link, args);
}

template bool preference(const PreferenceTokens<float>&, const char*, const char*, LinkArgs, const Threads&);
template bool preference(const PreferenceTokens<double>&, const char*, const char*, LinkArgs, const Threads&);

}  // namespace tokenrl::cpu
