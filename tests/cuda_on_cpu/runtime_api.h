// The part of the CUDA runtime API that launch code needs. Streams have no meaning: everything is done on
// return.
#pragma once

#include <cstddef>
#include <cstring>

#include "launch.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidMemcpyDirection = 21,
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidMemcpyDirection: return "invalid copy direction for memcpy";
    default: return "invalid argument";
  }
}

// A launch that the device would refuse throws at the launch, so there is never an error to collect.
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaPeekAtLastError() {
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = lungkit_emulator::launcher().device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= lungkit_emulator::device_count) return cudaErrorInvalidValue;
  const lungkit_emulator::Device& asked = lungkit_emulator::devices[device];
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = lungkit_emulator::max_block_threads; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = lungkit_emulator::default_shared_bytes; break;
    case cudaDevAttrWarpSize: *value = warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = asked.multiprocessors; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = asked.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = asked.capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(asked.max_shared_bytes) + 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(asked.max_shared_bytes); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  const size_t bytes = static_cast<size_t>(value);
  if (value < 0 || bytes > lungkit_emulator::current_device().max_shared_bytes) return cudaErrorInvalidValue;
  lungkit_emulator::allow_shared_bytes(reinterpret_cast<const void*>(kernel), bytes);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int block_threads, size_t) {
  *blocks = block_threads > 0 ? 2048 / block_threads : 0;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

// Only within the device: a copy to or from the host would make an op wait.
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t = nullptr) {
  if (kind != cudaMemcpyDeviceToDevice) return cudaErrorInvalidMemcpyDirection;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
