// What this machine can do at best: bytes read, bytes copied and exponentials per second. The limits that benchmarks
// refer to.
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "../introspection.h"
#include "kernels.h"

namespace tokenrl::cpu {
namespace {

constexpr int kPasses = 7;         // the fastest counts
constexpr int64_t kValues = 2048;  // exponentials per round, from the first-level cache

// Keeps results alive that nobody reads.
std::atomic<uint64_t> sink{0};

double processor_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Seconds that `threads` threads take for body(thread), from the moment when all are ready until the last is done; of
// one thread its processor time, which others on the machine do not lengthen (threads that take turns would share no
// memory bus, so of several it says too little).
template <class F>
double seconds(int threads, F&& body) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  double own = 0;
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; ++thread)
    running.emplace_back([&, thread] {
      ++ready;
      while (!go) std::this_thread::yield();
      const double begin = processor_seconds();
      body(thread);
      if (threads == 1) own = processor_seconds() - begin;
    });
  while (ready < threads) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  go = true;
  for (std::thread& one : running) one.join();
  return threads == 1 ? own : std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <class F>
double fastest(int threads, F&& body) {
  double best = infinity<double>();
  for (int pass = 0; pass < kPasses; ++pass) best = std::min(best, seconds(threads, body));
  return best;
}

// A buffer of n words of which each thread owns, and has first touched, an equal part.
struct Shares {
  int threads;
  int64_t each;
  std::unique_ptr<uint64_t[]> words;

  Shares(int64_t bytes, int count)
      : threads(count), each(std::max<int64_t>(bytes / 8 / count, 8)), words(new uint64_t[each * count]) {
    seconds(threads, [&](int thread) { std::fill(of(thread), of(thread) + each, uint64_t{1}); });
  }
  uint64_t* of(int thread) const { return words.get() + thread * each; }
  double bytes() const { return 8.0 * static_cast<double>(each) * threads; }
  // Rounds that make a pass long enough for the clock, however small the buffer is.
  int64_t rounds() const { return std::max<int64_t>(1, (int64_t{1} << 28) / (8 * each * threads)); }
};

}  // namespace
}  // namespace tokenrl::cpu

using namespace tokenrl::cpu;

double tokenrl_measure_read(int64_t bytes, int threads) {
  const Shares shares(bytes, threads);
  const int64_t rounds = shares.rounds();
  const double best = fastest(threads, [&](int thread) {
    for (int64_t round = 0; round < rounds; ++round) sink += sum_words(shares.of(thread), shares.each);
  });
  return shares.bytes() * static_cast<double>(rounds) / best;
}

double tokenrl_measure_copy(int64_t bytes, int threads) {
  const Shares from(bytes, threads), to(bytes, threads);
  const int64_t rounds = from.rounds();
  const double best = fastest(threads, [&](int thread) {
    for (int64_t round = 0; round < rounds; ++round) {
      std::memcpy(to.of(thread), from.of(thread), 8 * static_cast<size_t>(from.each));
      sink += to.of(thread)[round % from.each];
    }
  });
  return 2 * from.bytes() * static_cast<double>(rounds) / best;
}

double tokenrl_measure_exponentials(int64_t count, int threads) {
  const int64_t rounds = std::max<int64_t>(1, count / kValues / threads);
  const double best = fastest(threads, [&](int) {
    float values[kValues];
    for (int64_t i = 0; i < kValues; ++i) values[i] = -20.0f * static_cast<float>(i) / kValues;
    sink += static_cast<uint64_t>(sum_exponentials(values, kValues, rounds));
  });
  return static_cast<double>(rounds * kValues) * threads / best;
}
