// One row of logits under a block: where it lies, its transform, and the powers of two that its softmax is made of.
#pragma once

#include "packs.cuh"

namespace tokenrl::cuda {

// Blocks that a multiprocessor is to hold at least: with two of them, and kInFlight packs per thread, 32 KiB are on
// their way, which is more than the memory's latency times its bandwidth. What can do with fewer registers has more.
constexpr int kBlocksAtOnce = 2;

// Blocks that share a row: of few rows, so many that each multiprocessor has eight in all, or that no part is shorter
// than the packs that a block asks for at once.
inline int64_t blocks_per_row(int64_t rows, int64_t vocab) {
  constexpr int64_t least_part = 4096;
  const int64_t blocks = 8 * num_multiprocessors();
  return clamp(blocks / larger(rows, int64_t{1}), int64_t{1}, larger(vocab / least_part, int64_t{1}));
}

// A row of so many bytes is read by a warp alone: a block would spend more on what its threads found than on the row.
template <class Logit, class T>
bool is_short(const LogprobArgs<Logit, T>& args) {
  constexpr int64_t most = 24 << 10;
  return sizeof(T) == 4 && args.vocab * static_cast<int64_t>(sizeof(Logit)) <= most;
}
// Blocks of a warp for each row; the row of this warp.
inline int64_t blocks_of_warps(int64_t rows) { return (rows + kWarps - 1) / kWarps; }
__device__ __forceinline__ int64_t row_of_warp() { return int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; }

// 2^t with the special function unit; 0 below the normal numbers.
__device__ __forceinline__ float power_of_two(float t) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(t));
  return y;
#else
  return ::exp2f(t);
#endif
}
__device__ __forceinline__ double power_of_two(double t) { return ::exp2(t); }

template <class T>
constexpr T kLog2E = T(1.4426950408889634);
// 2^t is 0 there.
template <class T>
constexpr T kNoPower = sizeof(T) == 4 ? T(-160) : T(-1100);

// Within kFar of 0 the powers 2^t at t = scale y - anchor, one fma, are of use: what rounding takes of such an anchor
// is in every t of a row, below 1/16, and known. Larger anchors and NaN are not near.
template <class T>
constexpr T kFar = T(1 << 20);
template <class T>
__device__ __forceinline__ bool is_near(T scale, T anchor) {
  return anchor > -kFar<T> && anchor < kFar<T> && scale > T(1e-30) && scale < T(1e30);
}

// A row's logits are themselves times a factor.
struct Plain {
  using Who = BlockReads;
  static constexpr bool transforms = false;
};
// There may be a softcap and a keep mask.
struct Transformed {
  using Who = BlockReads;
  static constexpr bool transforms = true;
};

template <class Logit, class T, class Mode>
struct RowView {
  const Logit* logits;
  const bool* keep;
  int64_t index, grad_offset;
  RowTransform<T> transform;

  __device__ __forceinline__ RowView(const LogprobArgs<Logit, T>& args, int64_t row)
      : keep(nullptr), index(row), transform(args.transform, row) {
    // In 32 bits: a grid has no more rows, and a batch of them no more tokens.
    const unsigned batch = static_cast<unsigned>(row) / static_cast<unsigned>(args.time);
    const int64_t time = row - int64_t{batch} * args.time;
    logits = args.logits + batch * args.stride_batch + time * args.stride_time;
    grad_offset = batch * args.grad_stride_batch + time * args.grad_stride_time;
    const Transform<T>& t = args.transform;
    if (Mode::transforms && t.keep) keep = t.keep + batch * t.keep_stride_batch + time * t.keep_stride_time;
  }
  __device__ __forceinline__ bool keeps(int64_t v) const { return !Mode::transforms || !keep || keep[v]; }
  // The raw logit, -inf where the mask takes it out.
  __device__ __forceinline__ T raw(T x, int64_t v) const { return keeps(v) ? x : -infinity<T>(); }
  __device__ __forceinline__ T raw(int64_t v) const { return raw(static_cast<T>(widen(logits[v])), v); }
  __device__ __forceinline__ T capped(T x) const { return Mode::transforms && transform.capped ? transform.cap(x) : x; }
  // d z / d x at y = capped(x).
  __device__ __forceinline__ T slope(T y) const {
    return Mode::transforms && transform.capped ? transform.factor * transform.slope(y) : transform.factor;
  }
};

}  // namespace tokenrl::cuda
