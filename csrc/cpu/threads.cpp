// What surrounds the body of every kernel: see kernels.h, and scratch.h for its memory.
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>

#ifdef __x86_64__
#include <xmmintrin.h>
#endif

#include "kernels.h"

namespace tokenrl::cpu {
namespace {

struct Call {
  void (*body)(void*, int64_t, int64_t);
  void* context;
  std::mutex lock;
  std::exception_ptr first;

  void run(int64_t begin, int64_t end) noexcept try { body(context, begin, end); } catch (...) {
    const std::lock_guard<std::mutex> held(lock);
    if (!first) first = std::current_exception();
  }
};

struct WithoutSubnormals {
#ifdef __x86_64__
  const unsigned before = _mm_getcsr();

  WithoutSubnormals() { _mm_setcsr(before | _MM_FLUSH_ZERO_ON); }
  ~WithoutSubnormals() { _mm_setcsr(before); }
#endif
};

}  // namespace

void run(const Threads& threads, int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  Call call{body, context, {}, {}};
  threads.run(
      n, grain,
      [](void* of_call, int64_t begin, int64_t end) {
        [[maybe_unused]] const WithoutSubnormals guard;
        static_cast<Call*>(of_call)->run(begin, end);
      },
      &call);
  if (call.first) std::rethrow_exception(call.first);
}

void* allocate(int64_t count, size_t size) {
  void* memory = std::malloc(size * static_cast<size_t>(larger(count, int64_t{1})));
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace tokenrl::cpu
