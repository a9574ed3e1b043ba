// Sums over the tokens of each sequence, and the tokens' shares of their gradients.
// Compiled once per instruction set (TOKENRL_ISA): nothing here may leave a linkable copy of a shared function behind.
#include "preference.h"
#include "walk.h"

namespace tokenrl::cpu::TOKENRL_ISA {
namespace {

struct SumAndCount {
  double sum, count;
};

// Loops over bool do not vectorise.
inline const uint8_t* bytes_of(const bool* mask) { return reinterpret_cast<const uint8_t*>(mask); }

// Over the tokens of q that the mask leaves in; a masked cell's term may be anything.
template <class Term>
inline SumAndCount sum_over(const bool* mask, Sequence q, Term term) {
  using T = decltype(term(q.begin));
  double sum = 0;
  if (!mask) {
#pragma omp simd reduction(+ : sum)
    for (int64_t token = q.begin; token < q.end; ++token) sum += static_cast<double>(term(token));
    return {sum, static_cast<double>(larger(q.end - q.begin, int64_t{0}))};
  }
  const uint8_t* valid = bytes_of(mask);
#pragma omp simd reduction(+ : sum)
  for (int64_t token = q.begin; token < q.end; ++token) {
    const T x = term(token);
    sum += static_cast<double>(valid[token] ? x : T(0));
  }
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t token = q.begin; token < q.end; ++token) count += valid[token] ? 1 : 0;
  return {sum, static_cast<double>(count)};
}

// The sum of w x, x of one log-prob or the difference of two.
template <class T>
inline SumAndCount sum_of(const Spans& spans, Sequence q, const T* x, const T* less, const T* weight) {
  if (less && weight)
    return sum_over(spans.mask, q, [=](int64_t token) { return (x[token] - less[token]) * weight[token]; });
  if (less) return sum_over(spans.mask, q, [=](int64_t token) { return x[token] - less[token]; });
  if (weight) return sum_over(spans.mask, q, [=](int64_t token) { return x[token] * weight[token]; });
  return sum_over(spans.mask, q, [=](int64_t token) { return x[token]; });
}

template <class T>
inline SequenceSums sums_of(const PreferenceTokens<T>& tokens, int64_t i) {
  const Sequence q = without_padding(tokens.spans, sequence_of(tokens.spans, i));
  const auto sum = [&](const T* x, const T* less, const T* weight) { return sum_of(tokens.spans, q, x, less, weight); };
  const SumAndCount log_ratio = sum(tokens.logp, tokens.ref_logp, tokens.token_weight);
  SequenceSums out{log_ratio.sum, 0, 0, log_ratio.count, 0, 0};
  if (tokens.divergence) out.divergence = sum(tokens.divergence, nullptr, tokens.divergence_weight).sum;
  if (tokens.sums_reference) out.reference = sum(tokens.ref_logp, nullptr, tokens.token_weight).sum;
  if (!tokens.sums_nll) return out;
  Spans spans = tokens.spans;
  spans.mask = tokens.nll_mask ? tokens.nll_mask : spans.mask;
  const Sequence of_nll = without_padding(spans, sequence_of(spans, i));
  const SumAndCount nll = sum_of<T>(spans, of_nll, tokens.logp, nullptr, nullptr);
  out.nll = nll.sum, out.nll_tokens = nll.count;
  return out;
}

// The term of each valid token, 0 in masked cells.
template <class T, class Term>
inline void share_out(const bool* mask, Sequence q, T* out, Term term) {
  if (!mask) {
#pragma omp simd
    for (int64_t token = q.begin; token < q.end; ++token) out[token] = term(token);
    return;
  }
  const uint8_t* valid = bytes_of(mask);
#pragma omp simd
  for (int64_t token = q.begin; token < q.end; ++token) {
    const T x = term(token);
    out[token] = valid[token] ? x : T(0);
  }
}

template <class T>
inline void gradients_of(const TokenGradients<T>& args, int64_t i) {
  const PreferenceTokens<T>& tokens = args.tokens;
  const Sequence q = sequence_of(tokens.spans, i);
  const bool *mask = tokens.spans.mask, *nll_mask = tokens.nll_mask ? tokens.nll_mask : mask;
  const double upstream = static_cast<double>(args.upstream[0]);
  const T by_sum = static_cast<T>(upstream * args.slopes.log_ratio[i]);
  const T by_divergence = static_cast<T>(upstream * args.slopes.divergence[i]);
  const T by_nll = static_cast<T>(upstream * args.slopes.nll[i]);
  const T *w = tokens.token_weight, *v = tokens.divergence_weight, *logp = tokens.logp, *ref = tokens.ref_logp;
  if (T* out = args.of_logp) {
    if (w) share_out(mask, q, out, [=](int64_t token) { return by_sum * w[token]; });
    else share_out(mask, q, out, [=](int64_t) { return by_sum; });
    if (tokens.sums_nll)
      for (int64_t token = q.begin; token < q.end; ++token) out[token] += !nll_mask || nll_mask[token] ? by_nll : T(0);
  }
  if (T* out = args.of_token_weight) {
    if (ref) share_out(mask, q, out, [=](int64_t token) { return by_sum * (logp[token] - ref[token]); });
    else share_out(mask, q, out, [=](int64_t token) { return by_sum * logp[token]; });
  }
  if (T* out = args.of_divergence) {
    if (v) share_out(mask, q, out, [=](int64_t token) { return by_divergence * v[token]; });
    else share_out(mask, q, out, [=](int64_t) { return by_divergence; });
  }
  const T* divergence = tokens.divergence;
  if (T* out = args.of_divergence_weight)
    share_out(mask, q, out, [=](int64_t token) { return by_divergence * divergence[token]; });
}

}  // namespace

template <class T>
void sequence_sums(const PreferenceTokens<T>& tokens, SequenceSums* sums, const Threads& threads) {
  parallel(threads, tokens.spans.num_sequences, sequences_of(tokens.spans, 32768), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = sums_of(tokens, i);
  });
}

template <class T>
void preference_backward(const TokenGradients<T>& args, const Threads& threads) {
  const Spans& spans = args.tokens.spans;
  for (T* out : {args.of_logp, args.of_token_weight, args.of_divergence, args.of_divergence_weight})
    if (out) clear_outside(spans, out);
  parallel(threads, spans.num_sequences, sequences_of(spans, 32768), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) gradients_of(args, i);
  });
}

template void sequence_sums(const PreferenceTokens<float>&, SequenceSums*, const Threads&);
template void sequence_sums(const PreferenceTokens<double>&, SequenceSums*, const Threads&);
template void preference_backward(const TokenGradients<float>&, const Threads&);
template void preference_backward(const TokenGradients<double>&, const Threads&);

}  // namespace tokenrl::cpu::TOKENRL_ISA
