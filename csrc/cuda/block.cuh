// What the threads of one block do together: scans and reductions in a fixed order, by warp shuffles and shared memory.
// Everything works on small structs whose size is a multiple of four bytes; `combine(earlier, later)` is associative.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define TRL_SHARED(type, name, count) __shared__ type name[count]
#define TRL_DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#define TRL_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  kernel<<<static_cast<unsigned>(grid), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "../host/cuda_on_cpu.h"
#endif

namespace tokenrl::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / kWarp;

// `shuffle(word)` applied to each 32-bit word of a struct.
template <class S, class Shuffle>
__device__ __forceinline__ S shuffled(S state, Shuffle shuffle) {
  static_assert(sizeof(S) % 4 == 0);
  uint32_t words[sizeof(S) / 4];
  std::memcpy(words, &state, sizeof(S));
#pragma unroll
  for (uint32_t& word : words) word = shuffle(word);
  std::memcpy(&state, words, sizeof(S));
  return state;
}

template <class S>
__device__ __forceinline__ S from_earlier_lane(S state, unsigned distance) {
  return shuffled(state, [=](uint32_t word) { return __shfl_up_sync(kAllLanes, word, distance); });
}

template <class S>
__device__ __forceinline__ S from_later_lane(S state, unsigned distance) {
  return shuffled(state, [=](uint32_t word) { return __shfl_down_sync(kAllLanes, word, distance); });
}

// Of the lane whose number differs in that bit.
template <class S>
__device__ __forceinline__ S from_lane_beside(S state, int bit) {
  return shuffled(state, [=](uint32_t word) { return __shfl_xor_sync(kAllLanes, word, bit); });
}

// `carry` and the states of all earlier threads combined. memory: [kWarps], shared; a barrier frees it again.
template <class S, class Combine>
__device__ __forceinline__ S scan_before(S own, S carry, Combine combine, S* memory) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  S through = own;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const S earlier = from_earlier_lane(through, distance);
    if (lane >= distance) through = combine(earlier, through);
  }
  if (lane == kWarp - 1) memory[warp] = through;
  const S before = from_earlier_lane(through, 1);
  __syncthreads();
  for (int w = 0; w < warp; ++w) carry = combine(carry, memory[w]);
  return lane == 0 ? carry : combine(carry, before);
}

// The first lane's: those of some lanes from it on, a power of two, combined.
template <int kLanes, class S, class Combine>
__device__ __forceinline__ S first_of_lanes(S own, Combine combine) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) own = combine(own, from_later_lane(own, distance));
  return own;
}

// The same of any way to make the first lane's out of several lanes' states, over_lanes(state, their number).
template <class S, class OverLanes>
__device__ __forceinline__ S over_warps(S own, OverLanes over_lanes, S* memory) {
  own = over_lanes(own, std::integral_constant<int, kWarp>{});
  if (threadIdx.x % kWarp == 0) memory[threadIdx.x / kWarp] = own;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    own = over_lanes(memory[threadIdx.x % kWarps], std::integral_constant<int, kWarps>{});
    if (threadIdx.x == 0) memory[0] = own;
  }
  __syncthreads();
  return memory[0];
}

// All threads' states combined, in every thread. memory: [kWarps], shared, and not in use by a call before.
template <class S, class Combine>
__device__ __forceinline__ S reduce(S own, Combine combine, S* memory) {
  return over_warps(
      own, [=](S state, auto lanes) { return first_of_lanes<decltype(lanes)::value>(state, combine); }, memory);
}

// True in all threads of the block that comes last of `blocks`; it sees what thread 0 of every block wrote before.
// The ticket starts at 0 and is 0 again after the last block has drawn it.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned blocks) {
  TRL_SHARED(unsigned, position, 1);
  if (threadIdx.x == 0) {
    __threadfence();
    position[0] = atomicInc(ticket, blocks - 1);
  }
  __syncthreads();
  if (position[0] != blocks - 1) return false;
  __threadfence();
  return true;
}

// Every kernel by name, for those who ask for its registers. A file lists its kernels when it is loaded.
struct NamedKernel {
  std::string name;
  const void* function;
};
inline std::vector<NamedKernel>& named_kernels() {
  static std::vector<NamedKernel> all;
  return all;
}
template <class Kernel>
bool list_kernel(const std::string& name, Kernel* kernel) {
  named_kernels().push_back({name, reinterpret_cast<const void*>(kernel)});
  return true;
}

// Of the current device; the CPU plays a small one.
inline int64_t num_multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
#else
  return 4;
#endif
}

// Null, or what the launches before complained of.
inline const char* launch_error() {
#ifdef __CUDACC__
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return cudaGetErrorString(error);
#endif
  return nullptr;
}

}  // namespace tokenrl::cuda
