// Where an op's arguments go: the CPU kernels, or the CUDA launchers with their stream and scratch memory.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef TOKENRL_WITH_CUDA
#include <dlfcn.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <optional>
#include <vector>

#include "cpu/added_gates.h"
#include "cpu/kernels.h"
#if defined(TOKENRL_WITH_CUDA) || defined(TOKENRL_SIM)
#include "cuda/launch.h"
#endif

namespace tokenrl {
namespace {

// Torch's own thread pool.
[[maybe_unused]] const cpu::Threads kTorchThreads{
    [](int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
      torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
    }};

struct CpuDevice {
  // Memory just allocated that will be written from end to end: in huge pages, where the system gives them to those who
  // ask, the first touch of each page costs a fraction.
  static void announce_writes([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
    constexpr uintptr_t huge = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + huge - 1) / huge * huge;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / huge * huge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  }
  static const cpu::AddedGate* added_gate(const char* gate) { return cpu::added_gate(gate); }
  template <class T>
  void objective(const ObjectiveArgs<T>& args, Statistic statistic, bool through, const char* gate) const {
    cpu::objective(args, statistic, through, gate, kTorchThreads);
  }
  template <class T>
  void statistic(const StatisticArgs<T>& args, Statistic statistic, bool adjoint) const {
    cpu::statistic(args, statistic, adjoint, kTorchThreads);
  }
  template <class T>
  void position_adaptive_clip(const ClipArgs<T>& args) const {
    cpu::position_adaptive_clip(args, kTorchThreads);
  }
  void aggregation_weights(const WeightArgs& args, Span span, Unit unit) const {
    cpu::aggregation_weights(args, span, unit, kTorchThreads);
  }
  template <class Args>
  void token_logprobs(const Args& args) const {
    cpu::token_logprobs(args, kTorchThreads);
  }
  template <class Args>
  void token_logprobs_backward(const Args& args) const {
    cpu::token_logprobs_backward(args, kTorchThreads);
  }
  template <class Args>
  void divergence(const Args& args, const char* kind) const {
    cpu::divergence(args, kind, kTorchThreads);
  }
  template <class Args>
  void divergence_backward(const Args& args, const char* kind) const {
    cpu::divergence_backward(args, kind, kTorchThreads);
  }
};

#if defined(TOKENRL_WITH_CUDA) || defined(TOKENRL_SIM)
struct CudaDevice {
  const torch::stable::Tensor& like;

  static void announce_writes(void*, size_t) {}
  static const cpu::AddedGate* added_gate(const char*) { return nullptr; }

  torch::stable::Tensor scratch(size_t bytes) const {
    return torch::stable::new_empty(like, std::vector<int64_t>{static_cast<int64_t>(bytes)},
                                    torch::headeronly::ScalarType::Byte);
  }
  void* stream() const {
#ifdef TOKENRL_WITH_CUDA
    // libtorch_cuda is found at run time: this library loads beside a torch without CUDA too.
    using CurrentStream = int32_t (*)(int32_t, void**);
    static const auto current_stream = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
      return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    STD_TORCH_CHECK(current_stream,
                    "tokenrl: this torch has no libtorch_cuda.so, so there is no CUDA stream to launch on.");
    void* stream = nullptr;
    STD_TORCH_CHECK(current_stream(like.get_device_index(), &stream) == 0, "tokenrl: torch gave no CUDA stream.");
    return stream;
#else
    return nullptr;
#endif
  }
  // Where the stream has none, fresh memory that it zeroes.
  struct Ticket {
    std::optional<torch::stable::Tensor> fresh;
    unsigned* at;
  };
  Ticket ticket() const {
#ifdef TOKENRL_WITH_CUDA
    if (unsigned* kept = cuda::ticket_of(like.get_device_index(), stream())) return {std::nullopt, kept};
    auto fresh = torch::stable::new_zeros(like, std::vector<int64_t>{1}, torch::headeronly::ScalarType::Int);
    return {fresh, static_cast<unsigned*>(fresh.data_ptr())};
#else
    static thread_local unsigned of_this_thread = 0;
    return {std::nullopt, &of_this_thread};
#endif
  }
  static void check(const char* error) { STD_TORCH_CHECK(!error, "tokenrl: CUDA launch failed: ", error ? error : ""); }

  template <class T>
  void objective(const ObjectiveArgs<T>& args, Statistic statistic, bool through, const char* gate) const {
    const auto memory = scratch(cuda::objective_scratch_bytes<T>(args.spans));
    check(cuda::objective(args, statistic, through, gate, memory.data_ptr(), ticket().at, stream()));
  }
  template <class T>
  void statistic(const StatisticArgs<T>& args, Statistic statistic, bool adjoint) const {
    const auto memory = scratch(cuda::statistic_scratch_bytes(args));
    check(cuda::statistic(args, statistic, adjoint, memory.data_ptr(), stream()));
  }
  template <class T>
  void position_adaptive_clip(const ClipArgs<T>& args) const {
    check(cuda::position_adaptive_clip(args, stream()));
  }
  void aggregation_weights(const WeightArgs& args, Span span, Unit unit) const {
    const auto memory = scratch(cuda::aggregation_weights_scratch_bytes(args.spans.num_sequences));
    check(cuda::aggregation_weights(args, span, unit, memory.data_ptr(), ticket().at, stream()));
  }
  template <class Args>
  void token_logprobs(const Args& args) const {
    const auto memory = scratch(cuda::token_logprobs_scratch_bytes(args));
    check(cuda::token_logprobs(args, memory.data_ptr(), stream()));
  }
  template <class Args>
  void token_logprobs_backward(const Args& args) const {
    check(cuda::token_logprobs_backward(args, stream()));
  }
  template <class Args>
  void divergence(const Args& args, const char* kind) const {
    const auto memory = scratch(cuda::divergence_scratch_bytes(args));
    check(cuda::divergence(args, kind, memory.data_ptr(), stream()));
  }
  template <class Args>
  void divergence_backward(const Args& args, const char* kind) const {
    check(cuda::divergence_backward(args, kind, stream()));
  }
};
#endif

// f(device) for the device of x, which is the current one meanwhile: a kernel is launched on that.
template <class F>
void on_device_of([[maybe_unused]] const torch::stable::Tensor& x, F&& f) {
#ifdef TOKENRL_WITH_CUDA
  if (x.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard current(x.get_device_index());
    return f(CudaDevice{x});
  }
#endif
#ifdef TOKENRL_SIM
  f(CudaDevice{x});
#else
  f(CpuDevice{});
#endif
}

}  // namespace
}  // namespace tokenrl
