// Memory of n objects that need no constructor, for as long as it lives. Only for sources that are compiled once per
// instruction set.
#pragma once

#include <cstdlib>

#include "kernels.h"

namespace tokenrl::cpu {

// Throws std::bad_alloc.
void* allocate(int64_t count, size_t size);

namespace TOKENRL_ISA {

template <class Object>
struct Scratch {
  Object* const at;

  inline explicit Scratch(int64_t count) : at(static_cast<Object*>(allocate(count, sizeof(Object)))) {}
  inline ~Scratch() { std::free(at); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace TOKENRL_ISA
}  // namespace tokenrl::cpu
