// The objective's vector loops over a block of tokens. Only for sources that are compiled once per instruction set.
#pragma once

#include "objective_lanes.h"
#include "totals.h"

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

// Tokens whose sums are taken in T; blocks are added up in double.
constexpr int64_t kBlock = 512;
// A sum over a block counts the tokens that a bound clips, and those of A > 0 in multiples of this.
constexpr int64_t kPositive = 2 * kBlock;

// A gate's parameters, of which those given per token are looked up for each; a masked cell's may be anything. The
// others are filled in by a loop and handed out by reference: what the compiler sees too early to be the same for all
// tokens becomes branches, with which loops over tokens do not vectorise.
template <class T, class Gate, bool kPerToken>
struct ParamLookup {
  const ObjectiveArgs<T>& args;
  ParamsOf<Gate, T> numbers;

  explicit ParamLookup(const ObjectiveArgs<T>& given) : args(given), numbers{} {
    T* all = reinterpret_cast<T*>(&numbers);  // a struct of nothing but these
    for (int k = 0; k < Gate::num_params; ++k) all[k] = given.params[k].value;
  }
  TRL_INLINE decltype(auto) at([[maybe_unused]] int64_t token, [[maybe_unused]] bool valid) const {
    if constexpr (!kPerToken) return (numbers);
    else
      return params_from<Gate, T>([&](size_t k) {
        const Param<T>& param = args.params[k];
        return !param.tensor ? param.value : valid ? param.tensor[token] : T(1);
      });
  }
};

// A loop of its own: what the gate waits for would else be the longest part of its way.
template <class T, class Gate, bool kPerToken>
inline void position_powers(const ObjectiveArgs<T>& args, int64_t token, int64_t first, int64_t last,
                            const Lanes<T>& lanes) {
  if constexpr (Gate::positional) {
    const T* t = lanes.t;
    T* out = lanes.t_power;
    const ParamLookup<T, Gate, kPerToken> params(args);
    if (!kPerToken && params.at(token, true).power == T(0.5)) {
#pragma omp simd
      for (int64_t k = first; k < last; ++k) out[k] = std::sqrt(larger(t[k], T(1)));
      return;
    }
#pragma omp simd
    for (int64_t k = first; k < last; ++k)
      out[k] = position_power<Gate>(larger(t[k], T(1)), params.at(token + k, lanes.valid[k] != 0));
  }
}

// Metrics of tokens first to last, in double.
template <class T>
inline void wide_metrics_loop(T cap, int64_t first, int64_t last, const Lanes<T>& lanes, Totals& totals) {
  const T *x = lanes.x, *statistic = lanes.s, *valids = lanes.valid;
  double tokens = 0, sum = 0, lowest = infinity<double>(), highest = -infinity<double>();
  double kl = 0, squares = 0, x_sum = 0;
#pragma omp simd reduction(+ : tokens, sum, kl, squares, x_sum) reduction(min : lowest) reduction(max : highest)
  for (int64_t k = first; k < last; ++k) {
    const bool counts = valids[k] != 0;
    const double ratio = wide_exponential(smaller(statistic[k], cap)), one = counts ? ratio : 0.0;
    tokens += static_cast<double>(valids[k]);
    sum += one;
    squares += one * one;
    const double least = counts ? ratio : infinity<double>(), most = counts ? ratio : -infinity<double>();
    lowest = least < lowest ? least : lowest;
    highest = highest < most ? most : highest;
    kl += counts ? wide_excess(x[k]) : 0.0;
    x_sum += static_cast<double>(x[k]);
  }
  totals.add({0, {tokens, sum, lowest, highest, 0, 0, 0, kl, squares, x_sum, 0, 0}});
}

