// The machine that runs one block at a time: which threads are ready, which wait and for what, and who runs
// next.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <exception>
#include <memory>
#include <numeric>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

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
};

inline constexpr unsigned max_block_threads = 1024;
inline constexpr unsigned lanes_per_warp = 32;
inline constexpr unsigned max_warps = max_block_threads / lanes_per_warp;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

inline std::string text_of(const uint3& index) {
  return text('(', index.x, ", ", index.y, ", ", index.z, ')');
}

// A place in a kernel where threads wait for one another: the operation, and where the source calls it.
struct CallSite {
  const char* operation = nullptr;
  std::source_location where;

  bool operator==(const CallSite& other) const {
    return operation == other.operation && where.line() == other.where.line() &&
           where.column() == other.where.column() &&
           (where.file_name() == other.where.file_name() ||
            std::string_view(where.file_name()) == other.where.file_name());
  }
};

inline std::string text_of(const CallSite& site) {
  return text(site.operation, " (", site.where.file_name(), ':', site.where.line(), ')');
}

enum class ThreadState : uint8_t { ready, at_barrier, in_collective, exited };

// What every lane brings to a warp collective, and what it gets.
enum class CollectiveKind : uint8_t { shuffle, vote };

struct Thread {
  uint3 index{};
  unsigned number = 0;     // x fastest, as CUDA numbers the threads of a block
  Fibre* fibre = nullptr;  // the stack on which it waits; none before its first wait
  ThreadState state = ThreadState::ready;
  CallSite site;
  unsigned mask = 0;
  CollectiveKind kind = CollectiveKind::vote;
  uint64_t operand = 0;
  unsigned source_lane = 0;
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
  };

  Order order = Order::forward;
  uint64_t seed = 0;
  Statistics statistics;

  // Runs every block of a grid whose size has been checked. Throws what a thread threw, or std::runtime_error
  // where threads wait for one another in vain; the machine is ready for the next launch either way.
  void run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes);

  void* dynamic_shared() const { return dynamic_->data(); }
  unsigned current_lane() const { return current_->lane(); }

  // Called by kernels.
  BarrierResult barrier(const CallSite& site, bool predicate);
  uint64_t collective(const CallSite& site, unsigned mask, CollectiveKind kind, uint64_t operand,
                      unsigned source_lane);
  void check_source_lane(const CallSite& site, unsigned mask, unsigned source_lane);

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
  Thread* next_ready();
  unsigned choose(uint32_t set);
  void make_ready(Thread& thread);
  void park();
  void work();
  void switch_to(Fibre& fibre);
  Fibre& free_fibre();
  void abandon_fibres();
  void fill_shared();

  // Warp collectives.
  uint32_t lanes_of_warp(unsigned warp) const;
  bool lanes_agree(const Thread& thread, uint32_t lanes);
  void complete(const Thread& thread, uint32_t lanes);
  Thread& lane_of(const Thread& thread, unsigned lane) {
    return threads_[thread.warp() * lanes_per_warp + lane];
  }

  // Messages.
  std::string location() const;
  std::string describe(const Thread& thread) const;
  std::string describe_stall() const;

  Kernel kernel_{};
  std::vector<Thread> threads_;
  unsigned thread_count_ = 0;
  unsigned exited_ = 0;
  std::array<uint32_t, max_warps> ready_lanes_{};  // a bit a lane
  uint32_t ready_warps_ = 0;                       // a bit a warp that has a ready lane
  std::array<uint32_t, max_warps> collective_lanes_{};

  unsigned arrived_ = 0;  // at the barrier
  unsigned arrived_true_ = 0;
  const Thread* first_arrived_ = nullptr;
  BarrierResult barrier_result_;

  std::unique_ptr<DynamicShared> dynamic_;
#if !LUNGKIT_EMULATOR_ASAN
  StaticShared static_;
#endif
  uint64_t random_ = 1;

  Fibre host_;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  std::vector<Fibre*> free_fibres_;
  Fibre* running_ = nullptr;
  Thread* current_ = nullptr;
  std::exception_ptr error_;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

