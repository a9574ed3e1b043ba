// Runs CUDA kernels on the CPU, in tests: the same .cu files, compiled by a plain C++ compiler with this header.
//
// Every CUDA thread is a fibre (its own stack, switched by hand); blocks run one after another on the calling thread. A
// fibre runs until it waits at a barrier or in a warp operation. A schedule is who gets the next turn: 0 in order, 1 in
// reverse, each warp as far as it can go before the next; any other number is a seed that shuffles blocks, warps, lanes
// and how long a warp's turn lasts (environment TOKENRL_SCHEDULE, or schedule()). A race that a missing barrier opens
// shows in some schedule. Shared memory starts as 0xFF, and is on the heap, where the address sanitizer sees its ends.
// What real hardware would hang on or leave undefined (a barrier that some threads never reach, a warp mask that names
// finished lanes) ends the process with a message. Blocks and grids are one-dimensional; blocks do not overlap, so
// races between blocks are not seen.
#pragma once

#include "fibres.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace tokenrl::host {

// Shared memory of one declaration: on the heap, poisoned again for every block.
template <class T>
class Shared {
 public:
  explicit Shared(size_t count) : memory_(new unsigned char[count * sizeof(T)]) {
    std::memset(memory_.get(), 0xFF, count * sizeof(T));
    block().static_shared.emplace_back(memory_.get(), count * sizeof(T));
  }
  T* data() { return reinterpret_cast<T*>(memory_.get()); }

 private:
  std::unique_ptr<unsigned char[]> memory_;
};

}  // namespace tokenrl::host

#define TRL_SHARED(type, name, count)                                      \
  static thread_local ::tokenrl::host::Shared<type> name##_storage(count); \
  type* const name = name##_storage.data()
#define TRL_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(::tokenrl::host::block().dynamic_shared.data())
#define TRL_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  ((void)(stream), ::tokenrl::host::launch(grid, threads, shared_bytes, [&] { kernel(__VA_ARGS__); }))

inline void __syncthreads() {
  auto& b = tokenrl::host::block();
  b.fibres[b.running].state = tokenrl::host::State::barrier;
  ++b.waiting;
  tokenrl::host::open_barrier_if_complete();
  tokenrl::host::park();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  tokenrl::host::collective(mask, tokenrl::host::Collective::sync, 0);
}
inline void __threadfence() {}

template <class V>
V __shfl_sync(unsigned mask, V value, int source) {
  return tokenrl::host::shuffle(mask, value, static_cast<unsigned>(source) % 32, false);
}
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int bits) {
  return tokenrl::host::shuffle(mask, value, (threadIdx.x ^ static_cast<unsigned>(bits)) % 32, false);
}
template <class V>
V __shfl_up_sync(unsigned mask, V value, unsigned delta) {
  const unsigned lane = threadIdx.x % 32;
  return tokenrl::host::shuffle(mask, value, lane - delta, lane < delta);
}
template <class V>
V __shfl_down_sync(unsigned mask, V value, unsigned delta) {
  const unsigned lane = threadIdx.x % 32;
  return tokenrl::host::shuffle(mask, value, lane + delta, lane + delta > 31);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* lanes = tokenrl::host::collective(mask, tokenrl::host::Collective::vote, vote);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) ballot |= (mask >> lane & 1 && lanes[lane] ? 1u : 0u) << lane;
  return ballot;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == mask; }

inline int __popc(unsigned word) { return __builtin_popcount(word); }

// One fibre runs at a time. Sums of fractions in any order would not repeat, so those atomics do not exist here.
template <class V>
V atomicAdd(V* at, V value) {
  static_assert(std::is_integral_v<V>);
  const V before = *at;
  *at += value;
  return before;
}
inline unsigned atomicInc(unsigned* at, unsigned last) {
  const unsigned before = *at;
  *at = before >= last ? 0 : before + 1;
  return before;
}
template <class V>
V __ldg(const V* at) {
  return *at;
}
template <class V>
V __ldcg(const V* at) {
  return *at;
}
