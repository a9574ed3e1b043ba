// The preference loss: one block per sequence for its sums and score, then one block for the links of them all.
// Backwards one block per sequence.
#include "preference.h"

#include "spans.cuh"

namespace tokenrl::cuda {
namespace {

struct AddNumbers {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct AddSums {
  __device__ __forceinline__ SequenceSums operator()(SequenceSums a, const SequenceSums& b) const {
    return {a.log_ratio + b.log_ratio,
            a.divergence + b.divergence,
            a.reference + b.reference,
            a.tokens + b.tokens,
            a.nll + b.nll,
            a.nll_tokens + b.nll_tokens};
  }
};

__device__ __forceinline__ Sequence hull_of(const Spans& spans, int64_t i) {
  return without_padding(spans, sequence_of(spans, i));
}

template <class T>
__device__ __forceinline__ T weighed(const T* weight, int64_t token, T x) {
  return weight ? x * weight[token] : x;
}

// What this thread's tokens add to the sums of sequence i.
template <class T>
__device__ __forceinline__ SequenceSums own_sums(const PreferenceTokens<T>& tokens, int64_t i) {
  SequenceSums own{0, 0, 0, 0, 0, 0};
  const Sequence q = hull_of(tokens.spans, i);
  for (int64_t token = q.begin + threadIdx.x; token < q.end; token += kThreads) {
    if (!is_valid(tokens.spans, token)) continue;
    const T logp = tokens.logp[token], x = tokens.ref_logp ? logp - tokens.ref_logp[token] : logp;
    own.log_ratio += double(weighed(tokens.token_weight, token, x));
    if (tokens.divergence) own.divergence += double(weighed(tokens.divergence_weight, token, tokens.divergence[token]));
    if (tokens.sums_reference) own.reference += double(weighed(tokens.token_weight, token, tokens.ref_logp[token]));
    own.tokens += 1;
  }
  return own;
}

template <class T>
__device__ __forceinline__ void add_nll(const PreferenceTokens<T>& tokens, int64_t i, SequenceSums& own) {
  Spans spans = tokens.spans;
  if (tokens.nll_mask) spans.mask = tokens.nll_mask;
  __syncthreads();  // the memory of the first hull is free again
  const Sequence q = hull_of(spans, i);
  for (int64_t token = q.begin + threadIdx.x; token < q.end; token += kThreads) {
    if (!is_valid(spans, token)) continue;
    own.nll += double(tokens.logp[token]);
    own.nll_tokens += 1;
  }
}

template <class T, class Score>
__global__ void __launch_bounds__(kThreads, 1)
    score_kernel(PreferenceTokens<T> tokens, PreferenceRow row, SequenceScore* scores) {
  TRL_SHARED(SequenceSums, memory, kWarps);
  const int64_t i = blockIdx.x;
  SequenceSums own = own_sums(tokens, i);
  if (tokens.sums_nll) add_nll(tokens, i, own);
  const SequenceSums sums = reduce(own, AddSums{}, memory);
  if (threadIdx.x == 0) scores[i] = score_of<Score>(sums, row);
}

// Sum of term(i) of i in [0, n), in every thread. memory: [kWarps], shared, of this call alone.
template <class Number, class Term>
__device__ __forceinline__ Number sum_over(int64_t n, Term term, Number* memory) {
  Number own = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) own += term(i);
  return reduce(own, AddNumbers{}, memory);
}

// order: which of x is the k-th from below.
__device__ __forceinline__ void sort(const double* x, int64_t n, int64_t* order) {
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    int64_t rank = 0;
    for (int64_t j = 0; j < n; ++j) rank += comes_before(x, j, i);
    order[rank] = i;
  }
}

__device__ __forceinline__ bool has_nll(const LinkArgs& args, int64_t sequence) {
  if (args.row.nll == 0) return false;
  if (args.nll_of_all) return true;
  if (args.labelled()) return args.desirable[sequence];
  if (!args.pairs) return sequence < args.num_losses;
  bool chosen = false;
  for (int64_t m = 0; m < args.num_losses; ++m) chosen = chosen || args.pairs[2 * m] == sequence;
  return chosen;
}

// The value of the nll term, in every thread; and what a token of it is worth, of each sequence.
__device__ __forceinline__ double nll_term(const LinkArgs& args) {
  TRL_SHARED(double, of_sum, kWarps);
  TRL_SHARED(double, of_tokens, kWarps);
  const int64_t n = args.num_sequences;
  double* by = args.slopes.nll;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) by[i] = has_nll(args, i) ? 1.0 : 0.0;
  const double sum = sum_over(n, [&](int64_t i) { return by[i] != 0 ? args.sequences[i].nll : 0.0; }, of_sum);
  const double tokens =
      sum_over(n, [&](int64_t i) { return by[i] != 0 ? args.sequences[i].nll_tokens : 0.0; }, of_tokens);
  const double per_token = args.row.nll / (args.nll_normalizer ? *args.nll_normalizer : larger(tokens, 1.0));
  for (int64_t i = threadIdx.x; i < n; i += kThreads) by[i] = by[i] != 0 ? -per_token : 0.0;
  return args.row.nll == 0 ? 0.0 : -per_token * sum;
}