// Scheduling

inline unsigned Machine::choose(uint32_t set) {
  switch (order) {
    case Order::forward: return static_cast<unsigned>(std::countr_zero(set));
    case Order::reverse: return 31u - static_cast<unsigned>(std::countl_zero(set));
    default: break;
  }
  random_ ^= random_ << 13;  // xorshift64
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  const unsigned shift = static_cast<unsigned>(random_ >> 32) % 32;
  return (static_cast<unsigned>(std::countr_zero(std::rotr(set, static_cast<int>(shift)))) + shift) % 32;
}

// Takes one ready thread, or none where all wait or have exited.
inline Thread* Machine::next_ready() {
  if (ready_warps_ == 0) return nullptr;
  const unsigned warp = choose(ready_warps_);
  const unsigned lane = choose(ready_lanes_[warp]);
  ready_lanes_[warp] &= ~(1u << lane);
  if (ready_lanes_[warp] == 0) ready_warps_ &= ~(1u << warp);
  return &threads_[warp * lanes_per_warp + lane];
}

inline void Machine::make_ready(Thread& thread) {
  thread.state = ThreadState::ready;
  ready_lanes_[thread.warp()] |= 1u << thread.lane();
  ready_warps_ |= 1u << thread.warp();
}

inline void Machine::switch_to(Fibre& fibre) {
  Fibre& from = *running_;
  running_ = &fibre;
  ++statistics.switches;
  Fibre::switch_stack(from, fibre);
}

inline Fibre& Machine::free_fibre() {
  if (free_fibres_.empty()) {
    const auto work_on_machine = [] { machine().work(); };
    fibres_.push_back(std::make_unique<Fibre>(work_on_machine, static_cast<unsigned>(fibres_.size())));
    free_fibres_.reserve(fibres_.size());
    return *fibres_.back();
  }
  Fibre* const fibre = free_fibres_.back();
  free_fibres_.pop_back();
  return *fibre;
}

// The current thread waits: runs others until it is ready again and its turn has come.
inline void Machine::park() {
  Thread* const me = current_;
  me->fibre = running_;
  Thread* const next = next_ready();
  if (next != me) {
    current_ = next;
    switch_to(next == nullptr ? host_ : next->fibre != nullptr ? *next->fibre : free_fibre());
  }
  threadIdx = me->index;
}

// What a fibre does: run a thread to its end, then the next one. Threads that never wait share one fibre.
inline void Machine::work() {
  for (;;) {
    threadIdx = current_->index;
    try {
      kernel_.call(kernel_.body);
    } catch (...) {
      error_ = std::current_exception();
    }
    current_->state = ThreadState::exited;
    ++exited_;
    Thread* const next = error_ ? nullptr : next_ready();
    current_ = next;
    if (next != nullptr && next->fibre == nullptr) continue;
    free_fibres_.push_back(running_);
    switch_to(next == nullptr ? host_ : *next->fibre);
  }
}

inline void Machine::set_error(const std::string& what) {
  error_ = std::make_exception_ptr(std::runtime_error(text(location(), describe(*current_), ' ', what)));
}

inline void Machine::end_block() {
  switch_to(host_);
  __builtin_unreachable();
}

inline void Machine::abandon_fibres() {
  free_fibres_.clear();
  for (const auto& fibre : fibres_) {
    fibre->reset();
    free_fibres_.push_back(fibre.get());
  }
}

inline void Machine::fill_shared() {
  dynamic_->fill();
#if !LUNGKIT_EMULATOR_ASAN
  std::memset(static_.begin, uninitialised_byte, static_.bytes);
#endif
}

inline void Machine::start_block() {
  unsigned number = 0;
  for (unsigned z = 0; z < blockDim.z; ++z) {
    for (unsigned y = 0; y < blockDim.y; ++y) {
      for (unsigned x = 0; x < blockDim.x; ++x, ++number) {
        Thread& thread = threads_[number];
        thread.index = {x, y, z};
        thread.number = number;
        thread.fibre = nullptr;
        thread.state = ThreadState::ready;
      }
    }
  }
  ready_warps_ = 0;
  for (unsigned warp = 0; warp < max_warps; ++warp) {
    ready_lanes_[warp] = lanes_of_warp(warp);
    collective_lanes_[warp] = 0;
    if (ready_lanes_[warp] != 0) ready_warps_ |= 1u << warp;
  }
  exited_ = 0;
  arrived_ = 0;
  fill_shared();
}

