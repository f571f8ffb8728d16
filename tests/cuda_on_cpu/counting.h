// What a kernel does to global memory, counted in a build of its own (LUNGKIT_EMULATOR_COUNTS; counting.cpp);
// everywhere else these are empty. g++ calls a function before every load and every store
// (-fsanitize=thread; its library is not linked). An address counts where a kernel touches it, not the
// emulator on its behalf, and where it lies in no memory of the emulator's own: then it is a tensor's.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef LUNGKIT_EMULATOR_COUNTS
#define LUNGKIT_EMULATOR_COUNTS 0
#endif

namespace lungkit_emulator {

// Of one launch. Bytes of global memory: all that its threads loaded and stored, one by one, and how many
// different ones these were.
struct LaunchCounts {
  uint64_t kernel = 0;  // its address, from the start of the library
  uint64_t blocks = 0;
  uint64_t threads = 0;  // of a block
  uint64_t shared_bytes = 0;
  uint64_t products = 0;
  uint64_t copied_bytes = 0;
  uint64_t loaded_bytes = 0;
  uint64_t stored_bytes = 0;
  uint64_t different_loaded_bytes = 0;  // copies included
  uint64_t different_stored_bytes = 0;
};

#if LUNGKIT_EMULATOR_COUNTS

// The stack of a fibre.
void leave_out(const void* begin, size_t bytes);
void begin_counts(const LaunchCounts& launch, const void* dynamic_shared);
void end_counts(uint64_t products, uint64_t copied_bytes);
void count_copy(const void* global, size_t bytes);

// Whether a kernel's own code runs.
bool set_in_kernel(bool value);

#else

inline void leave_out(const void*, size_t) {}
inline void begin_counts(const LaunchCounts&, const void*) {}
inline void end_counts(uint64_t, uint64_t) {}
inline void count_copy(const void*, size_t) {}
inline bool set_in_kernel(bool value) {
  return value;
}

#endif

// While one lives, the emulator works and nothing counts. A thread waits inside one, so that others find the
// switch as they left it.
class Uncounted {
 public:
  Uncounted() : before_(set_in_kernel(false)) {}
  ~Uncounted() { set_in_kernel(before_); }
  Uncounted(const Uncounted&) = delete;
  Uncounted& operator=(const Uncounted&) = delete;

 private:
  bool before_;
};

}  // namespace lungkit_emulator
