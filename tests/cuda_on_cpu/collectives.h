// Barriers, shuffles and votes. Stricter than hardware: a thread that has exited fails a barrier or a
// collective that counts on it, and all threads must call from the same place in the source.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "machine.h"
#include "synchronisation.h"

namespace lungkit_emulator {

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(const CallSite& site, uint32_t mask, T value, unsigned source_lane) {
  machine().check_source_lane(site, mask, source_lane);
  return from_bits<T>(machine().collective(site, mask, CollectiveKind::shuffle, to_bits(value), source_lane));
}

inline unsigned vote(const CallSite& site, uint32_t mask, bool predicate) {
  return static_cast<unsigned>(machine().collective(site, mask, CollectiveKind::vote, predicate));
}

// First lane of the calling lane's group of `width` lanes.
inline unsigned first_lane(const CallSite& site, int width) {
  if (width < 1 || width > warpSize || !std::has_single_bit(static_cast<unsigned>(width))) {
    machine().set_error(
        text("calls ", text_of(site), " with the width ", width, "; it must be 1, 2, 4, 8, 16 or 32"));
    machine().end_block();
  }
  return machine().current_lane() & ~static_cast<unsigned>(width - 1);
}

}  // namespace lungkit_emulator

#define LUNGKIT_EMULATOR_HERE std::source_location where = std::source_location::current()

inline void __syncthreads(LUNGKIT_EMULATOR_HERE) {
  lungkit_emulator::machine().barrier({"__syncthreads", where}, false);
}

inline int __syncthreads_count(int predicate, LUNGKIT_EMULATOR_HERE) {
  return static_cast<int>(
      lungkit_emulator::machine().barrier({"__syncthreads_count", where}, predicate != 0).count);
}

inline int __syncthreads_or(int predicate, LUNGKIT_EMULATOR_HERE) {
  return lungkit_emulator::machine().barrier({"__syncthreads_or", where}, predicate != 0).count != 0;
}

inline int __syncthreads_and(int predicate, LUNGKIT_EMULATOR_HERE) {
  return lungkit_emulator::machine().barrier({"__syncthreads_and", where}, predicate != 0).all;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, LUNGKIT_EMULATOR_HERE) {
  lungkit_emulator::vote({"__syncwarp", where}, mask, false);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, LUNGKIT_EMULATOR_HERE) {
  return lungkit_emulator::vote({"__ballot_sync", where}, mask, predicate != 0);
}

inline int __any_sync(unsigned mask, int predicate, LUNGKIT_EMULATOR_HERE) {
  return lungkit_emulator::vote({"__any_sync", where}, mask, predicate != 0) != 0;
}

inline int __all_sync(unsigned mask, int predicate, LUNGKIT_EMULATOR_HERE) {
  return lungkit_emulator::vote({"__all_sync", where}, mask, predicate == 0) == 0;
}

// Which lanes happen to run together is not defined on hardware either; a kernel that depends on it is wrong.
unsigned __activemask() = delete;

template <class T>
T __shfl_sync(unsigned mask, T value, int source_lane, int width = warpSize, LUNGKIT_EMULATOR_HERE) {
  const lungkit_emulator::CallSite site{"__shfl_sync", where};
  const unsigned first = lungkit_emulator::first_lane(site, width);
  return lungkit_emulator::shuffle(site, mask, value, first + (source_lane & (width - 1)));
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, LUNGKIT_EMULATOR_HERE) {
  const lungkit_emulator::CallSite site{"__shfl_up_sync", where};
  const unsigned first = lungkit_emulator::first_lane(site, width);
  const unsigned lane = lungkit_emulator::machine().current_lane();
  return lungkit_emulator::shuffle(site, mask, value, delta <= lane - first ? lane - delta : lane);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, LUNGKIT_EMULATOR_HERE) {
  const lungkit_emulator::CallSite site{"__shfl_down_sync", where};
  const unsigned last = lungkit_emulator::first_lane(site, width) + static_cast<unsigned>(width) - 1;
  const unsigned lane = lungkit_emulator::machine().current_lane();
  return lungkit_emulator::shuffle(site, mask, value, delta <= last - lane ? lane + delta : lane);
}

// A lane may read an earlier group of `width` lanes, but not a later one: there it gets its own value.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, LUNGKIT_EMULATOR_HERE) {
  const lungkit_emulator::CallSite site{"__shfl_xor_sync", where};
  const unsigned last = lungkit_emulator::first_lane(site, width) + static_cast<unsigned>(width) - 1;
  const unsigned lane = lungkit_emulator::machine().current_lane();
  const unsigned source = lane ^ static_cast<unsigned>(lane_mask);
  return lungkit_emulator::shuffle(site, mask, value, source <= last ? source : lane);
}

#undef LUNGKIT_EMULATOR_HERE
