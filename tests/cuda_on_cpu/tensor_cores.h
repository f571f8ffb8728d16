// Tensor cores and asynchronous copies: what csrc/support/cuda_tensor_cores.h asks of a device. Operands are
// spread over the lanes as the hardware spreads them, so a kernel that mixes up a layout computes a wrong
// product here too. A copy takes place when its thread waits for it: a kernel that reads too early reads what
// was there before.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "collectives.h"
#include "machine.h"

namespace lungkit_emulator {

// What the lanes of a warp lay out for one another.
struct WarpOperands {
  uint32_t a[lanes_per_warp][4];
  uint32_t b[lanes_per_warp][2];
  const void* row[lanes_per_warp];
};

inline WarpOperands& operands_of_warp() {
  static std::array<WarpOperands, max_warps> of_warp;
  return of_warp[machine().current_warp()];
}

template <class Stored>
Stored element_of(uint32_t pair, unsigned k) {
  const uint16_t bits = static_cast<uint16_t>(k % 2 ? pair >> 16 : pair);
  Stored value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// sum += A B for a 16 x 16 block of A and a 16 x 8 block of B.
template <class Stored>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Uncounted uncounted;
  WarpOperands& warp = operands_of_warp();
  const unsigned lane = machine().current_lane(), g = lane / 4, t = lane % 4;
  std::memcpy(warp.a[lane], a, sizeof a);
  std::memcpy(warp.b[lane], b, sizeof b);
  machine().statistics.products += lane == 0;
  __syncwarp();
  for (unsigned j = 0; j < 4; ++j) {
    const unsigned row = g + j / 2 * 8, column = 2 * t + j % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned depth = k % 8 / 2;
      const auto left = element_of<Stored>(warp.a[row % 8 * 4 + depth][row / 8 + k / 8 * 2], k);
      const auto right = element_of<Stored>(warp.b[column * 4 + depth][k / 8], k);
      sum[j] += static_cast<float>(left) * static_cast<float>(right);
    }
  }
  __syncwarp();
}

inline void load_blocks(uint32_t (&blocks)[4], const void* row, bool transposed) {
  const Uncounted uncounted;
  WarpOperands& warp = operands_of_warp();
  const unsigned lane = machine().current_lane(), g = lane / 4, t = lane % 4;
  warp.row[lane] = row;
  __syncwarp();
  for (unsigned j = 0; j < 4; ++j) {
    uint16_t pair[2];
    for (unsigned k = 0; k < 2; ++k) {
      const unsigned r = transposed ? 2 * t + k : g, c = transposed ? g : 2 * t + k;
      std::memcpy(&pair[k], static_cast<const char*>(warp.row[8 * j + r]) + 2 * c, 2);
    }
    std::memcpy(&blocks[j], pair, sizeof pair);
  }
  __syncwarp();
}

struct Copy {
  void* shared;
  const void* global;
};

// Of one thread: the copies of each closed group, oldest first, and those of the open one, last. What an
// earlier block did not wait for ended with it.
inline std::vector<std::vector<Copy>>& copies_of_thread() {
  struct Copies {
    uint64_t block = 0;
    std::vector<std::vector<Copy>> groups;
  };
  static std::array<Copies, max_block_threads> of_thread;
  Copies& own = of_thread[machine().current_number()];
  if (own.block != machine().statistics.blocks) own = {machine().statistics.blocks, {{}}};
  return own.groups;
}

inline void copy_later(void* shared, const void* global, bool wanted) {
  const Uncounted uncounted;
  const auto misaligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 != 0; };
  if (misaligned(shared) || (wanted && misaligned(global))) {
    machine().set_error("copies 16 bytes between addresses that are not on 16 bytes");
    machine().end_block();
  }
  copies_of_thread().back().push_back({shared, wanted ? global : nullptr});
}

inline void close_copies() {
  const Uncounted uncounted;
  copies_of_thread().emplace_back();
}

inline void wait_for_copies(unsigned open) {
  const Uncounted uncounted;
  auto& groups = copies_of_thread();
  while (groups.size() > open + 1) {
    for (const Copy& copy : groups.front()) {
      if (copy.global == nullptr) {
        std::memset(copy.shared, 0, 16);
      } else {
        std::memcpy(copy.shared, copy.global, 16);
        count_copy(copy.global, 16);
        machine().statistics.copied_bytes += 16;
      }
    }
    groups.erase(groups.begin());
  }
}

}  // namespace lungkit_emulator
