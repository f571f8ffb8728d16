// The functions that g++ calls before every load and store under -fsanitize=thread, and what they count:
// counting.h. This file is compiled without that option.
#include "counting.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <array>
#include <bit>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

extern "C" {  // of libgcov
void __gcov_reset();
void __gcov_dump();
}

namespace lungkit_emulator {
namespace {

// A set of bytes of memory: a bit each.
class Bytes {
 public:
  void add(uintptr_t address, size_t bytes) {
    for (uintptr_t at = address; at < address + bytes; ++at) {
      if (at / page_bytes != page_ || bits_ == nullptr) {
        page_ = at / page_bytes;
        bits_ = &pages_[page_];
      }
      (*bits_)[at % page_bytes / 64] |= uint64_t{1} << at % 64;
    }
  }
  uint64_t count() const {
    uint64_t sum = 0;
    for (const auto& [page, words] : pages_) {
      for (const uint64_t word : words) sum += static_cast<uint64_t>(std::popcount(word));
    }
    return sum;
  }

 private:
  static constexpr uintptr_t page_bytes = 4096;
  using Page = std::array<uint64_t, page_bytes / 64>;
  std::unordered_map<uintptr_t, Page> pages_;
  uintptr_t page_ = 0;
  Page* bits_ = nullptr;
};

bool in_kernel = false;

struct Counter {
  std::map<uintptr_t, uintptr_t> left_out;  // end by begin
  uintptr_t shared = 0;                     // dynamic shared memory, whose size `launch` knows
  uintptr_t library = 0, library_bytes = 0;
  LaunchCounts launch;
  Bytes loaded, stored;
  std::vector<LaunchCounts> done;

  bool is_global(uintptr_t address) const {
    if (address - shared < launch.shared_bytes) return false;
    auto range = left_out.upper_bound(address);
    return range == left_out.begin() || (--range)->second <= address;
  }
} counter;

// Most accesses are to the library: the counts of gcov.
inline bool is_counted(uintptr_t address) {
  return in_kernel && address - counter.library >= counter.library_bytes && counter.is_global(address);
}

inline void load(const void* address, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (!is_counted(at)) return;
  counter.launch.loaded_bytes += bytes;
  counter.loaded.add(at, bytes);
}

inline void store(const void* address, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (!is_counted(at)) return;
  counter.launch.stored_bytes += bytes;
  counter.stored.add(at, bytes);
}

// The variables of this library, those of the thread that launches, and this thread's stack.
void leave_out_host() {
  Dl_info here{};
  dladdr(reinterpret_cast<const void*>(&leave_out_host), &here);
  counter.library = reinterpret_cast<uintptr_t>(here.dli_fbase);
  const auto visit = [](dl_phdr_info* library, size_t, void*) {
    if (library->dlpi_addr != counter.library) return 0;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const auto& segment = library->dlpi_phdr[i];
      if (segment.p_type == PT_LOAD)
        counter.library_bytes = segment.p_vaddr + segment.p_memsz;  // in rising order
      if (segment.p_type == PT_TLS && library->dlpi_tls_data != nullptr) {
        leave_out(library->dlpi_tls_data, segment.p_memsz);
      }
    }
    return 1;
  };
  dl_iterate_phdr(visit, nullptr);

  pthread_attr_t attributes;
  void* stack = nullptr;
  size_t bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &bytes);
  pthread_attr_destroy(&attributes);
  leave_out(stack, bytes);
}

}  // namespace

void leave_out(const void* begin, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  counter.left_out[first] = first + bytes;
}

void begin_counts(const LaunchCounts& launch, const void* dynamic_shared) {
  leave_out_host();
  in_kernel = false;  // an error may have left a kernel
  counter.shared = reinterpret_cast<uintptr_t>(dynamic_shared);
  counter.launch = launch;
  counter.launch.kernel -= counter.library;
  counter.loaded = {};
  counter.stored = {};
}

void end_counts(uint64_t products, uint64_t copied_bytes) {
  counter.launch.products = products;
  counter.launch.copied_bytes = copied_bytes;
  counter.launch.different_loaded_bytes = counter.loaded.count();
  counter.launch.different_stored_bytes = counter.stored.count();
  counter.done.push_back(counter.launch);
}

void count_copy(const void* global, size_t bytes) {
  counter.loaded.add(reinterpret_cast<uintptr_t>(global), bytes);
}

bool set_in_kernel(bool value) {
  return std::exchange(in_kernel, value);
}

}  // namespace lungkit_emulator

extern "C" {

// For ctypes. From here on launches and lines (gcov) are counted from zero.
[[gnu::visibility("default")]] void lungkit_emulator_begin_counts() {
  lungkit_emulator::counter.done.clear();
  __gcov_reset();
}
// Writes what gcov counted, below the environment's GCOV_PREFIX. Returns the number of launches since.
[[gnu::visibility("default")]] size_t lungkit_emulator_end_counts() {
  __gcov_dump();
  return lungkit_emulator::counter.done.size();
}
[[gnu::visibility("default")]] lungkit_emulator::LaunchCounts lungkit_emulator_counts(size_t launch) {
  return lungkit_emulator::counter.done.at(launch);
}

// For g++.
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(const void* address, size_t bytes) {
  lungkit_emulator::load(address, bytes);
}
void __tsan_write_range(const void* address, size_t bytes) {
  lungkit_emulator::store(address, bytes);
}

#define LUNGKIT_ACCESS(bytes)                               \
  void __tsan_read##bytes(const void* address) {            \
    lungkit_emulator::load(address, bytes);                 \
  }                                                         \
  void __tsan_write##bytes(const void* address) {           \
    lungkit_emulator::store(address, bytes);                \
  }                                                         \
  void __tsan_unaligned_read##bytes(const void* address) {  \
    lungkit_emulator::load(address, bytes);                 \
  }                                                         \
  void __tsan_unaligned_write##bytes(const void* address) { \
    lungkit_emulator::store(address, bytes);                \
  }
LUNGKIT_ACCESS(1)
LUNGKIT_ACCESS(2)
LUNGKIT_ACCESS(4)
LUNGKIT_ACCESS(8)
LUNGKIT_ACCESS(16)

// Atomics of the host's code alone: the emulator's atomicAdd and its kind are plain loads and stores.
#define LUNGKIT_ATOMIC(bits, T)                                          \
  T __tsan_atomic##bits##_load(const volatile T* address, int) {         \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                   \
  }                                                                      \
  void __tsan_atomic##bits##_store(volatile T* address, T value, int) {  \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                  \
  }                                                                      \
  T __tsan_atomic##bits##_fetch_add(volatile T* address, T value, int) { \
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);         \
  }
LUNGKIT_ATOMIC(8, uint8_t)
LUNGKIT_ATOMIC(32, uint32_t)
LUNGKIT_ATOMIC(64, uint64_t)
}
