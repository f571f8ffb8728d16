// Which thread runs when. A thread runs until it waits or ends; then the next ready one does: the lowest
// (forward), the highest (reverse) or any (random). So a warp or a thread runs as far ahead of the others as
// barriers let it, which is what a missing barrier cannot survive in every order. Blocks run in the same
// order, one at a time.
#pragma once

#include <bit>
#include <cstdint>
#include <exception>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "machine.h"

namespace lungkit_emulator {

// A member of a set of lanes or of warps, which is not empty.
inline unsigned Machine::choose(uint32_t set) {
  if (order == Order::forward) return static_cast<unsigned>(std::countr_zero(set));
  if (order == Order::reverse) return 31u - static_cast<unsigned>(std::countl_zero(set));
  random_ ^= random_ << 13;  // xorshift64
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  const unsigned start = static_cast<unsigned>(random_ >> 32) % 32;
  const uint32_t from_start = std::rotr(set, static_cast<int>(start));
  return (static_cast<unsigned>(std::countr_zero(from_start)) + start) % 32;
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
    const auto entry = [] { machine().work(); };
    fibres_.push_back(std::make_unique<Fibre>(entry, static_cast<unsigned>(fibres_.size())));
    return *fibres_.back();
  }
  Fibre* const fibre = free_fibres_.back();
  free_fibres_.pop_back();
  return *fibre;
}

// The current thread waits: others run until it is ready again and its turn has come.
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

// What a fibre does: it runs a thread to its end, then the next one. Threads that never wait share one fibre,
// and a fibre whose thread has ended stays here until it gets another.
inline void Machine::work() {
  for (;;) {
    threadIdx = current_->index;
    try {
      set_in_kernel(true);
      kernel_.call(kernel_.body);
    } catch (...) {
      error_ = std::current_exception();
    }
    set_in_kernel(false);
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
  error_ = std::make_exception_ptr(std::runtime_error(text(location(), text_of(*current_), ' ', what)));
}

inline void Machine::end_block() {
  switch_to(host_);
  __builtin_unreachable();
}

// After an error: whatever the fibres were doing will never go on. Destructors of kernel variables do not
// run.
inline void Machine::abandon_fibres() {
  free_fibres_.clear();
  for (const auto& fibre : fibres_) {
    fibre->reset();
    free_fibres_.push_back(fibre.get());
  }
}

inline void Machine::start_block() {
  unsigned number = 0;
  for (unsigned z = 0; z < blockDim.z; ++z) {
    for (unsigned y = 0; y < blockDim.y; ++y) {
      for (unsigned x = 0; x < blockDim.x; ++x) {
        Thread& thread = threads_[number];
        thread.index = {x, y, z};
        thread.number = number;
        thread.fibre = nullptr;
        thread.state = ThreadState::ready;
        ++number;
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
  dynamic_->fill();
  static_.fill();
}

inline void Machine::run_block() {
  start_block();
  current_ = next_ready();
  running_ = &host_;
  switch_to(free_fibre());

  if (!error_) {
    std::string problem;
    if (exited_ < thread_count_) {
      problem = stall();
    } else if (dynamic_->overrun()) {
      problem = "a thread wrote past the end of the dynamic shared memory";
    } else if (shared_bytes_ + static_.used() > shared_limit_) {
      problem = text(shared_bytes_, " bytes of dynamic and at least ", static_.used(),
                     " bytes of static shared memory; together they may have ", shared_limit_);
    }
    if (!problem.empty()) error_ = std::make_exception_ptr(std::runtime_error(location() + problem));
  }
  if (error_) {
    abandon_fibres();
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

// Which block runs as the i-th. At random: in steps that have no factor in common with the number of blocks,
// so that each is met once.
inline uint64_t Machine::nth_block(uint64_t i, uint64_t blocks) const {
  if (order == Order::forward) return i;
  if (order == Order::reverse) return blocks - 1 - i;
  uint64_t step = 1 + (seed + 1) * 0x9e3779b1u % blocks;
  while (std::gcd(step, blocks) != 1) ++step;
  return (i * (step % blocks) + seed % blocks) % blocks;
}

inline void Machine::run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes,
                              size_t shared_limit) {
  kernel_ = kernel;
  gridDim = grid;
  blockDim = block;
  thread_count_ = block.x * block.y * block.z;
  if (threads_.size() < thread_count_) threads_.resize(thread_count_);
  free_fibres_.reserve(max_block_threads + 1);  // a fibre that gives way must not have to allocate
  dynamic_ = std::make_unique<DynamicShared>(shared_bytes);
  static_ = StaticShared::of_this_thread();
  shared_bytes_ = shared_bytes;
  shared_limit_ = shared_limit;
  ++statistics.launches;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  begin_counts({.kernel = reinterpret_cast<uintptr_t>(kernel.address),
                .blocks = blocks,
                .threads = thread_count_,
                .shared_bytes = shared_bytes},
               dynamic_->data());
  const Statistics before = statistics;
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
  end_counts(statistics.products - before.products, statistics.copied_bytes - before.copied_bytes);
}

}  // namespace lungkit_emulator
