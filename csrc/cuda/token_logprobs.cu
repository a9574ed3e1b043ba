// Log-prob, entropy and log-sum-exp of each row of logits in one pass, and the gradient of the logits: one block per
// row.
#include "block.cuh"
#include "launch.h"

namespace tokenrl::cuda {

// Logits that one thread loads or stores at once: 16 bytes.
template <class Logit>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(Logit);
  Logit of[size];
};

template <class Logit>
__device__ __forceinline__ bool is_aligned(const Logit* at) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

template <class Logit>
__device__ __forceinline__ int64_t elements_to_alignment(const Logit* at, int64_t most) {
  const int64_t bytes = (16 - reinterpret_cast<uintptr_t>(at) % 16) % 16;
  return smaller(static_cast<int64_t>(bytes / sizeof(Logit)), most);
}

struct Row {
  int64_t index;   // of ids and outputs
  int64_t offset;  // of the first logit, in elements
};

template <class Logit, class T>
__device__ __forceinline__ Row row_of(const LogprobArgs<Logit, T>& args) {
  const int64_t index = blockIdx.x;
  return {index, index / args.time * args.stride_batch + index % args.time * args.stride_time};
}

template <class T>
struct Merge {
  __device__ __forceinline__ Softmax<T> operator()(const Softmax<T>& a, const Softmax<T>& b) const {
    return merge(a, b);
  }
};

// What this thread sees of the row: packs from the first aligned logit on, the rest one by one.
template <class Logit, class T>
__device__ __forceinline__ Softmax<T> thread_softmax(const Logit* logits, int64_t vocab, T temperature) {
  constexpr int kPack = Pack<Logit>::size;
  const int64_t head = elements_to_alignment(logits, vocab), packs = (vocab - head) / kPack;
  Softmax<T> state = no_logits<T>();
  for (int64_t i = threadIdx.x; i < head; i += kThreads) take(state, widen(logits[i]) / temperature);
  const auto* body = reinterpret_cast<const Pack<Logit>*>(logits + head);
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
    const Pack<Logit> pack = body[i];
#pragma unroll
    for (int k = 0; k < kPack; ++k) take(state, widen(pack.of[k]) / temperature);
  }
  for (int64_t i = head + packs * kPack + threadIdx.x; i < vocab; i += kThreads)
    take(state, widen(logits[i]) / temperature);
  return state;
}

template <class Logit, class T>
__global__ void __launch_bounds__(kThreads) logprobs_kernel(LogprobArgs<Logit, T> args) {
  TRL_SHARED(Softmax<T>, memory, kWarps);
  const Row row = row_of(args);
  const int64_t id = args.ids[row.index];
  if (id == kIgnoredId) {
    if (threadIdx.x == 0) args.logp[row.index] = args.entropy[row.index] = args.lse[row.index] = 0;
    return;
  }
  const Logit* logits = args.logits + row.offset;
  const Softmax<T> all = reduce(thread_softmax(logits, args.vocab, args.temperature), Merge<T>{}, memory);
  if (threadIdx.x != 0) return;
  const T lse = log_sum(all);
  const bool known = id >= 0 && id < args.vocab;
  args.logp[row.index] = known ? widen(logits[id]) / args.temperature - lse : infinity<T>() - infinity<T>();
  args.entropy[row.index] = entropy_of(all);
  args.lse[row.index] = lse;
}

// The gradient of one row at one logit.
template <class Logit, class T>
struct RowGradient {
  T temperature, lse, entropy, grad_logp, grad_entropy;
  int64_t id;

  __device__ __forceinline__ Logit operator()(Logit logit, int64_t i) const {
    const T z = widen(logit) / temperature;
    return narrow<Logit>(logit_gradient(z, lse, entropy, grad_logp, grad_entropy, i == id) / temperature);
  }
};

template <class Logit, class T>
__global__ void __launch_bounds__(kThreads) logprobs_backward_kernel(LogprobArgs<Logit, T> args) {
  constexpr int kPack = Pack<Logit>::size;
  const Row row = row_of(args);
  const int64_t id = args.ids[row.index], vocab = args.vocab;
  const Logit* logits = args.logits + row.offset;
  Logit* out = args.grad_logits + row.index * vocab;
  const bool ignored = id == kIgnoredId;
  const RowGradient<Logit, T> gradient{args.temperature,
                                       args.lse[row.index],
                                       args.entropy[row.index],
                                       args.grad_logp ? args.grad_logp[row.index] : T(0),
                                       args.grad_entropy ? args.grad_entropy[row.index] : T(0),
                                       id};
  const auto at = [&](int64_t i) { return ignored ? Logit{} : gradient(logits[i], i); };
  const int64_t head = elements_to_alignment(out, vocab), packs = (vocab - head) / kPack;
  const bool load_packs = !ignored && is_aligned(logits + head);
  for (int64_t i = threadIdx.x; i < head; i += kThreads) out[i] = at(i);
  for (int64_t p = threadIdx.x; p < packs; p += kThreads) {
    const int64_t first = head + p * kPack;
    Pack<Logit> pack;
    if (load_packs) {
      pack = *reinterpret_cast<const Pack<Logit>*>(logits + first);
#pragma unroll
      for (int k = 0; k < kPack; ++k) pack.of[k] = gradient(pack.of[k], first + k);
    } else {
#pragma unroll
      for (int k = 0; k < kPack; ++k) pack.of[k] = at(first + k);
    }
    *reinterpret_cast<Pack<Logit>*>(out + first) = pack;
  }
  for (int64_t i = head + packs * kPack + threadIdx.x; i < vocab; i += kThreads) out[i] = at(i);
}

template <class Logit, class T>
const char* token_logprobs(const LogprobArgs<Logit, T>& args, void* stream) {
  if (args.batch * args.time == 0) return nullptr;
  TRL_LAUNCH((logprobs_kernel<Logit, T>), args.batch * args.time, kThreads, 0, stream, args);
  return launch_error();
}

template <class Logit, class T>
const char* token_logprobs_backward(const LogprobArgs<Logit, T>& args, void* stream) {
  if (args.batch * args.time * args.vocab == 0) return nullptr;
  TRL_LAUNCH((logprobs_backward_kernel<Logit, T>), args.batch * args.time, kThreads, 0, stream, args);
  return launch_error();
}

template const char* token_logprobs(const LogprobArgs<float, float>&, void*);
template const char* token_logprobs(const LogprobArgs<double, double>&, void*);
template const char* token_logprobs(const LogprobArgs<BFloat16, float>&, void*);
template const char* token_logprobs(const LogprobArgs<Half, float>&, void*);
template const char* token_logprobs_backward(const LogprobArgs<float, float>&, void*);
template const char* token_logprobs_backward(const LogprobArgs<double, double>&, void*);
template const char* token_logprobs_backward(const LogprobArgs<BFloat16, float>&, void*);
template const char* token_logprobs_backward(const LogprobArgs<Half, float>&, void*);

template <class Logit, class T>
bool list_logprobs(const std::string& type) {
  return list_kernel("token_logprobs " + type, &logprobs_kernel<Logit, T>) &&
         list_kernel("token_logprobs_backward " + type, &logprobs_backward_kernel<Logit, T>);
}
static const bool listed = list_logprobs<float, float>("float") && list_logprobs<double, double>("double") &&
                           list_logprobs<BFloat16, float>("bfloat16") && list_logprobs<Half, float>("half");

}  // namespace tokenrl::cuda
