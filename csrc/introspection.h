// What the op library tells of itself to tokenrl._bindings, and what tokenrl/fusion/ asks of it.
#pragma once

#include <cstdint>

#define TOKENRL_EXPORT extern "C" __attribute__((visibility("default")))

// One CUDA kernel on the current device.
struct TokenrlKernel {
  const char* name;
  int threads, registers, shared_bytes, local_bytes, blocks_per_multiprocessor;
};

TOKENRL_EXPORT const char* tokenrl_instruction_set();
// Makes the objective's CPU op run one more gate, a cpu::AddedGate that stays where it is; null, or why it cannot.
TOKENRL_EXPORT const char* tokenrl_add_gate(const void* gate);
// Calls visit(context, kernel) for each kernel; null, or the error's text.
TOKENRL_EXPORT const char* tokenrl_kernel_attributes(void (*visit)(void*, const TokenrlKernel&), void* context);

// Why the kernels cannot run on a CUDA device that torch sees, or null: its driver is older than their runtime, or none
// of them has code for it.
TOKENRL_EXPORT const char* tokenrl_cuda_refusal(int device);

// What this machine does at best with so many threads: bytes read, bytes copied (read plus written), exponentials, each
// per second.
TOKENRL_EXPORT double tokenrl_measure_read(int64_t bytes, int threads);
TOKENRL_EXPORT double tokenrl_measure_copy(int64_t bytes, int threads);
TOKENRL_EXPORT double tokenrl_measure_exponentials(int64_t count, int threads);
