// The objective of each sequence: a sequential walk for the statistic, then a vector loop over its tokens for the gate.
// Compiled once per instruction set (TOKENRL_ISA): nothing here may leave a linkable copy of a shared function behind.
#include "objective_lanes.h"
#include "scratch.h"
#include "totals.h"

#ifndef TOKENRL_GATES  // csrc/fused/library.cpp compiles this for another tuple of gates
#define TOKENRL_GATES Gates
#endif

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

// Tokens whose sums are taken in T; blocks are added up in double.
constexpr int64_t kBlock = 512;
// A sum over a block counts the tokens that a bound clips, and those of A > 0 in multiples of this.
constexpr int64_t kPositive = 2 * kBlock;

// Whether a token's coefficient depends on nothing behind it, so that a sequence can be worked off in pieces that stay
// in the first-level cache.
template <class T>
inline bool streams(const Spans& spans, Statistic statistic, bool through) {
  return sizeof(T) == sizeof(float) && !spans.starts && !over_span(statistic) &&
         (!through || statistic == Statistic::token);
}

inline void statistic_lanes(const Spans& spans, Sequence q, Statistic statistic, const Lanes<double>& lanes, Carry&) {
  statistic_of(spans, q, statistic, lanes.x, lanes.s, lanes.t);
}
inline void statistic_lanes(const Spans& spans, Sequence q, Statistic statistic, const Lanes<float>& lanes,
                            Carry& carry) {
  if (spans.starts) statistic_of(spans, q, statistic, lanes.x, lanes.s, lanes.t);
  else scan_lanes(statistic, lanes.x, lanes.valid, q.end - q.begin, lanes.s, lanes.t, carry);
}

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

// Value and partials of tokens first to last. kPerToken: some parameter is a tensor.
template <class T, class Gate, bool kPerToken>
inline void gate_loop(const ObjectiveArgs<T>& args, int64_t token, int64_t first, int64_t last, const Lanes<T>& lanes,
                      Totals& totals) {
  const T *statistic = lanes.s, *x = lanes.x, *t_power = lanes.t_power, *logp = lanes.logp;
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
        Gate::eval(GateInput<T>{s, x[k], logp[k], advantage[k], power}, params.at(token + k, valid != 0));
    const bool pays = weight != 0, counts = valid != 0;
    shared[k] = pays & (uncapped <= cap) ? weight * g.d_s : T(0);
    direct[k] = pays ? weight * g.d_logp : T(0);
    loss += pays ? weight * g.value : T(0);
    const T step = advantage[k] > 0 ? T(1 + kPositive) : T(1);
    low += counts ? step * g.low : T(0);
    high += counts ? step * g.high : T(0);
    dual += counts ? g.dual : T(0);
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

// The same in double.
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

template <class T>
inline void metrics_loop(T cap, int64_t first, int64_t last, const Lanes<T>& lanes, Totals& totals) {
  const T *x = lanes.x, *statistic = lanes.s, *valids = lanes.valid;
  T tokens = 0, sum = 0, lowest = infinity<T>(), highest = -infinity<T>(), kl = 0, squares = 0, x_sum = 0;
#pragma omp simd reduction(+ : tokens, sum, kl, squares, x_sum) reduction(min : lowest) reduction(max : highest)
  for (int64_t k = first; k < last; ++k) {
    const bool counts = valids[k] != 0;
    const T ratio = exponential(smaller(statistic[k], cap)), one = counts ? ratio : T(0);
    tokens += valids[k];
    sum += one;
    squares += one * one;
    const T least = counts ? ratio : infinity<T>(), most = counts ? ratio : -infinity<T>();
    lowest = least < lowest ? least : lowest;
    highest = highest < most ? most : highest;
    kl += counts ? excess(x[k]) : T(0);
    x_sum += x[k];
  }
  // What floats cannot hold or square is added up once more.
  if (sizeof(T) == sizeof(double) || ((lowest > T(1e-19)) & (highest < T(1e19)) & (kl < infinity<T>())))
    totals.add({0, {tokens, sum, lowest, highest, 0, 0, 0, kl, squares, x_sum, 0, 0}});
  else wide_metrics_loop(cap, first, last, lanes, totals);
}

template <class T, class Gate, bool kPerToken>
inline void run_gate_loops(const ObjectiveArgs<T>& args, Sequence q, const Lanes<T>& lanes, Totals& totals) {
  const int64_t n = q.end - q.begin;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = smaller(first + kBlock, n);
    position_powers<T, Gate, kPerToken>(args, q.begin, first, last, lanes);
    gate_loop<T, Gate, kPerToken>(args, q.begin, first, last, lanes, totals);
    metrics_loop(args.cap, first, last, lanes, totals);
  }
}

