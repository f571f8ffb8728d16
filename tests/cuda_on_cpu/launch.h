// Launching a kernel: the limits of a launch, the order of threads, and the functions that Python calls.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"
#include "scheduler.h"

// `extern __shared__` of a kernel: csrc/support/cuda_launch.h has the form for CUDA.
#define LUNGKIT_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::lungkit_emulator::machine().dynamic_shared())

namespace lungkit_emulator {

// Dynamic shared memory of a block: what any launch may ask for, and what it may after cudaFuncSetAttribute.
inline constexpr size_t default_shared_bytes = 48 * 1024;

// The devices that the emulator can be. They have few multiprocessors, so that a grid sized by them stays
// small, and different numbers of them, so that a result that depends on it is seen.
struct Device {
  int capability;  // 90: compute capability 9.0
  size_t max_shared_bytes;
  int multiprocessors;
};
inline constexpr Device devices[] = {{90, 227 * 1024, 4}, {75, 64 * 1024, 3}, {80, 163 * 1024, 7},
                                     {86, 99 * 1024, 1},  {89, 99 * 1024, 5}, {120, 99 * 1024, 9}};
inline constexpr int device_count = sizeof(devices) / sizeof(devices[0]);

// What surrounds the machine: one launch at a time, whichever thread calls.
struct Launcher {
  std::mutex mutex;
  std::atomic<std::thread::id> owner;  // the thread that is inside a launch
  bool order_known = false;
  int device = 0;  // of `devices`, the current one
  // What cudaFuncSetAttribute has allowed each kernel on each device.
  std::map<std::pair<const void*, int>, size_t> shared_limits;
};

inline Launcher& launcher() {
  static Launcher instance;
  return instance;
}

// LUNGKIT_EMULATOR_ORDER (forward, reverse or random) and LUNGKIT_EMULATOR_SEED, until set_order is called.
inline void read_order_from_environment() {
  const char* const order = std::getenv("LUNGKIT_EMULATOR_ORDER");
  const char* const seed = std::getenv("LUNGKIT_EMULATOR_SEED");
  const std::string_view name = order ? order : "forward";
  if (name == "forward") {
    machine().order = Order::forward;
  } else if (name == "reverse") {
    machine().order = Order::reverse;
  } else if (name == "random") {
    machine().order = Order::random;
  } else {
    throw std::runtime_error(
        text("LUNGKIT_EMULATOR_ORDER is '", name, "'; set it to forward, reverse or random"));
  }
  machine().seed = seed ? std::strtoull(seed, nullptr, 10) : 0;
  launcher().order_known = true;
}

inline void set_order(Order order, uint64_t seed = 0) {
  const std::lock_guard lock(launcher().mutex);
  machine().order = order;
  machine().seed = seed;
  launcher().order_known = true;
}

inline const Device& current_device() {
  return devices[launcher().device];
}

inline void allow_shared_bytes(const void* kernel, size_t bytes) {
  const std::lock_guard lock(launcher().mutex);
  launcher().shared_limits[{kernel, launcher().device}] = bytes;
  ++machine().statistics.attributes;
}

// The limit of one kernel or, where the kernel is not known, the largest of all.
inline size_t shared_limit(const void* kernel) {
  size_t limit = default_shared_bytes;
  for (const auto& [allowed, bytes] : launcher().shared_limits) {
    const auto [kernel_allowed, device] = allowed;
    if (device == launcher().device && (kernel == nullptr || kernel == kernel_allowed)) {
      limit = std::max(limit, bytes);
    }
  }
  return limit;
}

inline Statistics statistics() {
  const std::lock_guard lock(launcher().mutex);
  return machine().statistics;
}

inline void check_launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, size_t shared_limit) {
  const auto refuse = [&](const auto&... what) {
    throw std::runtime_error(text("emulated kernel ", name, ": ", what...));
  };
  const auto size = [](dim3 d) { return text_of(uint3{d.x, d.y, d.z}); };
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > max_block_threads || block.z > 64) {
    refuse("the block is ", size(block), "; it must have 1 to 1024 threads, and z at most 64");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
    refuse("the grid is ", size(grid), "; every size must be at least 1");
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse("the grid is ", size(grid), "; x may be at most 2147483647, y and z 65535");
  }
  if (shared_bytes > current_device().max_shared_bytes) {
    refuse(shared_bytes, " bytes of dynamic shared memory; a block has at most ",
           current_device().max_shared_bytes);
  }
  if (shared_bytes > shared_limit) {
    refuse(shared_bytes, " bytes of dynamic shared memory, but it may have ", shared_limit,
           "; call cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) first");
  }
}

// `address` is the kernel's, or null where it is not known.
template <class Body>
void run(const char* name, const void* address, dim3 grid, dim3 block, size_t shared_bytes, Body& body) {
  if (launcher().owner == std::this_thread::get_id()) {
    throw std::runtime_error(text("emulated kernel ", name, ": launched from inside a kernel"));
  }
  const std::lock_guard lock(launcher().mutex);
  if (!launcher().order_known) read_order_from_environment();
  const size_t limit = shared_limit(address);
  check_launch(name, grid, block, shared_bytes, limit);
  struct Owned {
    Owned() { launcher().owner = std::this_thread::get_id(); }
    ~Owned() { launcher().owner = std::thread::id(); }
  } const owned;
  const auto call = [](void* object) { (*static_cast<Body*>(object))(); };
  machine().run_grid({name, call, const_cast<void*>(static_cast<const void*>(&body)), address}, grid, block,
                     shared_bytes,
                     limit > default_shared_bytes ? current_device().max_shared_bytes : default_shared_bytes);
}

// Runs `body` once for every thread of the grid; `name` is for messages. It is not known which kernel the
// body calls, so dynamic shared memory may be as large as cudaFuncSetAttribute has allowed any kernel.
template <class Body>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Body&& body) {
  run(name, nullptr, grid, block, shared_bytes, body);
}

// Runs `kernel` with arguments that are evaluated once, as kernel<<<...>>>(...) does.
template <class... Parameters, class... Arguments>
void launch_kernel(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                   void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  const auto body = [&] { std::apply(kernel, values); };
  run(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, body);
}

}  // namespace lungkit_emulator

// For ctypes. `used` keeps them in a library in which nothing calls them.
extern "C" {

// order: 0 forward, 1 reverse, 2 random (seed is for random). Returns 0 where order is none of these, else 1.
[[gnu::used, gnu::visibility("default")]] inline int lungkit_emulator_set_order(int order, unsigned seed) {
  if (order < 0 || order > 2) return 0;
  lungkit_emulator::set_order(static_cast<lungkit_emulator::Order>(order), seed);
  return 1;
}

// Runs what follows on the device with this compute capability (90: 9.0). Returns 0 where there is none,
// else 1.
[[gnu::used, gnu::visibility("default")]] inline int lungkit_emulator_set_device(int capability) {
  for (int i = 0; i < lungkit_emulator::device_count; ++i) {
    if (lungkit_emulator::devices[i].capability != capability) continue;
    lungkit_emulator::launcher().device = i;
    return 1;
  }
  return 0;
}

[[gnu::used, gnu::visibility("default")]] inline lungkit_emulator::Statistics lungkit_emulator_statistics() {
  return lungkit_emulator::statistics();
}
}
