// What preference_ops.h hands to a kernel, and the steps that both devices make of it: sums over the tokens of each
// sequence, its score, the links of the scores, and what each token's share of a sum is worth. T is float or double;
// pointers marked optional may be null. N tokens, S sequences, M losses: one per pair, or per labelled sequence.
#pragma once

#include "kernels.h"
#include "links.h"

namespace tokenrl {

// Which scores a link meets (tokenrl/objectives/preference.py).
enum class Coupling { pairs, sorted_margins, sorted_scores, labels };
inline constexpr const char* kCouplings[] = {"pairs", "sorted_margins", "sorted_scores", "labels"};
TRL_HD constexpr bool is_sorted(Coupling coupling) {
  return coupling == Coupling::sorted_margins || coupling == Coupling::sorted_scores;
}

struct PreferenceRow {
  Coupling coupling;
  bool mean, divergence_of_rejected_alone;
  double score_param, divergence, length, nll;
  double link_params[kMaxLinkParams];  // beta is the first of every link

  TRL_HD double beta() const { return link_params[0]; }
};

// Over one sequence's tokens: of w (logp - ref_logp), v D, w ref_logp and 1; of logp and 1 over those of the nll term.
struct SequenceSums {
  double log_ratio, divergence, reference, tokens, nll, nll_tokens;
};
// What links and metrics read of a sequence. slope: of its score in its sum of log ratios.
struct SequenceScore {
  double score, slope, divergence, reference, reward, nll, nll_tokens;
};
// The gradient of the loss in sums of each sequence, [S] each.
struct SumSlopes {
  double *log_ratio, *divergence, *nll;
};

template <class T>
struct PreferenceTokens {
  Spans spans;
  const T *logp, *ref_logp, *divergence;      // [N], the last two optional
  const T *token_weight, *divergence_weight;  // [N], each optional
  const bool* nll_mask;                       // [N], optional: the valid tokens
  bool sums_reference, sums_nll;              // whether anybody reads those sums
};

// Memory of the links, [M] each: the two scores of a link, the gradient in them, and in which order they meet, null
// where in none.
struct LinkMemory {
  double *chosen, *rejected, *by_chosen, *by_rejected;
  int64_t *chosen_order, *rejected_order;
};

struct LinkArgs {
  PreferenceRow row;
  int64_t num_sequences, num_losses;
  const SequenceScore* sequences;             // [S]
  const int64_t* pairs;                       // [M, 2], optional: halves
  const bool* desirable;                      // [S], of labelled sequences
  const double* base;                         // [1], optional: the mean of their scores
  const double* pair_weight;                  // [M], optional
  const double *normalizer, *nll_normalizer;  // [1], each optional: M, and the number of the nll term's tokens
  bool nll_of_all;                            // sequences, not of the chosen ones alone
  LinkMemory memory;
  SumSlopes slopes;
  double *rewards, *accuracy;  // [3, M], of the chosen and the rejected and margins; [1]
  void* loss;                  // [1], float or double
  bool loss_double;

