// One row of logits under a block: where it lies, 16 bytes at a time, and its transform.
#pragma once

#include "block.cuh"
#include "launch.h"

namespace tokenrl::cuda {

// Logits that one thread loads or stores at once: 16 bytes.
template <class Logit>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(Logit);
  Logit of[size];
};
// Packs that a thread asks for before it uses the first: with two blocks per multiprocessor 32 KiB are on their way,
// which is more than the memory's latency times its bandwidth. The registers of so many blocks need not be saved.
constexpr int kInFlight = 4, kBlocksAtOnce = 2;

// Blocks that share a row: two per multiprocessor in all, as long as each has enough to do.
inline int64_t blocks_per_row(int64_t rows, int64_t vocab) {
  constexpr int64_t least_part = 8192;
  const int64_t blocks = 2 * num_multiprocessors();
  return clamp(blocks / larger(rows, int64_t{1}), int64_t{1}, larger(vocab / least_part, int64_t{1}));
}

template <class Logit>
__device__ __forceinline__ bool is_aligned(const Logit* at) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

template <class Logit>
__device__ __forceinline__ int64_t elements_to_alignment(const Logit* at, int64_t most) {
  const int64_t bytes = (16 - reinterpret_cast<uintptr_t>(at) % 16) % 16;
  return smaller(static_cast<int64_t>(bytes / sizeof(Logit)), most);
}

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

// A row's logits are themselves times a factor.
struct Plain {
  static constexpr bool transforms = false;
};
// There may be a softcap and a keep mask.
struct Transformed {
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
    const int64_t batch = row / args.time, time = row % args.time;
    logits = args.logits + batch * args.stride_batch + time * args.stride_time;
    grad_offset = batch * args.grad_stride_batch + time * args.grad_stride_time;
    const Transform<T>& t = args.transform;
    if (Mode::transforms && t.keep) keep = t.keep + batch * t.keep_stride_batch + time * t.keep_stride_time;
  }
  __device__ __forceinline__ bool keeps(int64_t v) const { return !Mode::transforms || !keep || keep[v]; }
  // The raw logit, -inf where the mask takes it out.
  __device__ __forceinline__ T raw(Logit logit, int64_t v) const {
    return keeps(v) ? static_cast<T>(widen(logit)) : -infinity<T>();
  }
  __device__ __forceinline__ T capped(T x) const { return Mode::transforms && transform.capped ? transform.cap(x) : x; }
  // d z / d x at y = capped(x).
  __device__ __forceinline__ T slope(T y) const {
    return Mode::transforms && transform.capped ? transform.factor * transform.slope(y) : transform.factor;
  }
};

// The pack at an address that 16 bytes need not divide: then out of the two packs of memory that it lies in.
template <class Logit>
__device__ __forceinline__ Pack<Logit> load_pack(const Logit* at) {
  if (is_aligned(at)) return *reinterpret_cast<const Pack<Logit>*>(at);
  const auto address = reinterpret_cast<uintptr_t>(at);
  const auto* words = reinterpret_cast<const Pack<uint32_t>*>(address / 16 * 16);
  const Pack<uint32_t> first = words[0], second = words[1];
  const unsigned skipped = static_cast<unsigned>(address % 16), bits = skipped % 4 * 8;
  uint32_t word[8], half[6], from[5], found[4];
#pragma unroll
  for (int k = 0; k < 8; ++k) word[k] = k < 4 ? first.of[k] : second.of[k - 4];
#pragma unroll
  for (int k = 0; k < 6; ++k) half[k] = skipped & 8 ? word[k + 2] : word[k];
#pragma unroll
  for (int k = 0; k < 5; ++k) from[k] = skipped & 4 ? half[k + 1] : half[k];
#pragma unroll
  for (int k = 0; k < 4; ++k) found[k] = bits ? from[k] >> bits | from[k + 1] << (32 - bits) : from[k];
  Pack<Logit> pack;
  std::memcpy(&pack, found, sizeof pack);
  return pack;
}

// 16 bytes at once, of which the compiler might else store some one by one.
template <class Logit>
__device__ __forceinline__ void store_pack(Logit* at, const Pack<Logit>& pack) {
#ifdef __CUDA_ARCH__
  uint32_t word[4];
  std::memcpy(word, &pack, sizeof pack);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(at)), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
#else
  *reinterpret_cast<Pack<Logit>*>(at) = pack;
#endif
}

// visit(pack, its first index) for what this thread sees of logits [begin, end) in whole packs from begin on, several
// on their way at once; single(v) for the logits behind them. Who sees what depends on no address: the sums of a row
// have the same bits in whatever place it lies.
template <class Logit, class Visit, class Single>
__device__ __forceinline__ void for_packs(const Logit* logits, int64_t begin, int64_t end, Visit visit, Single single) {
  constexpr int kPack = Pack<Logit>::size;
  // Not aligned, the last pack would be read beyond the row.
  const int64_t packs = (end - begin) / kPack - (is_aligned(logits + begin) ? 0 : 1);
  int64_t p = threadIdx.x;
  for (; p + (kInFlight - 1) * kThreads < packs; p += kInFlight * kThreads) {
    Pack<Logit> pack[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) pack[k] = load_pack(logits + begin + (p + k * kThreads) * kPack);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) visit(pack[k], begin + (p + k * kThreads) * kPack);
  }
  for (; p < packs; p += kThreads) visit(load_pack(logits + begin + p * kPack), begin + p * kPack);
  if (p < (end - begin) / kPack) {
    Pack<Logit> pack;
    for (int k = 0; k < kPack; ++k) pack.of[k] = logits[begin + p * kPack + k];
    visit(pack, begin + p * kPack);
  }
  for (int64_t v = end - (end - begin) % kPack + threadIdx.x; v < end; v += kThreads) single(v);
}

}  // namespace tokenrl::cuda
