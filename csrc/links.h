// The tables of links and of scores of preference objectives, one functor each: the loss of a pair, or of one labelled
// sequence, and its partials; and f'(e^x) of an f-divergence. Formulas: tokenrl/objectives/links.py and scores.py. Each
// derivative stands on the line after its value. Torch-free; host and device; double.
#pragma once

#include <tuple>

#include "gates/base.h"

namespace tokenrl {

TRL_HD double logistic(double x) {
  const double e = ::exp(x < 0 ? x : -x);  // the one that does not overflow
  return x < 0 ? e / (1 + e) : 1 / (1 + e);
}
TRL_HD double log_logistic(double x) { return (x < 0 ? x : 0.0) - ::log1p(::exp(x < 0 ? x : -x)); }
// log(1 - e^x), x < 0, without cancellation.
TRL_HD double log_one_minus_exponential(double x) {
  return x > -0.6931471805599453 ? ::log(-::expm1(x)) : ::log1p(-::exp(x));
}

// The scores of a pair; or that of a labelled sequence and, in place of the rejected one, what it is compared with.
struct Scored {
  double chosen, rejected;
  bool desirable;
};
// by_rejected is that of a pair alone: what a labelled sequence is compared with is constant.
struct Linked {
  double value = 0, by_chosen = 0, by_rejected = 0;
};
// Of what depends on the difference of the scores alone.
TRL_HD Linked of_margin(double value, double slope) { return {value, slope, -slope}; }

struct SigmoidLink {
  static constexpr const char* name = "sigmoid";
  TRL_PARAMS(beta, label_smoothing, gamma);
  TRL_HD static Linked at(double margin, double beta, double e, double gamma) {
    const double u = beta * margin - gamma;
    return of_margin(-product(1 - e, log_logistic(u)) - product(e, log_logistic(-u)), beta * (logistic(u) - (1 - e)));
  }
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    return at(of.chosen - of.rejected, p.beta, p.label_smoothing, p.gamma);
  }
};

struct AlphaPoLink {
  static constexpr const char* name = "alphapo";
  TRL_PARAMS(beta, label_smoothing, gamma, alpha);
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    const double chosen = ::exp(-p.alpha * of.chosen), rejected = ::exp(-p.alpha * of.rejected);
    Linked out = SigmoidLink::at((rejected - chosen) / p.alpha, p.beta, p.label_smoothing, p.gamma);
    out.by_chosen *= chosen, out.by_rejected *= rejected;
    return out;
  }
};

struct HingeLink {
  static constexpr const char* name = "hinge";
  TRL_PARAMS(beta);
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    const double value = larger(1 - p.beta * (of.chosen - of.rejected), 0.0);
    return of_margin(value, value > 0 ? -p.beta : 0.0);
  }
};

struct SquaredLink {
  static constexpr const char* name = "squared";
  TRL_PARAMS(beta);
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    const double distance = of.chosen - of.rejected - 1 / (2 * p.beta);
    return of_margin(distance * distance, 2 * distance);
  }
};

struct RobustLink {
  static constexpr const char* name = "robust";
  TRL_PARAMS(beta, label_smoothing);
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    const double e = p.label_smoothing, u = p.beta * (of.chosen - of.rejected), scale = 1 - 2 * e;
    return of_margin((e * log_logistic(-u) - (1 - e) * log_logistic(u)) / scale,
                     -p.beta * ((1 - e) * logistic(-u) + e * logistic(u)) / scale);
  }
};

struct ExoLink {
  static constexpr const char* name = "exo";
  TRL_PARAMS(beta, label_smoothing);
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    const double u = p.beta * (of.chosen - of.rejected), q = logistic(u), rest = logistic(-u);
    const double log_kept = ::log1p(-p.label_smoothing), log_flipped = ::log(p.label_smoothing);
    return of_margin(q * (log_logistic(u) - log_kept) + rest * (log_logistic(-u) - log_flipped),
                     p.beta * q * rest * (u - log_kept + log_flipped));
  }
};

struct DiscopopLink {
  static constexpr const char* name = "discopop";
  TRL_PARAMS(beta, tau);
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    const double u = p.beta * (of.chosen - of.rejected), m = logistic(u / p.tau), log_u = log_logistic(u);
    const double blended = ::exp(log_logistic(u / p.tau) - u);  // m e^-u, where that is 0 inf too
    return of_margin(blended - (1 - m) * log_u,
                     p.beta * ((1 - m) / p.tau * (blended + m * log_u) - blended - (1 - m) * logistic(-u)));
  }
};

