// The threads of a CUDA block as fibres on one CPU thread: scheduling, barriers and warp operations of
// csrc/host/cuda_on_cpu.h.
#pragma once

#ifndef __x86_64__
#error \
    "csrc/host/fibres.h switches stacks in x86-64 assembly; the CUDA sources are tested on the CPU on that machine only"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace tokenrl::host {

enum class State { ready, barrier, warp, done };
enum class Collective { sync, shuffle, vote };

struct Fibre {
  std::unique_ptr<char[]> stack;
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;
  State state = State::done;
  unsigned mask = 0;
  Collective kind = Collective::sync;
};

struct Warp {
  uint64_t posted[32], result[32];
  unsigned waiting, finished;  // lanes
};

// The machine's one block at a time, per OS thread.
struct Block {
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  unsigned running = 0, live = 0, waiting = 0;
  void (*body)(const void*) = nullptr;
  const void* closure = nullptr;
  void* scheduler = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  std::vector<unsigned char> dynamic_shared;
  std::vector<std::pair<unsigned char*, size_t>> static_shared;
};

inline Block& block() {
  static thread_local Block instance;
  return instance;
}

inline long& schedule() {
  static long chosen = std::getenv("TOKENRL_SCHEDULE") ? std::atol(std::getenv("TOKENRL_SCHEDULE")) : 0;
  return chosen;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  for (size_t i = 0; i < block().fibres.size(); ++i) {
    const Fibre& f = block().fibres[i];
    if (f.state == State::barrier) std::fprintf(stderr, "  thread %zu waits at a barrier\n", i);
    if (f.state == State::warp) std::fprintf(stderr, "  thread %zu waits in a warp operation, mask %08x\n", i, f.mask);
  }
  std::abort();
}

constexpr size_t kStackBytes = 128 * 1024;

// Saves the callee-saved registers and the stack pointer, and continues where `load` was saved.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

// The sanitizer must know on which stack the program goes on.
inline void leaving([[maybe_unused]] void** fake, [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake, bottom, size);
#endif
}
inline void arrived([[maybe_unused]] void* fake, [[maybe_unused]] const void** bottom, [[maybe_unused]] size_t* size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, bottom, size);
#endif
}

// From a fibre back to the scheduler, which runs it again when its state is ready.
inline void park() {
  Block& b = block();
  Fibre& self = b.fibres[b.running];
  leaving(self.state == State::done ? nullptr : &self.fake_stack, b.scheduler_bottom, b.scheduler_size);
  switch_stack(&self.stack_pointer, b.scheduler);
  arrived(self.fake_stack, nullptr, nullptr);
}

inline void resume(unsigned i) {
  Block& b = block();
  Fibre& fibre = b.fibres[i];
  b.running = i;
  threadIdx.x = i;
  leaving(&b.scheduler_fake_stack, fibre.stack.get(), kStackBytes);
  switch_stack(&b.scheduler, fibre.stack_pointer);
  arrived(b.scheduler_fake_stack, nullptr, nullptr);
}

inline void open_barrier_if_complete() {
  Block& b = block();
  if (b.waiting == 0 || b.waiting != b.live) return;
  b.waiting = 0;
  for (Fibre& f : b.fibres)
    if (f.state == State::barrier) f.state = State::ready;
}

inline void fibre_main() {
  Block& b = block();
  arrived(nullptr, &b.scheduler_bottom, &b.scheduler_size);
  b.body(b.closure);
  b.fibres[b.running].state = State::done;
  b.warps[b.running / 32].finished |= 1u << b.running % 32;
  --b.live;
  open_barrier_if_complete();
  park();
}

inline void start(Fibre& fibre) {
  if (!fibre.stack) fibre.stack.reset(new char[kStackBytes]);
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(fibre.stack.get(), kStackBytes);
#endif
  // switch_stack pops six registers and returns into fibre_main, whose own return address is a null.
  auto** top =
      reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fibre.stack.get()) + kStackBytes) & ~uintptr_t{15});
  std::fill(top - 8, top, nullptr);
  top[-2] = reinterpret_cast<void*>(&fibre_main);
  fibre.stack_pointer = top - 8;
  fibre.state = State::ready;
}

