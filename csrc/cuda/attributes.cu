// What the CUDA runtime says of the kernels: of each on the current device, and whether they run on another.
#include <string>

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

namespace {

std::string shown(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

// The error of asking for a kernel's code on a device.
cudaError_t code_on(int device) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, tokenrl::cuda::named_kernels().front().function);
  cudaSetDevice(current);
  cudaGetLastError();  // or the next launch would report it
  return error;
}

}  // namespace

const char* tokenrl_cuda_refusal(int device) {
  static thread_local std::string reason;
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver / 1000 < CUDART_VERSION / 1000) {
    reason = "the driver can CUDA " + shown(driver) + ", the kernels have the runtime of " + shown(CUDART_VERSION);
    return reason.c_str();
  }
  const cudaError_t error = code_on(device);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
