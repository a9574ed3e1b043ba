// Logits 16 bytes at a time: loaded, widened, rounded and stored, and who of a block sees which.
#pragma once

#include <type_traits>

#include "block.cuh"
#include "launch.h"

namespace tokenrl::cuda {

// Logits that one thread loads or stores at once: 16 bytes.
template <class Logit>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(Logit);
  Logit of[size];
};

// Who reads a row together: the threads of a block, or those of a warp, beside which others read other rows.
template <int kCount>
struct Readers {
  static constexpr int count = kCount;
  __device__ __forceinline__ static unsigned rank() { return kCount == kThreads ? threadIdx.x : threadIdx.x % kCount; }
};
using BlockReads = Readers<kThreads>;
using WarpReads = Readers<kWarp>;

// Packs that a thread asks for before it uses the first.
constexpr int kInFlight = 4;

template <class Logit>
__device__ __forceinline__ bool is_aligned(const Logit* at) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

template <class Logit>
__device__ __forceinline__ int64_t elements_to_alignment(const Logit* at, int64_t most) {
  const int64_t bytes = (16 - reinterpret_cast<uintptr_t>(at) % 16) % 16;
  return smaller(static_cast<int64_t>(bytes / sizeof(Logit)), most);
}

// Two 16-bit logits that share a word, each rounded as by narrow(); the larger of each two, a number where one is NaN.
template <class Logit>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<Logit, BFloat16>) return same_bits<uint32_t>(__floats2bfloat162_rn(low, high));
  else return same_bits<uint32_t>(__floats2half2_rn(low, high));
#else
  return narrow<Logit>(low).bits | uint32_t{narrow<Logit>(high).bits} << 16;
#endif
}
template <class Logit>
__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  using Two = std::conditional_t<std::is_same_v<Logit, BFloat16>, __nv_bfloat162, __half2>;
  return same_bits<uint32_t>(__hmax2(same_bits<Two>(a), same_bits<Two>(b)));
#else
  const auto of = [](uint32_t word) { return widen(Logit{static_cast<uint16_t>(word)}); };
  return narrow_pair<Logit>(::fmax(of(a), of(b)), ::fmax(of(a >> 16), of(b >> 16)));
#endif
}

// The logits of some packs, in order: 16-bit ones by the word.
template <class Logit, class T, int kPacks>
__device__ __forceinline__ void widen_packs(const Pack<Logit> (&packs)[kPacks], T (&y)[kPacks * Pack<Logit>::size]) {
  if constexpr (sizeof(Logit) == 2) {
    uint32_t word[kPacks * 4];
    std::memcpy(word, packs, sizeof packs);
#pragma unroll
    for (int k = 0; k < kPacks * 4; ++k) {
      y[2 * k] = widen(Logit{static_cast<uint16_t>(word[k])});
      y[2 * k + 1] = widen(Logit{static_cast<uint16_t>(word[k] >> 16)});
    }
  } else {
#pragma unroll
    for (int k = 0; k < kPacks * Pack<Logit>::size; ++k) y[k] = packs[k / Pack<Logit>::size].of[k % Pack<Logit>::size];
  }
}
// The pack of its numbers, rounded.
template <class Logit, class T>
__device__ __forceinline__ Pack<Logit> narrow_pack(const T* x) {
  Pack<Logit> pack;
  if constexpr (sizeof(Logit) == 2) {
    uint32_t word[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) word[k] = narrow_pair<Logit>(x[2 * k], x[2 * k + 1]);
    std::memcpy(&pack, word, sizeof pack);
  } else {
#pragma unroll
    for (int k = 0; k < Pack<Logit>::size; ++k) pack.of[k] = x[k];
  }
  return pack;
}
// The largest of `from` and some packs' logits; a NaN is none.
template <class Logit, class T, int kPacks>
__device__ __forceinline__ T highest_of(T from, const Pack<Logit> (&packs)[kPacks]) {
  if constexpr (sizeof(Logit) == 2) {
    uint32_t word[kPacks * 4];
    std::memcpy(word, packs, sizeof packs);
#pragma unroll
    for (int k = 1; k < kPacks * 4; ++k) word[0] = larger_pair<Logit>(word[0], word[k]);
    return ::fmax(
        from, ::fmax(widen(Logit{static_cast<uint16_t>(word[0])}), widen(Logit{static_cast<uint16_t>(word[0] >> 16)})));
  } else {
#pragma unroll
    for (int k = 0; k < kPacks * Pack<Logit>::size; ++k)
      from = ::fmax(from, packs[k / Pack<Logit>::size].of[k % Pack<Logit>::size]);
    return from;
  }
}