  TRL_HD bool labelled() const { return row.coupling == Coupling::labels; }
};

template <class T>
struct TokenGradients {
  PreferenceTokens<T> tokens;
  const T* upstream;                                                    // [1]
  SumSlopes slopes;                                                     // read
  T *of_logp, *of_divergence, *of_token_weight, *of_divergence_weight;  // [N], each optional
};

template <class Score>
TRL_HD SequenceScore score_of(const SequenceSums& sums, const PreferenceRow& row) {
  const double length = row.mean ? larger(sums.tokens, 1.0) : 1.0;
  const Slope found = Score::eval(sums.log_ratio, row.score_param);
  return {found.value / length + row.length / row.beta() * sums.tokens,
          found.by_x / length,
          row.divergence * sums.divergence,
          sums.reference / length,
          row.beta() * (sums.log_ratio / length + sums.divergence),
          sums.nll,
          sums.nll_tokens};
}

struct Sides {
  int64_t chosen, rejected;
};
TRL_HD Sides sides_of(const LinkArgs& args, int64_t m) {
  if (!args.pairs) return {m, args.num_losses + m};
  return {args.pairs[2 * m], args.pairs[2 * m + 1]};
}
// On a GPU nobody has looked at the numbers of sequences: a pair of others has no score, and the loss shows it.
TRL_HD bool are_sequences(const LinkArgs& args, const Sides& sides) {
  return smaller(sides.chosen, sides.rejected) >= 0 && larger(sides.chosen, sides.rejected) < args.num_sequences;
}

// Step 1, of each m: the scores that are to meet, and the metrics. Returns whether the margin is above 0.
TRL_HD bool take_scores(const LinkArgs& args, double base, int64_t m) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  double reward = nan, other_reward = nan, margin = nan, chosen = nan, rejected = nan;
  if (args.labelled()) {
    const SequenceScore& own = args.sequences[m];
    const double distance = own.reward - args.row.beta() * base;
    reward = args.desirable[m] ? own.reward : nan, other_reward = args.desirable[m] ? nan : own.reward;
    margin = args.desirable[m] ? distance : -distance;
    chosen = own.score, rejected = base;
  } else if (const Sides sides = sides_of(args, m); are_sequences(args, sides)) {
    const SequenceScore &won = args.sequences[sides.chosen], &lost = args.sequences[sides.rejected];
    reward = won.reward, other_reward = lost.reward, margin = won.reward - lost.reward;
    chosen = won.score + won.divergence, rejected = lost.score + lost.divergence;
    if (args.row.coupling == Coupling::sorted_margins) {
      chosen = chosen + won.reference - rejected - lost.reference;
      rejected = won.reference - lost.reference;
    }
  }
  args.memory.chosen[m] = chosen, args.memory.rejected[m] = rejected;
  double* rewards = args.rewards + m;
  rewards[0] = reward, rewards[args.num_losses] = other_reward, rewards[2 * args.num_losses] = margin;
  return margin > 0;
}

// Whether x[i] comes before x[j]; NaN comes last, and what is equal as it stands.
TRL_HD bool comes_before(const double* x, int64_t i, int64_t j) {
  const bool i_nan = x[i] != x[i], j_nan = x[j] != x[j];
  if (i_nan || j_nan) return i_nan == j_nan ? i < j : j_nan;
  return x[i] == x[j] ? i < j : x[i] < x[j];
}

// Step 2, of each k: the k-th loss before it is divided, and the gradient in the two scores that meet there.
template <class Link>
TRL_HD double link_scores(const LinkArgs& args, double normalizer, int64_t k) {
  const LinkMemory& at = args.memory;
  const int64_t i = at.chosen_order ? at.chosen_order[k] : k, j = at.rejected_order ? at.rejected_order[k] : k;
  const auto params = params_from<Link, double>([&](size_t n) { return args.row.link_params[n]; });
  const Linked found = Link::eval({at.chosen[i], at.rejected[j], args.labelled() && args.desirable[k]}, params);
  const double weight = args.pair_weight ? args.pair_weight[k] : 1.0;
  at.by_chosen[i] = weight * found.by_chosen / normalizer;
  at.by_rejected[j] = weight * found.by_rejected / normalizer;
  return weight * found.value;
}

// Step 3, of each m: what it adds to the slopes of a sequence that it names.
TRL_HD void add_slopes(const LinkArgs& args, int64_t m, int64_t sequence) {
  const double by = args.memory.by_chosen[m], slope = args.sequences[sequence].slope, share = args.row.divergence;
  if (args.labelled()) {
    args.slopes.log_ratio[sequence] = by * slope;
    return;
  }
  const Sides sides = sides_of(args, m);
  const bool margins = args.row.coupling == Coupling::sorted_margins;
  const double by_rejected = margins ? -by : args.memory.by_rejected[m];
  if (sides.chosen == sequence) {
    args.slopes.log_ratio[sequence] += by * slope;
    args.slopes.divergence[sequence] += args.row.divergence_of_rejected_alone ? 0 : by * share;
  }
  if (sides.rejected == sequence) {
    args.slopes.log_ratio[sequence] += by_rejected * slope;
    args.slopes.divergence[sequence] += by_rejected * share;
  }
}

TRL_HD void write_loss(const LinkArgs& args, double loss) {
  if (args.loss_double) *static_cast<double*>(args.loss) = loss;
  else *static_cast<float*>(args.loss) = static_cast<float>(loss);
}

}  // namespace tokenrl
