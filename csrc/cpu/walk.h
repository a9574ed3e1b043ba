// The statistics along one sequence and their adjoints. Running sums are double: on a CPU they cost the same.
#pragma once

#include "kernels.h"

namespace tokenrl::cpu {

struct Sequence {
  int64_t begin, end;
};

TRL_HD Sequence sequence_of(const Spans& spans, int64_t i) {
  return {clamp(spans.cu_seqlens[i], int64_t{0}, spans.num_tokens),
          clamp(spans.cu_seqlens[i + 1], int64_t{0}, spans.num_tokens)};
}
TRL_HD bool is_valid(const Spans& spans, int64_t token) { return !spans.mask || spans.mask[token]; }
TRL_HD bool is_start(const Spans& spans, int64_t token) {
  return spans.starts && spans.starts[token] && is_valid(spans, token);
}
TRL_HD bool over_span(Statistic statistic) {
  return statistic == Statistic::span_sum || statistic == Statistic::span_mean;
}
TRL_HD bool is_mean(Statistic statistic) {
  return statistic == Statistic::prefix_mean || statistic == Statistic::span_mean;
}

// The tokens of a sequence from the first valid one to the last: whatever padding lies around them, each is in the same
// lane of a vector.
TRL_HD Sequence without_padding(const Spans& spans, Sequence q) {
  constexpr int64_t word = sizeof(uint64_t);  // of cells at a time, as far as all are padding
  const auto padding = [&](int64_t begin) {
    uint64_t cells;
    std::memcpy(&cells, spans.mask + begin, sizeof cells);
    return cells == 0;
  };
  while (spans.mask && q.end - q.begin >= word && padding(q.begin)) q.begin += word;
  while (spans.mask && q.end - q.begin >= word && padding(q.end - word)) q.end -= word;
  while (q.begin < q.end && !is_valid(spans, q.begin)) ++q.begin;
  while (q.begin < q.end && !is_valid(spans, q.end - 1)) --q.end;
  return q;
}
// Whether a sequence has more than one segment.
TRL_HD bool is_segmented(const Spans& spans, Sequence q) {
  if (!spans.starts) return false;
  bool some = false;
  for (int64_t token = q.begin + 1; token < q.end && !some; ++token) some = is_start(spans, token);
  return some;
}

// Zeros where no sequence lies: before the first and behind the last.
template <class T>
TRL_HD void clear_outside(const Spans& spans, T* out) {
  const bool none = spans.num_sequences == 0;
  const int64_t first = none ? spans.num_tokens : sequence_of(spans, 0).begin;
  const int64_t last = none ? spans.num_tokens : sequence_of(spans, spans.num_sequences - 1).end;
  for (int64_t token = 0; token < first; ++token) out[token] = 0;
  for (int64_t token = last; token < spans.num_tokens; ++token) out[token] = 0;
}

// Sequences that hold about so many tokens: what one thread takes at least.
TRL_HD int64_t sequences_of(const Spans& spans, int64_t tokens) {
  return larger(int64_t{1}, tokens * spans.num_sequences / larger(spans.num_tokens, int64_t{1}));
}

// The statistic of one token from its own log ratio and what the span holds up to it; span statistics leave their
// running sum.
template <Statistic kStatistic, class T>
TRL_HD T at_token(T x, double sum, T least, int64_t count) {
  if constexpr (kStatistic == Statistic::token) return x;
  else if constexpr (is_minimum(kStatistic)) return least + x;
  else if constexpr (kStatistic == Statistic::prefix_mean) return static_cast<T>(sum / static_cast<double>(count));
  else return static_cast<T>(sum);
}

// One walk forwards: s as above and t, the count of valid tokens, for every token of q. Masked cells repeat the running
// sum.
template <Statistic kStatistic, class T>
TRL_HD void scan(const Spans& spans, Sequence q, const T* x, T* s, T* t) {
  const bool *mask = spans.mask, *starts = spans.starts;
  double sum = 0;
  T lowest = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < q.end - q.begin; ++i) {
    const bool valid = !mask || mask[q.begin + i];
    if (starts && valid && starts[q.begin + i]) sum = 0, count = 0;
    if (valid) {
      const T before = least_before(kStatistic, count > 0, lowest);
      lowest = count ? smaller(lowest, x[i]) : x[i];
      sum += x[i];
      ++count;
      s[i] = at_token<kStatistic>(x[i], sum, before, count);
    } else {
      s[i] = static_cast<T>(sum);
    }
    t[i] = static_cast<T>(count);
  }
}

template <class T>
TRL_HD void scan(const Spans& spans, Sequence q, Statistic statistic, const T* x, T* s, T* t) {
  switch (statistic) {
    case Statistic::token: return scan<Statistic::token>(spans, q, x, s, t);
    case Statistic::prefix_sum: return scan<Statistic::prefix_sum>(spans, q, x, s, t);
    case Statistic::prefix_mean: return scan<Statistic::prefix_mean>(spans, q, x, s, t);
    case Statistic::prefix_min: return scan<Statistic::prefix_min>(spans, q, x, s, t);
    case Statistic::prefix_min_capped: return scan<Statistic::prefix_min_capped>(spans, q, x, s, t);
    case Statistic::span_sum:
    case Statistic::span_mean: return scan<Statistic::span_sum>(spans, q, x, s, t);
  }
}

// Gives every token what the last token of its span holds, divided by that token's count for means.
template <class T>
TRL_HD void spread_totals(const Spans& spans, Sequence q, bool mean, const T* t, T* s) {
  T total = 0;
  for (int64_t i = q.end - q.begin - 1; i >= 0; --i) {
    if (q.begin + i + 1 == q.end || is_start(spans, q.begin + i + 1)) total = mean ? s[i] / larger(t[i], T(1)) : s[i];
    s[i] = total;
  }
}

// s and t (the position) of every token of q from its log ratios.
template <class T>
TRL_HD void statistic_of(const Spans& spans, Sequence q, Statistic statistic, const T* x, T* s, T* t) {
  scan(spans, q, statistic, x, s, t);
  if (over_span(statistic)) spread_totals(spans, q, statistic == Statistic::span_mean, t, s);
}

// The adjoint in place: g is zero in masked cells; t as above.
template <class T>
TRL_HD void adjoint_of(const Spans& spans, Sequence q, Statistic statistic, const T* t, T* g) {
  const int64_t n = q.end - q.begin;
  double sum = 0;
  for (int64_t i = n - 1; i >= 0; --i) {
    if (q.begin + i + 1 < q.end && is_start(spans, q.begin + i + 1)) sum = 0;
    sum += statistic == Statistic::prefix_mean ? g[i] / larger(t[i], T(1)) : g[i];
    g[i] = static_cast<T>(sum);
  }
  if (!over_span(statistic)) return;
  // The first token of a span now holds the span's total; the mean's divisor is the count at the span's end.
  for (int64_t i = 1; i < n; ++i)
    if (!is_start(spans, q.begin + i)) g[i] = g[i - 1];
  if (statistic != Statistic::span_mean) return;
  T count = 1;
  for (int64_t i = n - 1; i >= 0; --i) {
    if (i + 1 == n || is_start(spans, q.begin + i + 1)) count = larger(t[i], T(1));
    g[i] /= count;
  }
}

}  // namespace tokenrl::cpu
