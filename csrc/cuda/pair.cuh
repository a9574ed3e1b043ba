// A row of two heads' logits under a block, or under several that share it, and the kinds of divergence. One kernel is
// of every kind: which one is asked once per 16 bytes, and what all kinds need is compiled once.
#pragma once

#include <string_view>

#include "vocabulary.cuh"

namespace tokenrl::cuda {

// f(Kind()) of the kind of that number.
template <class F, class... Kind>
__device__ __forceinline__ void with_kind(int number, F f, std::tuple<Kind...>*) {
  int k = 0;
  ((number == k++ && (f(Kind()), true)) || ...);
}
constexpr Divergences* kEvery = nullptr;
constexpr const char* kNoSuchKind = "there is no divergence of that kind";

// Blocks whose registers fit at once, without spilling: 24 KiB are then on their way.
template <class Logit>
constexpr int kBlocks = sizeof(Logit) == 8 ? 1 : 3;

// The part of a row that a block has, in whole packs from its begin.
struct Share {
  int64_t begin, end;

  __device__ __forceinline__ Share(int64_t vocab, int splits, int64_t pack) {
    const int64_t length = (vocab + splits * pack - 1) / (splits * pack) * pack;
    begin = smaller(blockIdx.x % splits * length, vocab), end = smaller(begin + length, vocab);
  }
  __device__ __forceinline__ bool has(int64_t v) const { return v >= begin && v < end; }
};

// The logits from v on, -inf where they are not the share's.
template <class Logit>
__device__ __forceinline__ Pack<Logit> pack_of(const Logit* logits, int64_t v, const Share& share) {
  constexpr int kPack = Pack<Logit>::size;
  // Not aligned, more is read than the pack.
  if (v >= share.begin && v + (is_aligned(logits + v) ? kPack : 2 * kPack) <= share.end)
    return Anywhere::load(logits + v);
  Pack<Logit> pack;
#pragma unroll
  for (int k = 0; k < kPack; ++k) pack.of[k] = share.has(v + k) ? logits[v + k] : narrow<Logit>(-infinity<float>());
  return pack;
}

// A head's row.
template <class Logit, class T>
struct HeadRow {
  RowView<Logit, T, Transformed> row;

  __device__ __forceinline__ HeadRow(const LogprobArgs<Logit, T>& args, int64_t index) : row(args, index) {}
  // y of a logit; what is not the share's is -inf under any keep mask.
  __device__ __forceinline__ T capped(Logit logit, int64_t v, const Share& share) const {
    return row.capped(row.raw(static_cast<T>(widen(logit)), clamp(v, share.begin, share.end - 1)));
  }
};
// And what makes log-probs of it.
template <class Logit, class T>
struct NormalizedRow : HeadRow<Logit, T> {
  T lse, lse_rest;

  __device__ __forceinline__ NormalizedRow(const LogprobArgs<Logit, T>& args, int64_t index)
      : HeadRow<Logit, T>(args, index), lse(args.lse[index]), lse_rest(args.lse_rest[index]) {}
  __device__ __forceinline__ T log_p(T y) const { return (this->row.transform.factor * y - lse) - lse_rest; }
};

template <class T>
__device__ __forceinline__ Pair<T> pair_of(T log_p, T log_r) {
  return {log_p, log_r, power_of_two(log_p * kLog2E<T>), power_of_two(log_r * kLog2E<T>)};
}

template <class... Kind>
inline int number_of(std::string_view kind, std::tuple<Kind...>*) {
  int k = 0;
  return ((k++, kind == Kind::name) || ...) ? k - 1 : -1;
}

template <class Logit, class T>
inline int64_t splits_of(const DivergenceArgs<Logit, T>& args) {
  return blocks_per_row(args.of.batch * args.of.time, args.of.vocab);
}

}  // namespace tokenrl::cuda
