// What does not depend on the instruction set: its choice, the sums over sequences, statistics, clip and weights as ops
// of their own.
#include <algorithm>
#include <cstdlib>
#include <unordered_map>
#include <vector>

#include "../introspection.h"
#include "kernels.h"
#include "walk.h"

namespace tokenrl::cpu {
namespace {

Isa widest() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

// Runs f(isa's objective, ...) by the instruction set in use.
#ifdef __x86_64__
#define TOKENRL_BY_ISA(call)                   \
  switch (instruction_set()) {                 \
    case Isa::avx512: return avx512::call;     \
    case Isa::avx2: return avx2::call;         \
    case Isa::portable: return portable::call; \
  }                                            \
  return portable::call
#else
#define TOKENRL_BY_ISA(call) return portable::call
#endif

template <class T>
bool each_objective(const ObjectiveArgs<T>& args, Statistic statistic, bool through, const char* gate, Totals* totals,
                    const Threads& threads) {
  TOKENRL_BY_ISA(objective(args, statistic, through, gate, totals, threads));
}

// The first and the last sequence answer for tokens that no sequence holds.
template <class T>
void clear_outside(const Spans& spans, T* out) {
  const int64_t none = spans.num_sequences == 0;
  const int64_t first = none ? spans.num_tokens : sequence_of(spans, 0).begin;
  const int64_t last = none ? spans.num_tokens : sequence_of(spans, spans.num_sequences - 1).end;
  std::fill(out, out + first, T(0));
  std::fill(out + last, out + spans.num_tokens, T(0));
}

int64_t sequences_per_thread(const Spans& spans) {
  return std::max<int64_t>(1, 8192 * spans.num_sequences / std::max<int64_t>(spans.num_tokens, 1));
}

}  // namespace

Isa instruction_set() {
  static const Isa chosen = [] {
    const char* named = std::getenv("TOKENRL_CPU_ISA");
    const int found = named ? find_name(kIsas, named) : -1;
    return found < 0 ? widest() : std::min(widest(), static_cast<Isa>(found));
  }();
  return chosen;
}

template <class T>
bool objective(const ObjectiveArgs<T>& args, Statistic statistic, bool through, const char* gate,
               const Threads& threads) {
  std::vector<Totals> totals(static_cast<size_t>(args.spans.num_sequences));
  clear_outside(args.spans, args.coef);
  if (!each_objective(args, statistic, through, gate, totals.data(), threads)) return false;
  Totals sum = Totals::nothing();
  for (const Totals& one : totals) sum.add(one);
  args.loss[0] = static_cast<T>(sum.loss);
  for (int k = 0; k < kNumMetrics; ++k) args.metrics[k] = static_cast<T>(sum.metrics[k]);
  return true;
}

template <class Logit, class T>
void token_logprobs(const LogprobArgs<Logit, T>& args, const Threads& threads) {
  TOKENRL_BY_ISA(token_logprobs(args, threads));
}
template <class Logit, class T>
void token_logprobs_backward(const LogprobArgs<Logit, T>& args, const Threads& threads) {
  TOKENRL_BY_ISA(token_logprobs_backward(args, threads));
}

template <class T>
void statistic(const StatisticArgs<T>& args, Statistic statistic, bool adjoint, const Threads& threads) {
  clear_outside(args.spans, args.output);
  parallel(threads, args.spans.num_sequences, sequences_per_thread(args.spans), [&](int64_t begin, int64_t end) {
    std::vector<T> x, t;
    for (int64_t i = begin; i < end; ++i) {
      const Sequence q = sequence_of(args.spans, i);
      const size_t n = static_cast<size_t>(std::max<int64_t>(q.end - q.begin, 0));
      x.resize(n), t.resize(n);
      for (size_t k = 0; k < n; ++k) {
        const int64_t token = q.begin + static_cast<int64_t>(k);
        const bool valid = is_valid(args.spans, token);
        x[k] = valid ? args.input[token] - (args.input2 ? args.input2[token] : T(0)) : T(0);
      }
      T* out = args.output + q.begin;
      if (adjoint) {
        scan(args.spans, q, Statistic::token, x.data(), out, t.data());
        adjoint_of(args.spans, q, statistic, t.data(), x.data());
        std::copy(x.begin(), x.end(), out);
      } else {
        statistic_of(args.spans, q, statistic, x.data(), out, t.data());
      }
      for (size_t k = 0; k < n; ++k)
        if (!is_valid(args.spans, q.begin + static_cast<int64_t>(k))) out[k] = 0;
    }
  });
}

template <class T>
void position_adaptive_clip(const BandArgs<T>& args, const Threads& threads) {
  clear_outside(args.spans, args.clipped);
  clear_outside(args.spans, args.inside);
  parallel(threads, args.spans.num_sequences, sequences_per_thread(args.spans), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sequence q = sequence_of(args.spans, i);
      T t = 0;
      for (int64_t token = q.begin; token < q.end; ++token) {
        args.clipped[token] = args.inside[token] = 0;
        if (!is_valid(args.spans, token)) continue;
        t += 1;
        T p[3];
        for (int j = 0; j < 3; ++j) p[j] = args.params[j].tensor ? args.params[j].tensor[token] : args.params[j].value;
        const T width = power(t, p[2]), low = -p[0] * width, high = p[1] * width, x = args.log_ratio[token];
        args.clipped[token] = clamp(x, low, high);
        args.inside[token] = x >= low && x <= high;
      }
    }
  });
}

