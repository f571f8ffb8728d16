// A block's shared memory: filled with 0xFF bytes (a NaN in every float format) when a block starts, so that
// a kernel that reads what no thread of its block has written cannot pass.
#pragma once

#include <link.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "types.h"

namespace lungkit_emulator {

inline constexpr unsigned char uninitialised_byte = 0xff;

// `extern __shared__`: a heap block of exactly the launch's size, so that ASan sees an access outside it.
// Other builds put a guard behind it, which finds a store outside it when the block ends.
class DynamicShared {
 public:
  explicit DynamicShared(size_t bytes) : bytes_(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, bytes + guard_bytes) != 0) throw std::bad_alloc();
    memory_.reset(static_cast<unsigned char*>(memory));
  }

  void* data() const { return memory_.get(); }

  void fill() {
    std::memset(memory_.get(), uninitialised_byte, bytes_);
    std::memset(memory_.get() + bytes_, guard_byte, guard_bytes);
  }

  bool overrun() const {
    for (size_t i = bytes_; i < bytes_ + guard_bytes; ++i) {
      if (memory_[i] != guard_byte) return true;
    }
    return false;
  }

 private:
  static constexpr size_t alignment = 16;  // all that a kernel may count on
  static constexpr size_t guard_bytes = LUNGKIT_EMULATOR_ASAN ? 0 : 256;
  static constexpr unsigned char guard_byte = 0xa5;

  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };
  size_t bytes_;
  std::unique_ptr<unsigned char[], Free> memory_;
};

#if !LUNGKIT_EMULATOR_ASAN

// Marks the thread-local storage of the library (or program) that this header is compiled into.
[[gnu::visibility("hidden")]] inline thread_local char tls_marker;

// The zero-initialised thread-local variables of this library, in the calling thread: its `__shared__`
// variables (and any other `thread_local` that starts at zero, which therefore must not be used beside the
// emulator).
struct StaticShared {
  unsigned char* begin = nullptr;
  size_t bytes = 0;
};

inline StaticShared find_static_shared() {
  StaticShared found;
  tls_marker = 0;  // the first access allocates the storage
  const auto visit = [](dl_phdr_info* library, size_t, void* result) {
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const auto& segment = library->dlpi_phdr[i];
      if (segment.p_type != PT_TLS || library->dlpi_tls_data == nullptr) continue;
      auto* const begin = static_cast<unsigned char*>(library->dlpi_tls_data);
      auto* const marker = reinterpret_cast<unsigned char*>(&tls_marker);
      if (marker < begin || marker >= begin + segment.p_memsz) continue;
      *static_cast<StaticShared*>(result) = {begin + segment.p_filesz, segment.p_memsz - segment.p_filesz};
      return 1;
    }
    return 0;
  };
  dl_iterate_phdr(visit, &found);
  return found;
}

#endif

}  // namespace lungkit_emulator