struct NcaLink {
  static constexpr const char* name = "nca";
  TRL_PARAMS(beta);
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    const double a = p.beta * of.chosen, b = p.beta * of.rejected;
    return {-log_logistic(a) - (log_logistic(-a) + log_logistic(-b)) / 2, p.beta * (logistic(a) / 2 - logistic(-a)),
            p.beta * logistic(b) / 2};
  }
};

struct BcoLink {
  static constexpr const char* name = "bco";
  TRL_PARAMS(beta);
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    const double a = p.beta * of.chosen, b = p.beta * of.rejected;
    return {-log_logistic(a) - log_logistic(-b), -p.beta * logistic(-a), p.beta * logistic(b)};
  }
};

struct SppoLink {
  static constexpr const char* name = "sppo";
  TRL_PARAMS(beta);
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    const double won = of.chosen - 1 / (2 * p.beta), lost = of.rejected + 1 / (2 * p.beta);
    return {won * won + lost * lost, 2 * won, 2 * lost};
  }
};

struct ApoZeroLink {
  static constexpr const char* name = "apo_zero";
  TRL_PARAMS(beta);
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    const double a = logistic(p.beta * of.chosen), b = logistic(p.beta * of.rejected);
    return {1 - a + b, -p.beta * a * (1 - a), p.beta * b * (1 - b)};
  }
};

struct ApoDownLink {
  static constexpr const char* name = "apo_down";
  TRL_PARAMS(beta);
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    const double a = logistic(p.beta * of.chosen), d = logistic(p.beta * (of.chosen - of.rejected));
    return {a + 1 - d, p.beta * (a * (1 - a) - d * (1 - d)), p.beta * d * (1 - d)};
  }
};

struct OddsRatioLink {
  static constexpr const char* name = "odds_ratio";
  TRL_PARAMS(beta);
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    const double chosen = of.chosen - log_one_minus_exponential(of.chosen);
    const double u = chosen - of.rejected + log_one_minus_exponential(of.rejected), slope = p.beta * logistic(-u);
    return {-p.beta * log_logistic(u), slope / ::expm1(of.chosen), -slope / ::expm1(of.rejected)};
  }
};

struct KtoLink {
  static constexpr const char* name = "kto";
  TRL_PARAMS(beta, desirable_weight, undesirable_weight);
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    const double s = logistic(p.beta * (of.chosen - of.rejected)), slope = p.beta * s * (1 - s);
    return {of.desirable ? p.desirable_weight * (1 - s) : p.undesirable_weight * s,
            of.desirable ? -p.desirable_weight * slope : p.undesirable_weight * slope, 0};
  }
};

// Kto's where nothing is to be compared with: the rejected score is 0.
struct ApoZeroUnpairedLink : KtoLink {
  static constexpr const char* name = "apo_zero_unpaired";
};

struct BcoUnpairedLink {
  static constexpr const char* name = "bco_unpaired";
  TRL_PARAMS(beta);
  TRL_HD static Linked eval(const Scored& of, const Params<double>& p) {
    const double sign = of.desirable ? 1 : -1, v = sign * p.beta * (of.chosen - of.rejected);
    return {-log_logistic(v), -sign * p.beta * logistic(-v), 0};
  }
};

using Links =
    std::tuple<SigmoidLink, AlphaPoLink, HingeLink, SquaredLink, RobustLink, ExoLink, DiscopopLink, NcaLink, BcoLink,
               SppoLink, ApoZeroLink, ApoDownLink, OddsRatioLink, KtoLink, ApoZeroUnpairedLink, BcoUnpairedLink>;
inline constexpr int kMaxLinkParams = most_params(static_cast<Links*>(nullptr));

// A score and its derivative in the log ratio of a sequence.
struct Slope {
  double value, by_x;
};

struct ReverseKlScore : NoParams {
  static constexpr const char* name = "reverse_kl";
  TRL_HD static Slope eval(double x, double) { return {x, 1}; }
};
struct ForwardKlScore : NoParams {
  static constexpr const char* name = "forward_kl";
  TRL_HD static Slope eval(double x, double) { return {-::expm1(-x), ::exp(-x)}; }
};
struct JsScore : NoParams {
  static constexpr const char* name = "js";
  TRL_HD static Slope eval(double x, double) { return {0.6931471805599453 + log_logistic(x), logistic(-x)}; }
};
struct AlphaScore {
  static constexpr const char* name = "alpha";
  TRL_PARAMS(alpha);
  TRL_HD static Slope eval(double x, double alpha) {
    const double power = (alpha - 1) * x;
    return alpha == 1 ? Slope{x, 1} : Slope{::expm1(power) / (alpha - 1), ::exp(power)};
  }
};

using Scores = std::tuple<ReverseKlScore, ForwardKlScore, JsScore, AlphaScore>;

}  // namespace tokenrl
