// Every link and score under several schedules, and what each token gets of the gradient, against loops in double.
#include "../../../csrc/cuda/preference.h"

#include <algorithm>
#include <numeric>

#include "batch.h"

namespace tokenrl {

struct Options {
  Coupling coupling;
  bool mean, everything;  // all that may be given
};

// The arguments of a call, and memory for its results.
template <class T>
struct Call {
  Batch<T> batch;
  Options options;
  std::vector<int64_t> pairs{1, 3, 4, 1, 5, 2, 5, 4};  // sequence 1 is chosen in one and rejected in another
  std::vector<double> pair_weight{0.5, 1.0, 2.0, 0.25}, slopes, rewards;
  std::unique_ptr<bool[]> desirable{new bool[6]{true, false, true, true, false, false}}, nll_mask;
  double base = 0.3, normalizer = 3, nll_normalizer = 7, accuracy = 0;
  T loss = 0;
  PreferenceTokens<T> tokens{};
  LinkArgs links{};

  explicit Call(const Options& options, bool reference) : options(options), nll_mask(new bool[batch.tokens]) {
    for (int64_t i = 0; i < batch.tokens; ++i) nll_mask[i] = batch.mask[i] && i % 3 > 0;
    tokens.spans = batch.spans(true, false);
    tokens.logp = batch.logp.data();
    if (reference) tokens.ref_logp = batch.old_logp.data();
    tokens.sums_reference = options.coupling == Coupling::sorted_margins && reference;
    tokens.sums_nll = options.everything;
    links.row = {options.coupling, options.mean, options.everything, 0.5, 0, 0, options.everything ? 0.7 : 0.0, {}};
    std::fill_n(links.row.link_params, kMaxLinkParams, 0.1);
    links.num_sequences = batch.sequences, links.num_losses = links.labelled() ? batch.sequences : 4;
    links.pairs = pairs.data(), links.desirable = desirable.get();
    if (options.everything) give_everything();
    slopes.resize(3 * links.num_sequences), rewards.resize(3 * links.num_losses);
    links.slopes = {slopes.data(), slopes.data() + batch.sequences, slopes.data() + 2 * batch.sequences};
    links.rewards = rewards.data(), links.accuracy = &accuracy;
    links.loss = &loss, links.loss_double = sizeof(T) == 8;
  }
  void give_everything() {
    tokens.token_weight = batch.token_weight.data(), tokens.divergence = batch.advantages.data();
    tokens.divergence_weight = batch.bounds.data(), tokens.nll_mask = nll_mask.get();
    links.row.divergence = links.labelled() ? 0 : 0.4, links.row.length = 0.01;
    links.base = &base, links.normalizer = &normalizer, links.nll_normalizer = &nll_normalizer;
    links.pair_weight = links.labelled() ? nullptr : pair_weight.data(), links.nll_of_all = true;
  }
};

template <class T>
double times(const T* weight, int64_t token, double x) {
  return weight ? x * static_cast<double>(weight[token]) : x;
}
template <class T>
double log_ratio(const PreferenceTokens<T>& tokens, int64_t token) {
  const double logp = static_cast<double>(tokens.logp[token]);
  return tokens.ref_logp ? logp - static_cast<double>(tokens.ref_logp[token]) : logp;
}

template <class T>
SequenceSums sums_of(const PreferenceTokens<T>& tokens, int64_t i) {
  SequenceSums sums{};
  for (int64_t k = tokens.spans.cu_seqlens[i]; k < tokens.spans.cu_seqlens[i + 1]; ++k) {
    if (tokens.sums_nll && (tokens.nll_mask ? tokens.nll_mask : tokens.spans.mask)[k])
      sums.nll += static_cast<double>(tokens.logp[k]), sums.nll_tokens += 1;
    if (!tokens.spans.mask[k]) continue;
    sums.tokens += 1, sums.log_ratio += times(tokens.token_weight, k, log_ratio(tokens, k));
    if (tokens.divergence)
      sums.divergence += times(tokens.divergence_weight, k, static_cast<double>(tokens.divergence[k]));
    if (tokens.sums_reference) sums.reference += times(tokens.token_weight, k, static_cast<double>(tokens.ref_logp[k]));
  }
  return sums;
}

std::vector<size_t> order_of(const std::vector<double>& x, bool sorted) {
  std::vector<size_t> order(x.size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (sorted) std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) { return x[i] < x[j]; });
  return order;
}