// q: tokens of sequence i, all of them unless they stream.
template <class T, class Gate>
void run_piece(const ObjectiveArgs<T>& args, const Spans& spans, Statistic statistic, bool through, Sequence q,
               int64_t i, T* memory, Carry& carry, Totals& totals) {
  const int64_t n = q.end - q.begin;
  const Lanes<T> lanes(memory, n);
  load(args, q, i, lanes);
  statistic_lanes(spans, q, statistic, lanes, carry);
  bool per_token = false;
  for (int j = 0; j < Gate::num_params; ++j) per_token = per_token || args.params[j].tensor;
  if (per_token) run_gate_loops<T, Gate, true>(args, q, lanes, totals);
  else run_gate_loops<T, Gate, false>(args, q, lanes, totals);
  if (through && statistic != Statistic::token) adjoint_of(spans, q, statistic, lanes.t, lanes.shared);
  T* coef = args.coef + q.begin;
  const T *shared = lanes.shared, *direct = lanes.direct, *valid = lanes.valid, *passes = lanes.passes;
  const T clamped = through ? T(0) : T(1);  // the true derivative stops where the log ratio was clamped
#pragma omp simd
  for (int64_t k = 0; k < n; ++k)
    coef[k] = valid[k] != 0 ? (passes[k] + clamped != 0 ? shared[k] : T(0)) + direct[k] : T(0);
}

template <class T, class Gate>
void run_sequence(const ObjectiveArgs<T>& args, Statistic statistic, bool through, int64_t i, T* memory,
                  Totals& totals) {
  const Sequence given = sequence_of(args.spans, i), q = without_padding(args.spans, given);
  for (int64_t token = given.begin; token < q.begin; ++token) args.coef[token] = 0;
  for (int64_t token = q.end; token < given.end; ++token) args.coef[token] = 0;
  Spans spans = args.spans;
  if (!is_segmented(spans, q)) spans.starts = nullptr;  // and has the bits of one without segments
  const int64_t length = streams<T>(spans, statistic, through) ? kBlock : larger(q.end - q.begin, int64_t{1});
  Carry carry;
  totals = Totals::nothing();
  for (int64_t begin = q.begin; begin < q.end; begin += length)
    run_piece<T, Gate>(args, spans, statistic, through, {begin, smaller(begin + length, q.end)}, i, memory, carry,
                       totals);
}

template <class T, class Gate>
void run_gate(const ObjectiveArgs<T>& args, Statistic statistic, bool through, Totals* totals, const Threads& threads) {
  parallel(threads, args.spans.num_sequences, sequences_of(args.spans, 4096), [&](int64_t begin, int64_t end) {
    int64_t longest = kBlock;
    for (int64_t i = begin; i < end && !streams<T>(args.spans, statistic, through); ++i) {
      const Sequence q = sequence_of(args.spans, i);
      longest = larger(longest, q.end - q.begin);
    }
    const Scratch<T> memory(Lanes<T>::room(longest) * Lanes<T>::kArrays);
    for (int64_t i = begin; i < end; ++i) run_sequence<T, Gate>(args, statistic, through, i, memory.at, totals[i]);
  });
}

template <class T, class... Gate>
bool run_named(std::tuple<Gate...>*, const char* name, const ObjectiveArgs<T>& args, Statistic statistic, bool through,
               Totals* totals, const Threads& threads) {
  return (
      (std::strcmp(Gate::name, name) == 0 && (run_gate<T, Gate>(args, statistic, through, totals, threads), true)) ||
      ...);
}

template <class T>
void add_up_sequences(const ObjectiveArgs<T>& args, const Totals* per_sequence) {
  Totals sum = Totals::nothing();
  for (int64_t i = 0; i < args.spans.num_sequences; ++i) sum.add(per_sequence[i]);
  args.loss[0] = static_cast<T>(sum.loss);
  for (int k = 0; k < kNumMetrics; ++k) args.metrics[k] = sum.metrics[k];
}

}  // namespace

template <class T>
bool objective(const ObjectiveArgs<T>& args, Statistic statistic, bool through, const char* gate,
               const Threads& threads) {
  clear_outside(args.spans, args.coef);
  const Scratch<Totals> totals(args.spans.num_sequences);  // one per sequence
  const bool known =
      run_named(static_cast<TOKENRL_GATES*>(nullptr), gate, args, statistic, through, totals.at, threads);
  if (known) add_up_sequences(args, totals.at);
  return known;
}

template bool objective(const ObjectiveArgs<float>&, Statistic, bool, const char*, const Threads&);
template bool objective(const ObjectiveArgs<double>&, Statistic, bool, const char*, const Threads&);

}  // namespace tokenrl::cpu::TOKENRL_ISA
