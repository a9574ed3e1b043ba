// One row of logits and what becomes of it before the softmax, a block at a time. Only for sources that are compiled
// once per instruction set.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace tokenrl::cpu::TOKENRL_ISA {

// Logits whose sums are taken in one vector loop: one long fp32 sum would lose digits of the entropy.
constexpr int64_t kBlock = 2048;
// Logits of a row that one thread takes at least. A row's state is that of its parts, merged: its bits do not depend on
// how many threads there are.
constexpr int64_t kPart = 32768;

template <class Logit, class T>
inline int64_t parts_of(const LogprobArgs<Logit, T>& args) {
  return (args.vocab + kPart - 1) / kPart;
}

// Of a block; -inf where there is nothing above it.
template <class T, class Stored>
inline T largest(const Stored* y, int64_t n) {
  T highest = -infinity<T>();
#pragma omp simd reduction(max : highest)
  for (int64_t v = 0; v < n; ++v) {
    const T value = static_cast<T>(widen(y[v]));
    highest = highest < value ? value : highest;  // in this form it is one instruction
  }
  return highest;
}

// Where a block's y come from: the logits themselves, or a buffer of them after softcap and keep mask.
template <class Logit, class T>
struct Row {
  const LogprobArgs<Logit, T>& args;
  int64_t index, batch, time;
  RowTransform<T> transform;

  inline Row(const LogprobArgs<Logit, T>& given, int64_t row)
      : args(given), index(row), batch(row / given.time), time(row % given.time), transform(given.transform, row) {}
  inline const Logit* logits() const { return args.logits + batch * args.stride_batch + time * args.stride_time; }
  inline Logit* grad() const {
    return args.grad_logits + batch * args.grad_stride_batch + time * args.grad_stride_time;
  }
  inline const bool* keep() const {
    const Transform<T>& t = args.transform;
    return t.keep ? t.keep + batch * t.keep_stride_batch + time * t.keep_stride_time : nullptr;
  }
  inline bool plain() const { return !transform.capped && !args.transform.keep; }
  inline T at(int64_t v) const {
    const T x = static_cast<T>(widen(logits()[v]));
    return keep() && !keep()[v] ? -infinity<T>() : transform.capped ? transform.cap(x) : x;
  }
  // y of logits first to first + n.
  inline void fill(int64_t first, int64_t n, T* y) const {
    if (!args.transform.keep) return fill_where(first, n, y, [](int64_t) { return true; });
    const auto* kept = reinterpret_cast<const uint8_t*>(keep() + first);  // loops over bool do not vectorise
    fill_where(first, n, y, [kept](int64_t v) { return kept[v] != 0; });
  }
  template <class Kept>
  inline void fill_where(int64_t first, int64_t n, T* y, Kept kept) const {
    const Logit* x = logits() + first;
    if (transform.capped) {
      const RowTransform<T> local = transform;
#pragma omp simd
      for (int64_t v = 0; v < n; ++v) {
        const T capped = local.cap(static_cast<T>(widen(x[v])));
        y[v] = kept(v) ? capped : -infinity<T>();
      }
      return;
    }
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) {
      const T raw = static_cast<T>(widen(x[v]));
      y[v] = kept(v) ? raw : -infinity<T>();
    }
  }
  // f(y, n) with the y of a block, in whatever type they are stored.
  template <class F>
  inline auto with_block(int64_t first, int64_t n, F&& f) const {
    if (plain()) return f(logits() + first);
    T y[kBlock];
    fill(first, n, y);
    return f(static_cast<const T*>(y));
  }
};

}  // namespace tokenrl::cpu::TOKENRL_ISA