struct Truth {
  double loss = 0;
  std::vector<double> slopes;
};

// The loss and the slopes of pairs, or of labelled sequences, of the scores of their sequences.
template <class Link>
Truth truth_of(const LinkArgs& args, const std::vector<SequenceScore>& of) {
  const size_t count = static_cast<size_t>(args.num_losses), sequences = of.size();
  const bool margins = args.row.coupling == Coupling::sorted_margins, labelled = args.labelled();
  double base = 0;
  for (const SequenceScore& one : of) base += one.score / static_cast<double>(sequences);
  std::vector<double> x, y;
  for (size_t m = 0; m < count; ++m) {
    const SequenceScore &won = of[labelled ? m : args.pairs[2 * m]], &lost = of[labelled ? m : args.pairs[2 * m + 1]];
    x.push_back(won.score + won.divergence), y.push_back(lost.score + lost.divergence);
    if (labelled) y[m] = args.base ? *args.base : base;
    if (margins) x[m] += won.reference - y[m] - lost.reference, y[m] = won.reference - lost.reference;
  }
  Truth truth{0, std::vector<double>(3 * sequences, 0.0)};
  const auto first = order_of(x, is_sorted(args.row.coupling)), second = order_of(y, is_sorted(args.row.coupling));
  const auto params = params_from<Link, double>([&](size_t n) { return args.row.link_params[n]; });
  for (size_t k = 0; k < count; ++k) {
    const size_t i = first[k], j = second[k];
    const Linked found = Link::eval({x[i], y[j], labelled && args.desirable[k]}, params);
    const double share = (args.pair_weight ? args.pair_weight[k] : 1) / (args.normalizer ? *args.normalizer : count);
    truth.loss += share * found.value;
    const auto add = [&](size_t sequence, double by, bool diverges) {
      truth.slopes[sequence] += share * by * of[sequence].slope;
      truth.slopes[sequences + sequence] += diverges ? share * by * args.row.divergence : 0;
    };
    add(labelled ? i : args.pairs[2 * i], found.by_chosen, !labelled && !args.row.divergence_of_rejected_alone);
    if (!labelled) add(args.pairs[2 * (margins ? i : j) + 1], margins ? -found.by_chosen : found.by_rejected, true);
  }
  for (size_t i = 0; i < sequences && args.row.nll > 0; ++i) {
    truth.slopes[2 * sequences + i] = -args.row.nll / *args.nll_normalizer;
    truth.loss -= args.row.nll / *args.nll_normalizer * of[i].nll;
  }
  return truth;
}

// The gradients of log-probs, divergences and both weights, one after another.
template <class T>
std::vector<double> gradients_of(const Call<T>& call, double upstream) {
  const PreferenceTokens<T>& tokens = call.tokens;
  const size_t n = static_cast<size_t>(call.batch.tokens), sequences = static_cast<size_t>(call.batch.sequences);
  std::vector<double> grads(4 * n, 0.0);
  for (size_t i = 0; i < sequences; ++i)
    for (int64_t k = tokens.spans.cu_seqlens[i]; k < tokens.spans.cu_seqlens[i + 1]; ++k) {
      const size_t at = static_cast<size_t>(k);
      const double by = upstream * call.slopes[i], by_divergence = upstream * call.slopes[sequences + i];
      if (tokens.sums_nll && tokens.nll_mask[k]) grads[at] += upstream * call.slopes[2 * sequences + i];
      if (!tokens.spans.mask[k]) continue;
      grads[at] += times(tokens.token_weight, k, by);
      grads[n + at] = times(tokens.divergence_weight, k, by_divergence);
      grads[2 * n + at] = by * log_ratio(tokens, k);
      if (tokens.divergence) grads[3 * n + at] = by_divergence * static_cast<double>(tokens.divergence[k]);
    }
  return grads;
}

