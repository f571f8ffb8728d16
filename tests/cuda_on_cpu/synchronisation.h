// Threads that wait for one another: the block's barrier, and warp collectives (shuffles and votes, which
// complete once all lanes of their mask have come). What can never complete is an error that says who waits
// for whom.
#pragma once

#include <bit>
#include <cstdint>
#include <string>

#include "machine.h"

namespace lungkit_emulator {

inline BarrierResult Machine::barrier(const CallSite& site, bool predicate) {
  const Uncounted uncounted;
  Thread& me = *current_;
  if (arrived_ == 0) {
    first_arrived_ = &me;
    arrived_true_ = 0;
  } else if (!(site == first_arrived_->site)) {
    set_error(text("reached ", text_of(site), ", but ", text_of(*first_arrived_), " waits at ",
                   text_of(first_arrived_->site), "; all threads of a block must reach the same barrier"));
    end_block();
  }
  me.site = site;
  me.state = ThreadState::at_barrier;
  arrived_true_ += predicate;
  ++arrived_;
  if (arrived_ == thread_count_) {
    barrier_result_ = {arrived_true_, arrived_true_ == thread_count_};
    arrived_ = 0;
    for (unsigned i = 0; i < thread_count_; ++i) make_ready(threads_[i]);
  }
  park();
  return barrier_result_;  // the next barrier cannot complete before every thread has left this one
}

// The last warp of a block may be short of lanes.
inline uint32_t Machine::lanes_of_warp(unsigned warp) const {
  const unsigned first = warp * lanes_per_warp;
  if (first >= thread_count_) return 0;
  const unsigned lanes = thread_count_ - first;
  return lanes >= lanes_per_warp ? ~0u : (1u << lanes) - 1;
}

inline void Machine::check_source_lane(const CallSite& site, uint32_t mask, unsigned source_lane) {
  const Uncounted uncounted;
  const bool in_mask = mask >> source_lane & 1;
  const bool in_block = lanes_of_warp(current_->warp()) >> source_lane & 1;
  if (in_mask && in_block) return;
  set_error(text("calls ", text_of(site), " with ", text_of_mask(mask), " and reads lane ", source_lane,
                 in_mask ? ", which its warp does not have" : ", which the mask leaves out"));
  end_block();
}

inline uint64_t Machine::collective(const CallSite& site, uint32_t mask, CollectiveKind kind,
                                    uint64_t operand, unsigned source_lane) {
  const Uncounted uncounted;
  Thread& me = *current_;
  if (!(mask >> me.lane() & 1)) {
    set_error(text("calls ", text_of(site), " with ", text_of_mask(mask), ", which leaves out its own lane"));
    end_block();
  }
  me.site = site;
  me.kind = kind;
  me.mask = mask;
  me.source_lane = source_lane;
  me.operand = operand;
  me.state = ThreadState::in_collective;
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

// Whether all `lanes` wait in the collective of `thread`. One that waits with another mask may yet come.
inline bool Machine::lanes_agree(const Thread& thread, uint32_t lanes) {
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    const Thread& other = lane_of(thread, static_cast<unsigned>(std::countr_zero(left)));
    if (other.mask != thread.mask) return false;
    if (!(other.site == thread.site)) {
      set_error(text("calls ", text_of(thread.site), ", but ", text_of(other), " waits in ",
                     text_of(other.site),
                     " with the same mask; all lanes of a mask must make the same call"));
      end_block();
    }
  }
  return true;
}

// Results are handed out here, not read by each lane when it goes on: by then others may be in their next
// collective.
inline void Machine::complete(const Thread& thread, uint32_t lanes) {
  uint32_t votes = 0;
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    const unsigned lane = static_cast<unsigned>(std::countr_zero(left));
    if (lane_of(thread, lane).operand != 0) votes |= 1u << lane;
  }
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    Thread& other = lane_of(thread, static_cast<unsigned>(std::countr_zero(left)));
    other.result = other.kind == CollectiveKind::vote ? votes : lane_of(other, other.source_lane).operand;
    make_ready(other);
  }
}

inline std::string Machine::location() const {
  return text("emulated kernel ", kernel_.name, ", block ", text_of(blockIdx), ": ");
}

// Nobody is ready, but not all have exited: who waits in vain, and for whom.
inline std::string Machine::stall() const {
  const Thread* exited = nullptr;
  for (unsigned i = 0; i < thread_count_; ++i) {
    const Thread& thread = threads_[i];
    if (thread.state == ThreadState::in_collective) return collective_stall(thread);
    if (thread.state == ThreadState::exited && exited == nullptr) exited = &thread;
  }
  return text(arrived_, " of ", thread_count_, " threads wait at ", text_of(first_arrived_->site), ", but ",
              exited_, " have exited, such as ", text_of(*exited),
              "; all threads of a block must reach the same barrier");
}

// `thread` waits in a warp collective: finds the first lane of its mask that does not.
inline std::string Machine::collective_stall(const Thread& thread) const {
  const Thread* other = &threads_[thread.warp() * lanes_per_warp];
  const auto missing = [&](const Thread& lane) {
    const bool named = thread.mask >> lane.lane() & 1;
    return named && (lane.state != ThreadState::in_collective || lane.mask != thread.mask);
  };
  while (!missing(*other)) ++other;
  std::string fate = "has exited";
  if (other->state == ThreadState::at_barrier) fate = "waits at " + text_of(other->site);
  if (other->state == ThreadState::in_collective) {
    fate = text("waits in ", text_of(other->site), " with ", text_of_mask(other->mask));
  }
  return text(text_of(thread), " waits in ", text_of(thread.site), " with ", text_of_mask(thread.mask),
              ", but ", text_of(*other), ", which the mask names, ", fate);
}

}  // namespace lungkit_emulator
