// What the CUDA runtime says of each kernel on the current device.
#include "../introspection.h"
#include "block.cuh"

const char* tokenrl_kernel_attributes(void (*visit)(void*, const TokenrlKernel&), void* context) {
  using namespace tokenrl::cuda;
  for (const NamedKernel& kernel : named_kernels()) {
    cudaFuncAttributes attributes{};
    int blocks = 0;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kThreads, 0);
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next launch would report it
      return cudaGetErrorString(error);
    }
    visit(context, {kernel.name.c_str(), kThreads, attributes.numRegs, static_cast<int>(attributes.sharedSizeBytes),
                    static_cast<int>(attributes.localSizeBytes), blocks});
  }
  return nullptr;
}