inline void Machine::run_block() {
  start_block();
  current_ = next_ready();
  running_ = &host_;
  switch_to(free_fibre());
  if (!error_ && exited_ < thread_count_) {
    error_ = std::make_exception_ptr(std::runtime_error(text(location(), describe_stall())));
  }
  if (!error_ && dynamic_->overrun()) {
    error_ = std::make_exception_ptr(
        std::runtime_error(text(location(), "a thread wrote past the end of the dynamic shared memory")));
  }
  if (error_) {
    abandon_fibres();
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

// Which block runs as the i-th. Random: a step that has no factor in common with the number of blocks meets
// them all.
inline uint64_t Machine::nth_block(uint64_t i, uint64_t blocks) const {
  if (order == Order::forward) return i;
  if (order == Order::reverse) return blocks - 1 - i;
  uint64_t step = 1 + (seed + 1) * 0x9e3779b1u % blocks;
  while (std::gcd(step, blocks) != 1) ++step;
  return (i * (step % blocks) + seed % blocks) % blocks;
}

inline void Machine::run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  kernel_ = kernel;
  gridDim = grid;
  blockDim = block;
  thread_count_ = block.x * block.y * block.z;
  if (threads_.size() < thread_count_) threads_.resize(thread_count_);
  dynamic_ = std::make_unique<DynamicShared>(shared_bytes);
#if !LUNGKIT_EMULATOR_ASAN
  static_ = find_static_shared();
#endif
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  ++statistics.launches;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t number = nth_block(i, blocks);
    blockIdx.x = static_cast<unsigned>(number % grid.x);
    blockIdx.y = static_cast<unsigned>(number / grid.x % grid.y);
    blockIdx.z = static_cast<unsigned>(number / grid.x / grid.y);
    random_ = ((seed + 1) * 0x9e3779b97f4a7c15u ^ (number + 1) * 0xbf58476d1ce4e5b9u) | 1;
    ++statistics.blocks;
    statistics.threads += thread_count_;
    run_block();
  }
}

// Barriers

inline BarrierResult Machine::barrier(const CallSite& site, bool predicate) {
  Thread& me = *current_;
  me.site = site;
  if (arrived_ == 0) {
    first_arrived_ = &me;
    arrived_true_ = 0;
  } else if (!(site == first_arrived_->site)) {
    set_error(text("reached ", text_of(site), ", but ", describe(*first_arrived_), " waits at ",
                   text_of(first_arrived_->site), ": all threads of a block must reach the same barrier"));
    end_block();
  }
  me.state = ThreadState::at_barrier;
  arrived_true_ += predicate;
  if (++arrived_ == thread_count_) {
    barrier_result_ = {arrived_true_, arrived_true_ == thread_count_};
    arrived_ = 0;
    for (unsigned i = 0; i < thread_count_; ++i) make_ready(threads_[i]);
  }
  park();
  return barrier_result_;
}

// Warp collectives

inline uint32_t Machine::lanes_of_warp(unsigned warp) const {
  const unsigned first = warp * lanes_per_warp;
  if (thread_count_ <= first) return 0;
  const unsigned lanes = thread_count_ - first;
  return lanes >= lanes_per_warp ? ~0u : (1u << lanes) - 1;
}

inline void Machine::check_source_lane(const CallSite& site, unsigned mask, unsigned source_lane) {
  const bool in_mask = mask >> source_lane & 1;
  if (in_mask && (lanes_of_warp(current_->warp()) >> source_lane & 1)) return;
  set_error(text("calls ", text_of(site), " with the mask 0x", std::hex, mask, std::dec, " and reads lane ",
                 source_lane, in_mask ? ", which this block does not have" : ", which the mask leaves out"));
  end_block();
}

