// What a `.cu` file needs around its kernels: device guard, current stream, launch, registration. With
// LUNGKIT_EMULATE the same file is compiled by g++ against tests/cuda_on_cpu and registers CPU kernels in the
// namespace that it names.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"

#ifdef LUNGKIT_EMULATE

#define LUNGKIT_CUDA_NAMESPACE LUNGKIT_EMULATE
#define LUNGKIT_CUDA_KEY CPU

namespace lungkit {

inline bool on_device(const torch::stable::Tensor& tensor) {
  return tensor.is_cpu();
}
struct DeviceGuard {
  explicit DeviceGuard(const torch::stable::Tensor&) {}
};
inline cudaStream_t current_stream(const torch::stable::Tensor&) {
  return {};
}

}  // namespace lungkit

#define LUNGKIT_UNPACK(...) __VA_ARGS__
#define LUNGKIT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)  \
  ::lungkit_emulator::launch_kernel(#kernel, grid, block, shared_bytes, \
                                    LUNGKIT_UNPACK kernel __VA_OPT__(, ) __VA_ARGS__)
#define LUNGKIT_CUDA_CHECK(call) LUNGKIT_CHECK((call) == cudaSuccess, #call " failed")

#else

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#define LUNGKIT_CUDA_NAMESPACE lungkit
#define LUNGKIT_CUDA_KEY CUDA

namespace lungkit {

inline bool on_device(const torch::stable::Tensor& tensor) {
  return tensor.is_cuda();
}
struct DeviceGuard {
  explicit DeviceGuard(const torch::stable::Tensor& tensor) : guard(tensor.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};
inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace lungkit

#define LUNGKIT_UNPACK(...) __VA_ARGS__
// `kernel` stands in parentheses, so that its template arguments may hold commas:
//   LUNGKIT_LAUNCH((reduce<float, 256>), grid, 256, 0, stream, pointer, count);
#define LUNGKIT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                 \
  do {                                                                                 \
    LUNGKIT_UNPACK kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    STD_CUDA_KERNEL_LAUNCH_CHECK();                                                    \
  } while (false)
#define LUNGKIT_CUDA_CHECK(call) STD_CUDA_CHECK(call)
#define LUNGKIT_DYNAMIC_SHARED(type, name)                      \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)

#endif

// LUNGKIT_CUDA_LIBRARY(m) { m.impl("op", TORCH_BOX(&lungkit::op_cuda)); }
#define LUNGKIT_CUDA_LIBRARY_EXPANDED(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define LUNGKIT_CUDA_LIBRARY(m) LUNGKIT_CUDA_LIBRARY_EXPANDED(LUNGKIT_CUDA_NAMESPACE, LUNGKIT_CUDA_KEY, m)