__device__ __forceinline__ void write_slopes(const LinkArgs& args, int64_t sequence) {
  args.slopes.log_ratio[sequence] = args.slopes.divergence[sequence] = 0;
  const int64_t n = args.num_losses;
  if (args.labelled()) add_slopes(args, sequence, sequence);
  else if (args.pairs)
    for (int64_t m = 0; m < n; ++m) add_slopes(args, m, sequence);
  else if (sequence < 2 * n) add_slopes(args, sequence < n ? sequence : sequence - n, sequence);
}

template <class Link>
__global__ void __launch_bounds__(kThreads, 1) link_kernel(LinkArgs args) {
  TRL_SHARED(double, of_base, kWarps);
  TRL_SHARED(int64_t, of_successes, kWarps);
  TRL_SHARED(double, of_loss, kWarps);
  const int64_t count = args.num_losses;
  double base = args.base ? *args.base : 0.0;
  if (args.labelled() && !args.base)
    base = sum_over(count, [&](int64_t i) { return args.sequences[i].score; }, of_base) / larger(double(count), 1.0);
  const double least = larger(double(count), 1.0), normalizer = args.normalizer ? *args.normalizer : least;
  const int64_t successes =
      sum_over(count, [&](int64_t m) { return int64_t{take_scores(args, base, m)}; }, of_successes);
  if (args.memory.chosen_order) {
    sort(args.memory.chosen, count, args.memory.chosen_order);
    sort(args.memory.rejected, count, args.memory.rejected_order);
    __syncthreads();
  }
  const double loss = sum_over(count, [&](int64_t k) { return link_scores<Link>(args, normalizer, k); }, of_loss);
  for (int64_t i = threadIdx.x; i < args.num_sequences; i += kThreads) write_slopes(args, i);
  const double nll = nll_term(args);
  if (threadIdx.x > 0) return;
  *args.accuracy = double(successes) / least;
  write_loss(args, loss / normalizer + nll);
}

// The tokens before the first sequence and behind the last, by the first block.
template <class Clear>
__device__ __forceinline__ void clear_around(const Spans& spans, Clear clear) {
  const int64_t count = spans.num_sequences;
  const int64_t first = count > 0 ? sequence_of(spans, 0).begin : spans.num_tokens;
  const int64_t last = count > 0 ? sequence_of(spans, count - 1).end : spans.num_tokens;
  if (blockIdx.x > 0) return;
  for (int64_t token = threadIdx.x; token < first; token += kThreads) clear(token);
  for (int64_t token = last + threadIdx.x; token < spans.num_tokens; token += kThreads) clear(token);
}

template <class T>
__global__ void __launch_bounds__(kThreads) token_gradients_kernel(TokenGradients<T> args) {
  const PreferenceTokens<T>& tokens = args.tokens;
  const int64_t i = blockIdx.x;
  const auto write = [&](int64_t token, T by_sum, T by_divergence, T by_nll) {
    if (args.of_logp) args.of_logp[token] = weighed(tokens.token_weight, token, by_sum) + by_nll;
    if (args.of_divergence) args.of_divergence[token] = weighed(tokens.divergence_weight, token, by_divergence);
    if (args.of_token_weight) {
      const T logp = tokens.logp[token], x = tokens.ref_logp ? logp - tokens.ref_logp[token] : logp;
      args.of_token_weight[token] = by_sum * x;
    }
    if (args.of_divergence_weight) args.of_divergence_weight[token] = by_divergence * tokens.divergence[token];
  };
  const auto clear = [&](int64_t token, T by_nll) {
    if (args.of_logp) args.of_logp[token] = by_nll;
    if (args.of_divergence) args.of_divergence[token] = 0;
    if (args.of_token_weight) args.of_token_weight[token] = 0;
    if (args.of_divergence_weight) args.of_divergence_weight[token] = 0;
  };
  clear_around(tokens.spans, [&](int64_t token) { clear(token, T(0)); });
  if (i >= tokens.spans.num_sequences) return;
  const double upstream = double(args.upstream[0]);
  const T by_sum = T(upstream * args.slopes.log_ratio[i]), by_divergence = T(upstream * args.slopes.divergence[i]);
  const T by_nll = T(upstream * args.slopes.nll[i]);
  const Sequence q = sequence_of(tokens.spans, i);
  for (int64_t token = q.begin + threadIdx.x; token < q.end; token += kThreads) {
    const bool valid = is_valid(tokens.spans, token);
    const bool pays = tokens.sums_nll && (tokens.nll_mask ? tokens.nll_mask[token] : valid);
    if (valid) write(token, by_sum, by_divergence, pays ? by_nll : T(0));
    else clear(token, pays ? by_nll : T(0));
  }
}

}  // namespace