inline uint64_t Machine::collective(const CallSite& site, unsigned mask, CollectiveKind kind,
                                    uint64_t operand, unsigned source_lane) {
  Thread& me = *current_;
  if (!(mask >> me.lane() & 1)) {
    set_error(text("calls ", text_of(site), " with the mask 0x", std::hex, mask, std::dec,
                   ", which leaves out its own lane ", me.lane()));
    end_block();
  }
  me.state = ThreadState::in_collective;
  me.site = site;
  me.mask = mask;
  me.kind = kind;
  me.operand = operand;
  me.source_lane = source_lane;
  uint32_t& waiting = collective_lanes_[me.warp()];
  waiting |= 1u << me.lane();
  const uint32_t needed = mask & lanes_of_warp(me.warp());
  if ((waiting & needed) == needed && lanes_agree(me, needed)) {
    waiting &= ~needed;
    complete(me, needed);
  }
  park();
  return me.result;
}

// True where all `lanes` wait in the collective of `thread`. A lane that waits with another mask may yet
// come.
inline bool Machine::lanes_agree(const Thread& thread, uint32_t lanes) {
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    const Thread& other = lane_of(thread, static_cast<unsigned>(std::countr_zero(left)));
    if (other.mask != thread.mask) return false;
    if (!(other.site == thread.site)) {
      set_error(text("calls ", text_of(thread.site), ", but ", describe(other), " waits in ",
                     text_of(other.site), " with the same mask 0x", std::hex, thread.mask));
      end_block();
    }
  }
  return true;
}

inline void Machine::complete(const Thread& thread, uint32_t lanes) {
  uint64_t votes = 0;
  if (thread.kind == CollectiveKind::vote) {
    for (uint32_t left = lanes; left != 0; left &= left - 1) {
      const unsigned lane = static_cast<unsigned>(std::countr_zero(left));
      votes |= static_cast<uint64_t>(lane_of(thread, lane).operand != 0) << lane;
    }
  }
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    Thread& other = lane_of(thread, static_cast<unsigned>(std::countr_zero(left)));
    other.result = thread.kind == CollectiveKind::vote ? votes : lane_of(thread, other.source_lane).operand;
    make_ready(other);
  }
}

// Messages

inline std::string Machine::location() const {
  return text("emulated kernel ", kernel_.name, ", block ", text_of(blockIdx), ": ");
}

inline std::string Machine::describe(const Thread& thread) const {
  return text("thread ", text_of(thread.index), " (lane ", thread.lane(), " of warp ", thread.warp(), ')');
}

// Nothing is ready, but some threads have not finished: says which one waits for which.
inline std::string Machine::describe_stall() const {
  for (unsigned i = 0; i < thread_count_; ++i) {
    const Thread& thread = threads_[i];
    if (thread.state != ThreadState::in_collective) continue;
    const uint32_t needed = thread.mask & lanes_of_warp(thread.warp());
    for (uint32_t left = needed; left != 0; left &= left - 1) {
      const Thread& other =
          threads_[thread.warp() * lanes_per_warp + static_cast<unsigned>(std::countr_zero(left))];
      if (other.state == ThreadState::in_collective && other.mask == thread.mask) continue;
      std::string fate = "has exited";
      if (other.state == ThreadState::at_barrier) fate = text("waits at ", text_of(other.site));
      if (other.state == ThreadState::in_collective) {
        fate = text("waits in ", text_of(other.site), " with the mask 0x", std::hex, other.mask);
      }
      return text(describe(thread), " waits in ", text_of(thread.site), " with the mask 0x", std::hex,
                  thread.mask, std::dec, ", but ", describe(other), ", which the mask names, ", fate);
    }
  }
  unsigned gone = 0;
  while (threads_[gone].state != ThreadState::exited) ++gone;
  return text(arrived_, " of ", thread_count_, " threads wait at ", text_of(first_arrived_->site), ", but ",
              describe(threads_[gone]), " and ", exited_ - 1,
              " others have exited: all threads of a block must reach the same barrier");
}

}  // namespace lungkit_emulator