// The ratios e^s of tokens first to last, and the metrics. kOwn: s is x, whose exponential then is the ratio.
template <bool kOwn, class T>
inline void ratio_loop(T cap, int64_t first, int64_t last, const Lanes<T>& lanes, Totals& totals) {
  const T *x = lanes.x, *statistic = lanes.s, *valids = lanes.valid;
  T* ratios = lanes.ratio;
  T tokens = 0, sum = 0, lowest = infinity<T>(), highest = 0, kl = 0, squares = 0, x_sum = 0;
#pragma omp simd reduction(+ : tokens, sum, kl, squares, x_sum) reduction(min : lowest) reduction(max : highest)
  for (int64_t k = first; k < last; ++k) {
    const bool counts = valids[k] != 0;
    const T own = exponential(x[k]), ratio = kOwn ? own : exponential(smaller(statistic[k], cap));
    const T one = select(counts, ratio, T(0));
    ratios[k] = ratio;
    tokens += valids[k];
    sum += one;
    squares += one * one;
    const T least = select(counts, ratio, infinity<T>());
    lowest = least < lowest ? least : lowest;
    highest = highest < one ? one : highest;
    kl += excess(x[k], own);
    x_sum += x[k];
  }
  // What floats cannot hold or square is added up once more.
  if (sizeof(T) == sizeof(double) || ((lowest > T(1e-19)) & (highest < T(1e19)) & (kl < infinity<T>())))
    totals.add({0, {tokens, sum, lowest, highest, 0, 0, 0, kl, squares, x_sum, 0, 0}});
  else wide_metrics_loop(cap, first, last, lanes, totals);
}

// Value and partials of tokens first to last. kPerToken: some parameter is a tensor.
template <class T, class Gate, bool kPerToken>
inline void gate_loop(const ObjectiveArgs<T>& args, int64_t token, int64_t first, int64_t last, const Lanes<T>& lanes,
                      Totals& totals) {
  const T *statistic = lanes.s, *x = lanes.x, *t_power = lanes.t_power, *logp = lanes.logp, *ratio = lanes.ratio;
  const T* advantage = lanes.advantage;
  const T *weights = lanes.weight, *valids = lanes.valid;
  T *shared = lanes.shared, *direct = lanes.direct;
  const ParamLookup<T, Gate, kPerToken> params(args);
  const T cap = args.cap;
  T loss = 0, low = 0, high = 0, dual = 0;
#pragma omp simd reduction(+ : loss, low, high, dual)
  for (int64_t k = first; k < last; ++k) {
    const T valid = valids[k], weight = weights[k], uncapped = statistic[k], s = smaller(uncapped, cap);
    const T power = Gate::positional ? t_power[k] : T(1);
    const Gated<T> g =
        Gate::eval(GateInput<T>{s, x[k], logp[k], advantage[k], power, ratio[k]}, params.at(token + k, valid != 0));
    const bool pays = weight != 0, counts = valid != 0;
    shared[k] = select(pays & (uncapped <= cap), weight * g.d_s, T(0));
    direct[k] = select(pays, weight * g.d_logp, T(0));
    loss += select(pays, weight * g.value, T(0));
    const T step = select(advantage[k] > 0, T(1 + kPositive), T(1));
    low += select(counts, step * g.low, T(0));
    high += select(counts, step * g.high, T(0));
    dual += select(counts, g.dual, T(0));
  }
  Totals block{};
  const auto count = [&block](Metric all, Metric of_positive, T both) {
    block.metrics[all] = static_cast<double>(static_cast<int64_t>(both) % kPositive);
    block.metrics[of_positive] = static_cast<double>(static_cast<int64_t>(both) / kPositive);
  };
  block.loss = static_cast<double>(loss);
  count(kLow, kLowPos, low);
  count(kHigh, kHighPos, high);
  block.metrics[kDual] = static_cast<double>(dual);
  totals.add_sums(block);
}

// A gate's part of a block: powers of the position, value and partials. `token` is where the lanes begin.
template <class T>
using GateBlock = void (*)(const ObjectiveArgs<T>& args, int64_t token, int64_t first, int64_t last,
                           const Lanes<T>& lanes, Totals& totals);
template <class T, class Gate, bool kPerToken>
__attribute__((noinline)) void gate_block(const ObjectiveArgs<T>& args, int64_t token, int64_t first, int64_t last,
                                          const Lanes<T>& lanes, Totals& totals) {
  position_powers<T, Gate, kPerToken>(args, token, first, last, lanes);
  gate_loop<T, Gate, kPerToken>(args, token, first, last, lanes, totals);
}

// All that depends on the gate: the rest of the objective is compiled once for all of them. Doubles do without loops of
// their own for parameters that are numbers.
template <class T>
struct GateBlocks {
  bool positional;
  int num_params;
  GateBlock<T> of_numbers, of_tensors;
};
template <class T, class Gate>
constexpr GateBlocks<T> kGateBlocks{Gate::positional, Gate::num_params, &gate_block<T, Gate, std::is_same_v<T, double>>,
                                    &gate_block<T, Gate, true>};

}  // namespace
}  // namespace tokenrl::cpu::TOKENRL_ISA
