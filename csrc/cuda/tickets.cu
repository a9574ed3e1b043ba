// A ticket for each device and stream, in the memory of this module: zero when a device loads it, and no tensor, which
// could lie in the pool of a graph that is only being warmed up.
#include <map>
#include <mutex>
#include <utility>

#include "block.cuh"
#include "launch.h"

namespace tokenrl::cuda {
namespace {

constexpr size_t kTickets = 1024;
__device__ unsigned tickets[kTickets];

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess)
    return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();  // or the next launch would report it
  return true;         // of another stream, which the default stream would have to wait for
}

}  // namespace

unsigned* ticket_of(int device, void* stream) {
  if (is_capturing(stream)) return nullptr;
  static std::mutex mutex;
  static std::map<std::pair<int, void*>, unsigned*> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const size_t next = known.size();
  const auto [entry, first_seen] = known.try_emplace({device, stream}, nullptr);
  void* memory = nullptr;
  if (first_seen && next < kTickets && cudaGetSymbolAddress(&memory, tickets) == cudaSuccess)
    entry->second = static_cast<unsigned*>(memory) + next;
  return entry->second;
}

}  // namespace tokenrl::cuda
