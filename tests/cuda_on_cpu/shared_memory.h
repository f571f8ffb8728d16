// A block's shared memory: filled with 0xFF bytes (a NaN in every float format) when a block starts, so that
// a kernel that reads what no thread of its block has written cannot pass.
#pragma once

#include <link.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "counting.h"
#include "types.h"

namespace lungkit_emulator {

inline constexpr unsigned char uninitialised_byte = 0xff;

// `extern __shared__`: a heap allocation of exactly the launch's size, so that ASan sees an access outside
// it. Other builds put a guard behind it, which finds a store outside it when the block ends.
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

#if LUNGKIT_EMULATOR_ASAN

// Under ASan a `__shared__` variable is an ordinary static, which nothing tells apart from others.
struct StaticShared {
  static StaticShared of_this_thread() { return {}; }
  void fill() const {}
  size_t used() const { return 0; }
};

#else

// Marks the thread-local storage of the library (or program) that this header is compiled into.
[[gnu::visibility("hidden")]] inline thread_local char tls_marker;

// The thread-local variables of this library that start at zero, in the calling thread. They are its
// `__shared__` variables: nothing else in the library may be one (so libstdc++ must not be linked into it
// statically).
class StaticShared {
 public:
  static StaticShared of_this_thread() {
    StaticShared found;
    tls_marker = 0;  // the first access allocates the storage
    dl_iterate_phdr(&visit, &found);
    if (found.begin_ == nullptr)
      throw std::runtime_error("cannot find the emulated library's shared variables");
    return found;
  }

  void fill() const { std::memset(begin_, uninitialised_byte, bytes_); }

  // Bytes that differ from what fill() left: at most as many as the block's kernel has. The build that
  // counts, which is not optimised, leaves that to others.
  size_t used() const {
    if (LUNGKIT_EMULATOR_COUNTS) return 0;
    return bytes_ - static_cast<size_t>(std::count(begin_, begin_ + bytes_, uninitialised_byte));
  }

 private:
  // Returns 1, which ends the search, for the library whose thread-local storage holds the marker.
  static int visit(dl_phdr_info* library, size_t, void* found) {
    const auto* const marker = reinterpret_cast<const unsigned char*>(&tls_marker);
    auto* const begin = static_cast<unsigned char*>(library->dlpi_tls_data);
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const auto& segment = library->dlpi_phdr[i];
      if (segment.p_type != PT_TLS || marker < begin || marker >= begin + segment.p_memsz) continue;
      auto& shared = *static_cast<StaticShared*>(found);
      shared.begin_ = begin + segment.p_filesz;  // before it: variables with other initial values
      shared.bytes_ = segment.p_memsz - segment.p_filesz;
      return 1;
    }
    return 0;
  }

  unsigned char* begin_ = nullptr;
  size_t bytes_ = 0;
};

#endif

}  // namespace lungkit_emulator
