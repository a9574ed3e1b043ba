// Aggregation weights: tokens and sign of each sequence, then what they add up to in each group.
#include <cstring>
#include <unordered_map>
#include <vector>

#include "walk.h"

namespace tokenrl::cpu {

namespace {

struct Group {
  int64_t tokens = 0, size = 0, rows[2] = {0, 0}, signed_tokens[2] = {0, 0};
};

struct SequenceCount {
  int64_t tokens = 0;
  double advantage = 0;
};

// Eight cells at a time, each a byte of 0 or 1.
int64_t count_valid(const Spans& spans, Sequence q) {
  if (!spans.mask) return larger(q.end - q.begin, int64_t{0});
  constexpr int64_t most = 255;  // words whose bytes do not overflow
  int64_t count = 0, token = q.begin;
  while (q.end - token >= 8) {
    uint64_t bytes = 0;
    for (int64_t k = 0; k < most && q.end - token >= 8; ++k, token += 8) {
      uint64_t cells;
      std::memcpy(&cells, spans.mask + token, sizeof cells);
      bytes += cells;
    }
    const uint64_t pairs = (bytes & 0x00ff00ff00ff00ffu) + (bytes >> 8 & 0x00ff00ff00ff00ffu);
    count += static_cast<int64_t>(pairs * 0x0001000100010001u >> 48);
  }
  for (; token < q.end; ++token) count += spans.mask[token];
  return count;
}

SequenceCount count_of(const WeightArgs& args, int64_t i) {
  const Sequence q = sequence_of(args.spans, i);
  const auto advantage = [&](int64_t at) {
    return args.advantages_double ? static_cast<const double*>(args.advantages)[at]
                                  : static_cast<const float*>(args.advantages)[at];
  };
  SequenceCount count;
  count.tokens = count_valid(args.spans, q);
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
  return static_cast<double>(group.rows[sign]) / static_cast<double>(group.size) /
         static_cast<double>(group.signed_tokens[sign]);
}

}  // namespace

void aggregation_weights(const WeightArgs& args, Span span, Unit unit, const Threads& threads) {
  const int64_t sequences = args.spans.num_sequences;
  std::vector<SequenceCount> counts(static_cast<size_t>(sequences));
  parallel(threads, sequences, sequences_of(args.spans, 8192), [&](int64_t begin, int64_t end) {
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
    group.tokens += own.tokens, ++group.size;
    if (own.advantage == 0) continue;
    ++group.rows[own.advantage > 0];
    group.signed_tokens[own.advantage > 0] += own.tokens;
  }
  for (int64_t i = 0; i < sequences; ++i) {
    const auto group = args.group_ids ? groups.find(args.group_ids[i]) : groups.end();
    args.span_weight[i] = weight_of(span, counts[i], group == groups.end() ? Group{} : group->second);
  }
  const int64_t counted[] = {1, tokens, rows, static_cast<int64_t>(groups.size())};  // as Unit orders them
  args.normalizer[0] = args.scale * static_cast<double>(counted[static_cast<int>(unit)]);
}

}  // namespace tokenrl::cpu