size_t preference_scratch_bytes(const LinkArgs& args) {
  const size_t orders = is_sorted(args.row.coupling) ? 2 * sizeof(int64_t) : 0;
  return args.num_sequences * sizeof(SequenceScore) + args.num_losses * (4 * sizeof(double) + orders);
}

template <class T, class... Score>
void launch_scores(std::tuple<Score...>*, const char* name, const PreferenceTokens<T>& tokens, const PreferenceRow& row,
                   SequenceScore* scores, void* stream) {
  const auto launch = [&](auto score) {
    using Chosen = decltype(score);
    TRL_LAUNCH((score_kernel<T, Chosen>), tokens.spans.num_sequences, kThreads, 0, stream, tokens, row, scores);
  };
  ((std::strcmp(Score::name, name) == 0 ? launch(Score{}) : void()), ...);
}
template <class... Link>
void launch_links(std::tuple<Link...>*, const char* name, const LinkArgs& args, void* stream) {
  const auto launch = [&](auto link) {
    using Chosen = decltype(link);
    TRL_LAUNCH((link_kernel<Chosen>), 1, kThreads, 0, stream, args);
  };
  ((std::strcmp(Link::name, name) == 0 ? launch(Link{}) : void()), ...);
}

template <class T>
const char* preference(const PreferenceTokens<T>& tokens, const char* score, const char* link, const LinkArgs& links,
                       void* scratch, void* stream) {
  LinkArgs args = links;
  auto* scores = static_cast<SequenceScore*>(scratch);
  auto* at = reinterpret_cast<double*>(scores + args.num_sequences);
  const int64_t count = args.num_losses;
  auto* order = is_sorted(args.row.coupling) ? reinterpret_cast<int64_t*>(at + 4 * count) : nullptr;
  args.sequences = scores;
  args.memory = {at, at + count, at + 2 * count, at + 3 * count, order, order ? order + count : nullptr};
  if (args.num_sequences > 0) launch_scores(static_cast<Scores*>(nullptr), score, tokens, args.row, scores, stream);
  launch_links(static_cast<Links*>(nullptr), link, args, stream);
  return launch_error();
}
template const char* preference(const PreferenceTokens<float>&, const char*, const char*, const LinkArgs&, void*,
                                void*);
template const char* preference(const PreferenceTokens<double>&, const char*, const char*, const LinkArgs&, void*,
                                void*);

template <class T>
const char* preference_backward(const TokenGradients<T>& args, void* stream) {
  TRL_LAUNCH((token_gradients_kernel<T>), blocks_of(args.tokens.spans, false), kThreads, 0, stream, args);
  return launch_error();
}
template const char* preference_backward(const TokenGradients<float>&, void*);
template const char* preference_backward(const TokenGradients<double>&, void*);

template <class T, class... Score>
bool list_scores(std::tuple<Score...>*, const std::string& precision) {
  return (list_kernel("preference score " + precision + " " + Score::name, &score_kernel<T, Score>) && ...);
}
template <class... Link>
bool list_links(std::tuple<Link...>*) {
  return (list_kernel(std::string("preference link ") + Link::name, &link_kernel<Link>) && ...);
}
static const bool listed = list_scores<float>(static_cast<Scores*>(nullptr), "float") &&
                           list_scores<double>(static_cast<Scores*>(nullptr), "double") &&
                           list_links(static_cast<Links*>(nullptr)) &&
                           list_kernel("preference backward float", &token_gradients_kernel<float>) &&
                           list_kernel("preference backward double", &token_gradients_kernel<double>);

}  // namespace tokenrl::cuda
