// The shim itself: what it must compute, and, with an argument, one mistake that it must report.
#include <cstdio>
#include <cstring>

#include "../../../csrc/cuda/block.cuh"

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (!holds) {
    std::printf("FAILED %s (thread %u)\n", what, threadIdx.x);
    ++failures;
  }
}

__global__ void works(int* blocks, float scale) {
  TRL_SHARED(float, numbers, 64);
  TRL_DYNAMIC_SHARED(unsigned char, bytes);
  const unsigned lane = threadIdx.x % 32;
  if (threadIdx.x == 0) expect(numbers[5] != numbers[5] && bytes[3] == 0xFF, "fresh shared memory is poisoned");
  __syncthreads();
  numbers[threadIdx.x] = scale * static_cast<float>(threadIdx.x);
  bytes[threadIdx.x] = static_cast<unsigned char>(threadIdx.x);
  __syncthreads();
  expect(numbers[63 - threadIdx.x] == scale * static_cast<float>(63 - threadIdx.x), "shared memory after a barrier");
  expect(bytes[(threadIdx.x + 40) % 64] == (threadIdx.x + 40) % 64, "dynamic shared memory after a barrier");
  expect(__shfl_sync(~0u, threadIdx.x, 3) == threadIdx.x - lane + 3, "shuffle");
  expect(__shfl_xor_sync(~0u, 1.5 * lane, 16) == 1.5 * (lane ^ 16), "shuffle by exclusive or");
  expect(__shfl_up_sync(~0u, lane, 4) == (lane < 4 ? lane : lane - 4), "shuffle up");
  expect(__shfl_down_sync(~0u, lane, 4) == (lane > 27 ? lane : lane + 4), "shuffle down");
  expect(__ballot_sync(~0u, lane % 2) == 0xaaaaaaaau, "ballot");
  expect(__any_sync(~0u, lane == 9) && !__all_sync(~0u, lane != 9), "votes");
  if (lane < 8) expect(__ballot_sync(0xffu, true) == 0xffu, "ballot of some lanes");
  __syncwarp();
  if (threadIdx.x == 17) atomicAdd(blocks, 1);
}

__global__ void unequal_barriers() {
  if (threadIdx.x < 40) __syncthreads();
  else __syncwarp();
}
__global__ void foreign_mask() {
  if (threadIdx.x == 1) __syncwarp(0x1u);
}
__global__ void finished_lane() {
  if (threadIdx.x != 2) __syncwarp();
}
__global__ void different_operations() {
  if (threadIdx.x < 16) __syncwarp();
  else __ballot_sync(~0u, true);
}
__global__ void out_of_shared(int beyond) {
  TRL_SHARED(int, numbers, 64);
  numbers[threadIdx.x + beyond] = 1;
}

void mistake(const char* which) {
  if (!std::strcmp(which, "barrier")) TRL_LAUNCH(unequal_barriers, 1, 64, 0, nullptr);
  if (!std::strcmp(which, "mask")) TRL_LAUNCH(foreign_mask, 1, 32, 0, nullptr);
  if (!std::strcmp(which, "finished")) TRL_LAUNCH(finished_lane, 1, 32, 0, nullptr);
  if (!std::strcmp(which, "operations")) TRL_LAUNCH(different_operations, 1, 32, 0, nullptr);
  if (!std::strcmp(which, "shared")) TRL_LAUNCH(out_of_shared, 1, 64, 0, nullptr, 1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    mistake(argv[1]);
    return 0;
  }
  for (long schedule : {0L, 1L, 7L}) {
    tokenrl::host::schedule() = schedule;
    int blocks = 0;
    TRL_LAUNCH(works, 5, 64, 64, nullptr, &blocks, 0.5f);
    expect(blocks == 5, "atomic additions");
  }
  std::printf(failures ? "%d failures\n" : "all as expected\n", failures);
  return failures != 0;
}
