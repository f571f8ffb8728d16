// What the emulator knows while a kernel runs: the threads of the block, who is ready, who waits and for
// what. scheduler.h decides who runs next; synchronisation.h makes threads wait for one another.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <source_location>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "counting.h"
#include "fibre.h"
#include "shared_memory.h"
#include "types.h"

namespace lungkit_emulator {

enum class Order : int { forward = 0, reverse = 1, random = 2 };

// Totals since the library was loaded.
struct Statistics {
  uint64_t launches = 0;
  uint64_t blocks = 0;
  uint64_t threads = 0;
  uint64_t switches = 0;
  uint64_t products = 0;      // 16 x 8 x 16 blocks on the tensor cores
  uint64_t copied_bytes = 0;  // from global to shared memory, asynchronously
  uint64_t attributes = 0;    // calls of cudaFuncSetAttribute that set a kernel's shared memory
};

inline constexpr unsigned max_block_threads = 1024;
inline constexpr unsigned lanes_per_warp = 32;
inline constexpr unsigned max_warps = max_block_threads / lanes_per_warp;

// A place in the source where threads wait for one another. The source line, not the return address, tells
// two such places apart: the compiler is free to copy a call, and a kernel is not wrong for that.
struct CallSite {
  std::string_view operation;
  std::source_location where;

  bool operator==(const CallSite& other) const {
    const char* const file = where.file_name();
    const char* const other_file = other.where.file_name();
    return where.line() == other.where.line() && where.column() == other.where.column() &&
           operation == other.operation &&
           (file == other_file || std::string_view(file) == other_file);  // mostly the same pointer
  }
};

enum class ThreadState : uint8_t { ready, at_barrier, in_collective, exited };

enum class CollectiveKind : uint8_t { shuffle, vote };

struct Thread {
  uint3 index{};
  unsigned number = 0;     // x fastest, as CUDA numbers the threads of a block
  Fibre* fibre = nullptr;  // the stack on which it waits; null until it first waits
  ThreadState state = ThreadState::ready;
  CallSite site;  // of the last wait, as are the members below

  // What a lane brings to a warp collective, and what it takes away.
  CollectiveKind kind = CollectiveKind::vote;
  uint32_t mask = 0;
  unsigned source_lane = 0;
  uint64_t operand = 0;
  uint64_t result = 0;

  unsigned warp() const { return number / lanes_per_warp; }
  unsigned lane() const { return number % lanes_per_warp; }
};

struct BarrierResult {
  unsigned count = 0;  // threads whose predicate was true
  bool all = false;
};

class Machine {
 public:
  struct Kernel {
    const char* name;
    void (*call)(void* body);
    void* body;
    const void* address;  // null where it is not known
  };

  Order order = Order::forward;
  uint64_t seed = 0;
  Statistics statistics;

  // Runs every block of a grid whose size has been checked. Throws what a thread threw, or std::runtime_error
  // where a kernel breaks a rule; the machine is ready for the next launch either way.
  void run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes, size_t shared_limit);

  // For kernels.
  void* dynamic_shared() const {
    const Uncounted uncounted;
    return dynamic_->data();
  }
  unsigned current_number() const {
    const Uncounted uncounted;
    return current_->number;
  }
  unsigned current_lane() const { return current_number() % lanes_per_warp; }
  unsigned current_warp() const { return current_number() / lanes_per_warp; }
  BarrierResult barrier(const CallSite& site, bool predicate);
  void check_source_lane(const CallSite& site, uint32_t mask, unsigned source_lane);
  uint64_t collective(const CallSite& site, uint32_t mask, CollectiveKind kind, uint64_t operand,
                      unsigned source_lane = 0);

  // An error of the current thread, in two steps: set_error() keeps the message, which goes on "thread (..)
  // ", and end_block() leaves the thread for good. Its frames stay as they are, so its caller must own
  // nothing by then.
  void set_error(const std::string& what);
  [[noreturn]] void end_block();

 private:
  // Which block and which thread runs.
  uint64_t nth_block(uint64_t i, uint64_t blocks) const;
  void start_block();
  void run_block();
  unsigned choose(uint32_t set);
  Thread* next_ready();
  void make_ready(Thread& thread);
  void park();
  void work();
  void switch_to(Fibre& fibre);
  Fibre& free_fibre();
  void abandon_fibres();

  // Warps. A set of lanes is a bit mask.
  uint32_t lanes_of_warp(unsigned warp) const;
  bool lanes_agree(const Thread& thread, uint32_t lanes);
  void complete(const Thread& thread, uint32_t lanes);
  Thread& lane_of(const Thread& thread, unsigned lane) {
    return threads_[thread.warp() * lanes_per_warp + lane];
  }

  // Messages.
  std::string location() const;
  std::string stall() const;
  std::string collective_stall(const Thread& thread) const;

  Kernel kernel_{};
  std::unique_ptr<DynamicShared> dynamic_;
  StaticShared static_;
  size_t shared_bytes_ = 0, shared_limit_ = 0;  // dynamic; dynamic and static together

  std::vector<Thread> threads_;  // of the block; more where an earlier block was larger
  unsigned thread_count_ = 0;
  unsigned exited_ = 0;
  std::array<uint32_t, max_warps> ready_lanes_{};
  uint32_t ready_warps_ = 0;  // those that have a ready lane
  std::array<uint32_t, max_warps> collective_lanes_{};
  Thread* current_ = nullptr;
  uint64_t random_ = 1;
  std::exception_ptr error_;

  unsigned arrived_ = 0;  // at the barrier
  unsigned arrived_true_ = 0;
  const Thread* first_arrived_ = nullptr;
  BarrierResult barrier_result_;

  Fibre host_;
  Fibre* running_ = nullptr;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  std::vector<Fibre*> free_fibres_;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

inline std::string text_of(const uint3& index) {
  return text('(', index.x, ", ", index.y, ", ", index.z, ')');
}

inline std::string text_of(const CallSite& site) {
  return text(site.operation, " (", site.where.file_name(), ':', site.where.line(), ')');
}

inline std::string text_of(const Thread& thread) {
  return text("thread ", text_of(thread.index), " (lane ", thread.lane(), " of warp ", thread.warp(), ')');
}

inline std::string text_of_mask(uint32_t mask) {
  return text("the mask 0x", std::hex, mask);
}

}  // namespace lungkit_emulator
