// The objective of each sequence: a sequential walk for the statistic, then a vector loop over its tokens for the gate.
// Compiled once per instruction set (TOKENRL_ISA): nothing here may leave a linkable copy of a shared function behind.
#include <cstdlib>

#include "kernels.h"
#include "walk.h"

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

// Tokens whose sums are taken in T; blocks are added up in double.
constexpr int64_t kBlock = 1024;

// One entry per token of a sequence; masked cells hold harmless numbers and weight 0.
template <class T>
struct Lanes {
  T *x, *s, *t, *logp, *advantage, *weight, *valid, *passes, *shared, *direct;
  static constexpr int kArrays = 10;

  explicit Lanes(T* memory, int64_t n)
      : x(memory), s(x + n), t(s + n), logp(t + n), advantage(logp + n), weight(advantage + n), valid(weight + n),
        passes(valid + n), shared(passes + n), direct(shared + n) {}
};

template <class T>
inline void load(const ObjectiveArgs<T>& args, Sequence q, int64_t i, const Lanes<T>& lanes) {
  const double normalizer = args.normalizer[0];
  const T sequence_weight = normalizer > 0 ? static_cast<T>(args.span_weight[i] / normalizer) : T(0);
  const bool* mask = args.spans.mask;
  for (int64_t k = 0; k < q.end - q.begin; ++k) {
    const int64_t token = q.begin + k;
    const bool valid = !mask || mask[token];
    const T logp = valid ? args.logp[token] : T(0), d = logp - (valid ? args.old_logp[token] : T(0));
    lanes.x[k] = clamp(d, -args.clamp, args.clamp);
    lanes.passes[k] = d >= -args.clamp && d <= args.clamp;
    lanes.logp[k] = logp;
    lanes.valid[k] = valid;
    lanes.weight[k] = valid ? sequence_weight : T(0);
  }
  for (int64_t k = 0; k < q.end - q.begin; ++k) {
    const int64_t token = q.begin + k;
    const T advantage = args.advantages ? args.advantages[args.advantages_per_token ? token : i] : T(0);
    lanes.advantage[k] = lanes.valid[k] != 0 ? advantage : T(0);
    if (args.token_weight) lanes.weight[k] = lanes.valid[k] != 0 ? lanes.weight[k] * args.token_weight[token] : T(0);
  }
}

// Value and partials of tokens first to last, and their metrics. kPerToken: some parameter is a tensor.
template <class T, class Gate, bool kPerToken>
inline void gate_loop(const ObjectiveArgs<T>& args, int64_t token, int64_t first, int64_t last, const Lanes<T>& lanes,
                      Totals& totals) {
  const T *x = lanes.x, *statistic = lanes.s, *t = lanes.t, *logp = lanes.logp, *advantage = lanes.advantage;
  const T *weights = lanes.weight, *valids = lanes.valid;
  T *shared = lanes.shared, *direct = lanes.direct, p[kMaxParams] = {};
  for (int j = 0; j < Gate::num_params; ++j) p[j] = args.params[j].value;
  const T cap = args.cap;
  T loss = 0, tokens = 0, sum = 0, lowest = infinity<T>(), highest = -infinity<T>();
  T low = 0, high = 0, dual = 0, kl = 0, squares = 0;
#pragma omp simd reduction(+ : loss, tokens, sum, low, high, dual, kl, squares) reduction(min : lowest) reduction(max : highest)
  for (int64_t k = first; k < last; ++k) {
    if constexpr (kPerToken) {
      for (int j = 0; j < Gate::num_params; ++j)
        if (args.params[j].tensor) p[j] = valids[k] != 0 ? args.params[j].tensor[token + k] : T(1);
    }
    const T valid = valids[k], weight = weights[k], uncapped = statistic[k], s = smaller(uncapped, cap);
    const Gated<T> g = Gate::eval(GateInput<T>{s, logp[k], advantage[k], larger(t[k], T(1)), p});
    const T ratio = exponential(s);
    const bool pays = weight != 0, counts = valid != 0;
    shared[k] = pays & (uncapped <= cap) ? weight * g.d_s : T(0);
    direct[k] = pays ? weight * g.d_logp : T(0);
    loss += pays ? weight * g.value : T(0);
    tokens += valid;
    sum += counts ? ratio : T(0);
    squares += counts ? ratio * ratio : T(0);
    const T least = counts ? ratio : infinity<T>(), most = counts ? ratio : -infinity<T>();
    lowest = least < lowest ? least : lowest;
    highest = most > highest ? most : highest;
    low += counts ? g.low : T(0);
    high += counts ? g.high : T(0);
    dual += counts ? g.dual : T(0);
    kl += counts ? excess(x[k]) : T(0);
  }
  totals.add({loss, {tokens, sum, lowest, highest, low, high, dual, kl, squares}});
}

