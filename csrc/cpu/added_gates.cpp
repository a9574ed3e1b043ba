// See added_gates.h.
#include "added_gates.h"

#include <atomic>

#include "../introspection.h"

namespace tokenrl::cpu {
namespace {

// Grows at its head and is never cut: whoever reads needs no lock.
struct Entry {
  AddedGate gate;
  const Entry* next;
};
std::atomic<const Entry*> newest{nullptr};

}  // namespace

const AddedGate* added_gate(const char* name) {
  for (const Entry* entry = newest.load(std::memory_order_acquire); entry; entry = entry->next)
    if (std::strcmp(entry->gate.name, name) == 0) return &entry->gate;
  return nullptr;
}

}  // namespace tokenrl::cpu

const char* tokenrl_add_gate(const void* gate) {
  using namespace tokenrl::cpu;
  const AddedGate& added = *static_cast<const AddedGate*>(gate);
  if (added.bytes_of_arguments != kBytesOfArguments) return "its kernels and this library were built of other sources";
  auto* entry = new Entry{added, newest.load(std::memory_order_relaxed)};
  while (!newest.compare_exchange_weak(entry->next, entry, std::memory_order_release)) {
  }
  return nullptr;
}