template <class T>
void check_backward(Call<T>& call, const std::string& what) {
  const size_t n = static_cast<size_t>(call.batch.tokens);
  const T upstream = T(0.7);
  TokenGradients<T> args{call.tokens, &upstream, call.links.slopes, nullptr, nullptr, nullptr, nullptr};
  const auto made = under_all_schedules(what, [&] {
    std::vector<T> grads(4 * n, static_cast<T>(std::nan("")));
    T* const at = grads.data();
    args.of_logp = at, args.of_divergence = at + n, args.of_token_weight = at + 2 * n;
    if (call.tokens.divergence) args.of_divergence_weight = at + 3 * n;
    else std::fill_n(at + 3 * n, n, T(0));
    expect(!cuda::preference_backward(args, nullptr), what);
    return grads;
  });
  expect_close(made, gradients_of(call, static_cast<double>(upstream)), tolerance_of<T>(), what);
}

template <class Link, class Score, class T>
void check_preference(const Options& options) {
  const bool needs_negative = std::string(Link::name) == "odds_ratio";
  if (needs_negative && !options.mean) return;
  Call<T> call(options, !needs_negative);
  const std::string what = std::string(Link::name) + " " + Score::name + " " +
                           kCouplings[static_cast<int>(options.coupling)] + (options.mean ? " mean" : "") +
                           (options.everything ? " everything" : "") + " bytes=" + std::to_string(sizeof(T));
  std::vector<SequenceScore> scores;
  for (int64_t i = 0; i < call.batch.sequences; ++i)
    scores.push_back(score_of<Score>(sums_of(call.tokens, i), call.links.row));
  std::vector<char> scratch(cuda::preference_scratch_bytes(call.links), '\xff');
  const auto made = under_all_schedules(what, [&] {
    std::fill(call.slopes.begin(), call.slopes.end(), std::nan(""));
    expect(!cuda::preference(call.tokens, Score::name, Link::name, call.links, scratch.data(), nullptr), what);
    std::vector<double> found(call.slopes);
    found.push_back(static_cast<double>(call.loss)), found.push_back(call.accuracy);
    found.insert(found.end(), call.rewards.begin(), call.rewards.end());
    return found;
  });
  Truth truth = truth_of<Link>(call.links, scores);
  expect_close(std::vector<double>(made.begin(), made.begin() + 3 * call.batch.sequences), truth.slopes,
               tolerance_of<T>(), what + " slopes");
  expect_close(std::vector<double>{static_cast<double>(call.loss)}, {truth.loss}, tolerance_of<T>(), what);
  check_backward(call, what + " backward");
}

template <class T, class... Link>
void check_links(std::tuple<Link...>*) {
  const auto check = [](auto link, bool mean, bool everything) {
    using Chosen = decltype(link);
    const std::string name = Chosen::name;
    const bool labelled = name == "kto" || name == "apo_zero_unpaired" || name == "bco_unpaired";
    const Coupling coupling = labelled ? Coupling::labels : Coupling::pairs;
    check_preference<Chosen, ReverseKlScore, T>({coupling, mean, everything});
  };
  (check(Link{}, true, false), ...);
  (check(Link{}, false, true), ...);
}

}  // namespace tokenrl

int main() {
  using namespace tokenrl;
  check_links<float>(static_cast<Links*>(nullptr));
  check_links<double>(static_cast<Links*>(nullptr));
  for (const bool everything : {false, true}) {
    check_preference<SigmoidLink, ForwardKlScore, float>({Coupling::pairs, false, everything});
    check_preference<SigmoidLink, JsScore, double>({Coupling::pairs, false, everything});
    check_preference<SigmoidLink, AlphaScore, float>({Coupling::pairs, false, everything});
  }
  for (const Coupling coupling : {Coupling::sorted_margins, Coupling::sorted_scores}) {
    check_preference<SigmoidLink, ReverseKlScore, float>({coupling, true, false});
    check_preference<BcoLink, ReverseKlScore, double>({coupling, false, false});
  }
  std::printf("all as expected\n");
}