template <class T, class Gate>
void run_sequence(const ObjectiveArgs<T>& args, Statistic statistic, bool through, int64_t i, T* memory, Totals& totals) {
  const Sequence q = sequence_of(args.spans, i);
  const int64_t n = larger(q.end - q.begin, int64_t{0});
  const Lanes<T> lanes(memory, n);
  load(args, q, i, lanes);
  statistic_of(args.spans, q, statistic, lanes.x, lanes.s, lanes.t);
  bool per_token = false;
  for (int j = 0; j < Gate::num_params; ++j) per_token = per_token || args.params[j].tensor;
  totals = Totals::nothing();
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = smaller(first + kBlock, n);
    if (per_token) gate_loop<T, Gate, true>(args, q.begin, first, last, lanes, totals);
    else gate_loop<T, Gate, false>(args, q.begin, first, last, lanes, totals);
  }
  if (through && statistic != Statistic::token) adjoint_of(args.spans, q, statistic, lanes.t, lanes.shared);
  T* coef = args.coef + q.begin;
  for (int64_t k = 0; k < n; ++k) {
    const T shared = through && lanes.passes[k] == 0 ? T(0) : lanes.shared[k];
    coef[k] = lanes.valid[k] != 0 ? shared + lanes.direct[k] : T(0);
  }
}

template <class T, class Gate>
void run_gate(const ObjectiveArgs<T>& args, Statistic statistic, bool through, Totals* totals, const Threads& threads) {
  const int64_t grain = larger(int64_t{1}, 4096 * args.spans.num_sequences / larger(args.spans.num_tokens, int64_t{1}));
  parallel(threads, args.spans.num_sequences, grain, [&](int64_t begin, int64_t end) {
    int64_t longest = 1;
    for (int64_t i = begin; i < end; ++i) {
      const Sequence q = sequence_of(args.spans, i);
      longest = larger(longest, q.end - q.begin);
    }
    T* memory = static_cast<T*>(std::malloc(sizeof(T) * static_cast<size_t>(longest) * Lanes<T>::kArrays));
    if (!memory) std::abort();
    for (int64_t i = begin; i < end; ++i) run_sequence<T, Gate>(args, statistic, through, i, memory, totals[i]);
    std::free(memory);
  });
}

template <class T, class... Gate>
bool run_named(std::tuple<Gate...>*, const char* name, const ObjectiveArgs<T>& args, Statistic statistic, bool through,
               Totals* totals, const Threads& threads) {
  return ((std::strcmp(Gate::name, name) == 0 && (run_gate<T, Gate>(args, statistic, through, totals, threads), true)) || ...);
}

}  // namespace

template <class T>
bool objective(const ObjectiveArgs<T>& args, Statistic statistic, bool through, const char* gate, Totals* totals,
               const Threads& threads) {
  return run_named(static_cast<Gates*>(nullptr), gate, args, statistic, through, totals, threads);
}

template bool objective(const ObjectiveArgs<float>&, Statistic, bool, const char*, Totals*, const Threads&);
template bool objective(const ObjectiveArgs<double>&, Statistic, bool, const char*, Totals*, const Threads&);

}  // namespace tokenrl::cpu::TOKENRL_ISA
