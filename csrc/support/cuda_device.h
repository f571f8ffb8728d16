// What launch code asks of the device it runs on, once a device: its limits, and more shared memory for a
// kernel. Include it after cuda_launch.h.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>

#include "cuda_launch.h"

namespace lungkit {

constexpr int max_devices = 64;

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // dynamic, of a block that has asked for more than 48 KB
  int capability;    // 90: compute capability 9.0
};

inline int current_device() {
  int device = 0;
  LUNGKIT_CUDA_CHECK(cudaGetDevice(&device));
  LUNGKIT_CHECK(device < max_devices, "lungkit runs on the first ", max_devices, " GPUs of a machine");
  return device;
}

// Two threads may ask the first time together: both write the same.
inline DeviceLimits limits_of_current_device() {
  struct Known {
    std::atomic<int> multiprocessors, shared_bytes, capability;
    std::atomic<bool> asked;
  };
  static std::array<Known, max_devices> devices;
  const int device = current_device();
  Known& known = devices[static_cast<size_t>(device)];
  if (!known.asked) {
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      LUNGKIT_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
      return value;
    };
    known.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
    known.shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    known.capability = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
    known.asked = true;
  }
  return {known.multiprocessors, known.shared_bytes, known.capability};
}

// Lets `kernel`, which has no static shared memory, take as much as the device has: once a device, because an
// attribute that every call set to its own size would be another call's while that one launches.
template <auto kernel>
void allow_shared_memory(const char* op, size_t bytes) {
  static std::array<std::atomic<bool>, max_devices> allowed;
  const int most = limits_of_current_device().shared_bytes;
  LUNGKIT_CHECK(bytes <= static_cast<size_t>(most), op, ": a block needs ", bytes,
                " bytes of shared memory, this GPU has ", most);
  std::atomic<bool>& done = allowed[static_cast<size_t>(current_device())];
  if (done) return;
  LUNGKIT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  done = true;
}

}  // namespace lungkit