namespace {

struct Group {
  int64_t tokens = 0, rows[2] = {0, 0}, signed_tokens[2] = {0, 0};
};

struct SequenceCount {
  int64_t tokens = 0;
  double advantage = 0;
};

SequenceCount count_of(const WeightArgs& args, int64_t i) {
  const Sequence q = sequence_of(args.spans, i);
  const auto advantage = [&](int64_t at) {
    return args.advantages_double ? static_cast<const double*>(args.advantages)[at]
                                  : static_cast<const float*>(args.advantages)[at];
  };
  SequenceCount count;
  for (int64_t token = q.begin; token < q.end; ++token) count.tokens += is_valid(args.spans, token);
  if (args.advantages && args.advantages_per_token) {
    for (int64_t token = q.begin; token < q.end; ++token)
      if (is_valid(args.spans, token)) count.advantage += advantage(token);
  }
  if (args.advantages && !args.advantages_per_token) count.advantage = advantage(i);
  return count;
}

double weight_of(Span span, const SequenceCount& own, const Group& group) {
  if (own.tokens == 0) return 0;
  switch (span) {
    case Span::one: return 1;
    case Span::inverse_length: return 1 / static_cast<double>(own.tokens);
    case Span::group: return 1 / static_cast<double>(group.tokens);
    case Span::balanced: break;
  }
  if (own.advantage == 0) return 0;
  const int sign = own.advantage > 0;
  const double rows = static_cast<double>(group.rows[0] + group.rows[1]);
  return static_cast<double>(group.rows[sign]) / rows / static_cast<double>(group.signed_tokens[sign]);
}

}  // namespace

void aggregation_weights(const WeightArgs& args, Span span, Unit unit, const Threads& threads) {
  const int64_t sequences = args.spans.num_sequences;
  std::vector<SequenceCount> counts(static_cast<size_t>(sequences));
  parallel(threads, sequences, sequences_per_thread(args.spans), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) counts[i] = count_of(args, i);
  });
  std::unordered_map<int64_t, Group> groups;
  int64_t tokens = 0, rows = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    const SequenceCount& own = counts[i];
    if (own.tokens == 0) continue;
    tokens += own.tokens, ++rows;
    if (!args.group_ids) continue;
    Group& group = groups[args.group_ids[i]];
    group.tokens += own.tokens;
    if (own.advantage == 0) continue;
    ++group.rows[own.advantage > 0];
    group.signed_tokens[own.advantage > 0] += own.tokens;
  }
  for (int64_t i = 0; i < sequences; ++i) {
    const auto group = args.group_ids ? groups.find(args.group_ids[i]) : groups.end();
    args.span_weight[i] = weight_of(span, counts[i], group == groups.end() ? Group{} : group->second);
  }
  args.count[0] = unit == Unit::tokens ? tokens : unit == Unit::rows ? rows : static_cast<int64_t>(groups.size());
}

#define TOKENRL_INSTANTIATE(T)                                                                    \
  template bool objective(const ObjectiveArgs<T>&, Statistic, bool, const char*, const Threads&); \
  template void statistic(const StatisticArgs<T>&, Statistic, bool, const Threads&);              \
  template void position_adaptive_clip(const BandArgs<T>&, const Threads&);
TOKENRL_INSTANTIATE(float)
TOKENRL_INSTANTIATE(double)
#undef TOKENRL_INSTANTIATE

#define TOKENRL_INSTANTIATE(Logit, T)                                         \
  template void token_logprobs(const LogprobArgs<Logit, T>&, const Threads&); \
  template void token_logprobs_backward(const LogprobArgs<Logit, T>&, const Threads&);
TOKENRL_INSTANTIATE(float, float)
TOKENRL_INSTANTIATE(double, double)
TOKENRL_INSTANTIATE(BFloat16, float)
TOKENRL_INSTANTIATE(Half, float)

}  // namespace tokenrl::cpu

const char* tokenrl_instruction_set() { return tokenrl::cpu::kIsas[static_cast<int>(tokenrl::cpu::instruction_set())]; }