class Order {
 public:
  explicit Order(size_t n) : order_(n), random_(static_cast<unsigned>(schedule())) {
    std::iota(order_.begin(), order_.end(), 0u);
    if (schedule() == 1) std::reverse(order_.begin(), order_.end());
  }
  const std::vector<unsigned>& next() {
    if (schedule() > 1) std::shuffle(order_.begin(), order_.end(), random_);
    return order_;
  }
  // Whether a warp that can go on does so before others get their turn; always, unless the schedule is shuffled.
  bool stays() { return schedule() < 2 || random_() % 2 == 0; }

 private:
  std::vector<unsigned> order_;
  std::mt19937 random_;
};

// Runs lanes of a warp, each until it waits; whether any could run.
inline bool run_warp(unsigned warp, Order& lanes) {
  bool moved = false, again = true;
  while (again) {
    again = false;
    for (unsigned lane : lanes.next()) {
      if (block().fibres[warp * 32 + lane].state != State::ready) continue;
      resume(warp * 32 + lane);
      moved = again = true;
    }
    again = again && lanes.stays();
  }
  return moved;
}

inline void run_block(Order& warps, Order& lanes) {
  Block& b = block();
  for (auto& [memory, bytes] : b.static_shared) std::memset(memory, 0xFF, bytes);
  std::fill(b.dynamic_shared.begin(), b.dynamic_shared.end(), 0xFF);
  for (Fibre& f : b.fibres) start(f);
  for (Warp& warp : b.warps) warp.waiting = warp.finished = 0;
  b.live = static_cast<unsigned>(b.fibres.size());
  b.waiting = 0;
  while (b.live > 0) {
    bool moved = false;
    for (unsigned warp : warps.next()) moved |= run_warp(warp, lanes);
    if (!moved) fail("deadlock: no thread can go on");
  }
}

// How many kernels this thread has launched.
inline int64_t& launches() {
  static thread_local int64_t count = 0;
  return count;
}

template <class Body>
void launch(int64_t grid, int64_t threads, size_t shared_bytes, const Body& body) {
  ++launches();
  if (grid < 1 || grid > 2147483647 || threads < 1 || threads > 1024 || threads % 32 != 0)
    fail("no such grid or block");
  Block& b = block();
  b.fibres.resize(threads);
  b.warps.resize(threads / 32);
  b.dynamic_shared = std::vector<unsigned char>(shared_bytes);
  b.body = [](const void* closure) { (*static_cast<const Body*>(closure))(); };
  b.closure = &body;
  gridDim.x = static_cast<unsigned>(grid);
  blockDim.x = static_cast<unsigned>(threads);
  Order blocks(grid), warps(threads / 32), lanes(32);
  for (unsigned i : blocks.next()) {
    blockIdx.x = i;
    run_block(warps, lanes);
  }
}

// Waits until every lane of `mask` has come with the same mask and kind; then what each of them posted.
inline const uint64_t* collective(unsigned mask, Collective kind, uint64_t posted) {
  Block& b = block();
  const unsigned first = b.running / 32 * 32, lane = b.running % 32;
  Warp& warp = b.warps[first / 32];
  if (!(mask >> lane & 1)) fail("a warp operation whose mask leaves out the calling lane");
  warp.posted[lane] = posted;
  if (mask & warp.finished) fail("a warp operation whose mask names a lane that has finished");
  Fibre& self = b.fibres[b.running];
  self.mask = mask;
  self.kind = kind;
  self.state = State::warp;
  warp.waiting |= 1u << lane;
  if ((warp.waiting & mask) != mask) {
    park();
    return warp.result;
  }
  for (unsigned other = 0; other < 32; ++other) {
    if (!(mask >> other & 1)) continue;
    Fibre& f = b.fibres[first + other];
    if (f.mask != mask || f.kind != kind) fail("lanes of a mask meet in different warp operations");
    warp.result[other] = warp.posted[other];
    f.state = State::ready;
  }
  warp.waiting &= ~mask;
  return warp.result;
}

template <class V>
V shuffle(unsigned mask, V value, unsigned source, bool own) {
  static_assert(sizeof(V) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* lanes = collective(mask, Collective::shuffle, bits);
  if (own) return value;
  if (!(mask >> source & 1)) fail("a shuffle from a lane outside the mask");
  std::memcpy(&value, &lanes[source], sizeof value);
  return value;
}

}  // namespace tokenrl::host
