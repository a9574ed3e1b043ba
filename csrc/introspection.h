// What the op library tells of itself to tokenrl._bindings.
#pragma once

#define TOKENRL_EXPORT extern "C" __attribute__((visibility("default")))

// One CUDA kernel on the current device.
struct TokenrlKernel {
  const char* name;
  int threads, registers, shared_bytes, local_bytes, blocks_per_multiprocessor;
};

TOKENRL_EXPORT const char* tokenrl_instruction_set();
// Calls visit(context, kernel) for each kernel; null, or the error's text.
TOKENRL_EXPORT const char* tokenrl_kernel_attributes(void (*visit)(void*, const TokenrlKernel&), void* context);