// The pack at an address that 16 bytes divide.
struct Aligned {
  static constexpr bool reads_beyond = false;
  template <class Logit>
  __device__ __forceinline__ static Pack<Logit> load(const Logit* at) {
    return *reinterpret_cast<const Pack<Logit>*>(at);
  }
};
// At another: out of the two packs of memory that it lies in, so that bytes behind it are read.
struct Shifted {
  static constexpr bool reads_beyond = true;
  template <class Logit>
  __device__ __forceinline__ static Pack<Logit> load(const Logit* at);
};
template <class Logit>
__device__ __forceinline__ Pack<Logit> Shifted::load(const Logit* at) {
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

// At either: the address is asked for each pack.
struct Anywhere {
  static constexpr bool reads_beyond = true;
  template <class Logit>
  __device__ __forceinline__ static Pack<Logit> load(const Logit* at) {
    return is_aligned(at) ? Aligned::load(at) : Shifted::load(at);
  }
};

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

// visit(packs, the first's first index) for what this thread sees of `count` packs from logits[begin] on: several at
// once, each as many packs behind the one before as there are readers; then one at a time.
template <class How, class Who, int kAtOnce = kInFlight, class Logit, class Visit>
__device__ __forceinline__ void for_whole_packs(const Logit* logits, int64_t begin, int64_t count, Visit visit) {
  constexpr int kPack = Pack<Logit>::size;
  const int64_t end = begin + count * kPack;
  constexpr int kStep = Who::count * kPack;
  int64_t v = begin + Who::rank() * kPack;
  // The last pack of all is not among many at once, shifted or not.
  for (; kAtOnce > 1 && v + (kAtOnce - 1) * kStep < end - kPack; v += kAtOnce * kStep) {
    Pack<Logit> packs[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) packs[k] = How::load(logits + v + k * kStep);
    visit(packs, v);
  }
#pragma unroll 1
  for (; v < end; v += kStep) {
    Pack<Logit> packs[1];
    if (!How::reads_beyond || v < end - kPack) packs[0] = How::load(logits + v);
    else
      for (int k = 0; k < kPack; ++k) packs[0].of[k] = logits[v + k];
    visit(packs, v);
  }
}

// single(v) for this thread's among logits [begin, end) behind the last whole pack.
template <class Who, class Logit, class Single>
__device__ __forceinline__ void for_tail(int64_t begin, int64_t end, Single single) {
  for (int64_t v = end - (end - begin) % Pack<Logit>::size + Who::rank(); v < end; v += Who::count) single(v);
}

// Both of logits [begin, end). Who sees what depends on no address: the sums of a row have the same bits in whatever
// place it lies. In one loop, or in one for rows that are aligned and one for the others.
template <class Who, int kAtOnce = kInFlight, class Logit, class Visit, class Single>
__device__ __forceinline__ void for_packs_in_one_loop(const Logit* logits, int64_t begin, int64_t end, Visit visit,
                                                      Single single) {
  for_whole_packs<Anywhere, Who, kAtOnce>(logits, begin, (end - begin) / Pack<Logit>::size, visit);
  for_tail<Who, Logit>(begin, end, single);
}
template <class Who, class Logit, class Visit, class Single>
__device__ __forceinline__ void for_packs(const Logit* logits, int64_t begin, int64_t end, Visit visit, Single single) {
  const int64_t count = (end - begin) / Pack<Logit>::size;
  if (is_aligned(logits + begin)) for_whole_packs<Aligned, Who>(logits, begin, count, visit);
  else for_whole_packs<Shifted, Who>(logits, begin, count, visit);
  for_tail<Who, Logit>(begin, end, single);
}

// The index of the k-th of several packs' logits.
template <class Who, class Logit>
__device__ __forceinline__ int64_t index_in(int64_t first, int k) {
  return first + k / Pack<Logit>::size * Who::count * Pack<Logit>::size + k % Pack<Logit>::size;
}
// visit(logit, its index) for each logit of packs that for_packs shows.
template <class Who, class Logit, int kPacks, class Visit>
__device__ __forceinline__ void for_each_of(const Pack<Logit> (&packs)[kPacks], int64_t first, Visit visit) {
#pragma unroll
  for (int k = 0; k < kPacks * Pack<Logit>::size; ++k)
    visit(widen(packs[k / Pack<Logit>::size].of[k % Pack<Logit>::size]), index_in<Who, Logit>(first, k));
}

}  // namespace tokenrl::cuda
