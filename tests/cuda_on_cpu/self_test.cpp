// Tests of the emulator itself: `self_test MODE` runs one of them.
//   exit status 0: what the mode expects came true
//               1: it did not; the message says what
//               2: no such mode
//               3: the emulator reported an error, which is printed
#include <cstdio>
#include <exception>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"
#include "self_test_expect.h"
#include "self_test_kernels.h"
#include "self_test_launches.h"
#include "self_test_right.h"

namespace {

// Wrong kernels that no single run betrays: their results depend on the order.

void missing_barrier() {
  expect(!is_order_independent([] {
    const std::vector<float> ones(256, 1.0f);
    std::vector<float> sum(1);
    launch_kernel("missing_barrier", 1, 256, 0, missing_barrier_kernel<256>, ones.data(), sum.data());
    return sum;
  }),
         "the missing barrier went unnoticed");
}

void missing_second_barrier() {
  expect(!is_order_independent([] {
    std::vector<int> sums(64);
    launch_kernel("missing_second_barrier", 1, 64, 0, missing_second_barrier_kernel, 3, sums.data());
    return sums;
  }),
         "the missing barrier went unnoticed");
}

void missing_syncwarp() {
  expect(!is_order_independent([] {
    std::vector<int> neighbours(64);
    launch_kernel("missing_syncwarp", 1, 64, 0, missing_syncwarp_kernel, neighbours.data());
    return neighbours;
  }),
         "the missing __syncwarp went unnoticed");
}

void float_atomics() {
  std::vector<float> x(256);
  for (size_t i = 0; i < x.size(); ++i) x[i] = 1.0f / static_cast<float>(i + 1);
  expect(!is_order_independent([&] {
    std::vector<float> sum(1);
    launch_kernel("float_atomics", 4, 64, 0, float_atomics_kernel, x.data(), sum.data());
    return sum;
  }),
         "the order of float additions went unnoticed");
}

// Shared memory that the block has not written

void stale_static_shared() {
  unsigned out = 0;
  launch_kernel("stale_static", 1, 1, 0, stale_static_kernel, true, &out);
  launch_kernel("stale_static", 1, 1, 0, stale_static_kernel, false, &out);
  expect(out == 0xffffffffu, "a block read what an earlier one left in static shared memory");
}

void stale_dynamic_shared() {
  std::vector<unsigned> out(1);
  launch_kernel("stale_dynamic", 1, 1, 4, stale_dynamic_kernel, true, out.data());
  launch_kernel("stale_dynamic", 1, 1, 4, stale_dynamic_kernel, false, out.data());
  expect(out[0] == 0xffffffffu, "a block read what an earlier one left in dynamic shared memory");
}

// Modes that end in an error

template <class... Arguments>
std::function<void()> launched(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                               void (*kernel)(Arguments...), Arguments... arguments) {
  return [=] { launch_kernel(name, grid, block, shared_bytes, kernel, arguments...); };
}

void store_behind_global() {
  std::vector<float> x(100);
  launch_kernel("store_behind_global", 4, 32, 0, store_behind_global_kernel, x.data());
}

const std::map<std::string, std::function<void()>>& modes() {
  static float out[64];
  static int out_int;
  static const std::map<std::string, std::function<void()>> all = {
      {"block_reduction", block_reduction},
      {"warp_scan", warp_scan},
      {"tiled_transpose", tiled_transpose},
      {"histogram", histogram},
      {"last_block", last_block},
      {"votes", votes},
      {"shuffles", shuffles},
      {"half_warps", half_warps},
      {"partial_warp", partial_warp},
      {"early_exit", early_exit},
      {"kernel_arguments", kernel_arguments},
      {"intrinsics", intrinsics},
      {"runtime_api", runtime_api},
      {"statistics_count", statistics_count},
      {"every_block_runs_once", every_block_runs_once},
      {"orders_differ", orders_differ},
      {"translation_units", translation_units},
      {"print_order", print_order},
      {"shared_opt_in", shared_opt_in},
      {"launches_after_an_error", launches_after_an_error},
      {"exception_of_a_thread", exception_of_a_thread},
      {"launch_in_a_kernel", launch_in_a_kernel},
      {"launches_from_threads", launches_from_threads},
      {"missing_barrier", missing_barrier},
      {"missing_second_barrier", missing_second_barrier},
      {"missing_syncwarp", missing_syncwarp},
      {"float_atomics", float_atomics},
      {"stale_static_shared", stale_static_shared},
      {"stale_dynamic_shared", stale_dynamic_shared},
      {"barrier_after_exit", launched("k", 1, 64, 0, barrier_after_exit_kernel)},
      {"two_barriers", launched("k", 1, 64, 0, two_barriers_kernel)},
      {"exited_lane", launched("k", 1, 32, 0, exited_lane_kernel, out)},
      {"source_outside_mask", launched("k", 1, 32, 0, source_outside_mask_kernel, out)},
      {"caller_outside_mask", launched("k", 1, 32, 0, caller_outside_mask_kernel, out)},
      {"missing_lane", launched("k", 1, 40, 0, missing_lane_kernel, out)},
      {"two_shuffles", launched("k", 1, 32, 0, two_shuffles_kernel, out)},
      {"barrier_against_shuffle", launched("k", 1, 32, 0, barrier_against_shuffle_kernel, out)},
      {"two_masks", launched("k", 1, 32, 0, two_masks_kernel, out)},
      {"odd_width", launched("k", 1, 32, 0, odd_width_kernel, out)},
      {"trap", launched("k", 2, 32, 0, trap_kernel)},
      {"block_too_large", launched("k", 1, dim3(33, 32), 0, trap_kernel)},
      {"block_empty", launched("k", 1, dim3(32, 0), 0, trap_kernel)},
      {"grid_empty", launched("k", dim3(4, 0), 32, 0, trap_kernel)},
      {"grid_too_high", launched("k", dim3(1, 65536), 32, 0, trap_kernel)},
      {"shared_too_large", launched("k", 1, 32, 228 * 1024, trap_kernel)},
      {"shared_without_opt_in", launched("k", 1, 32, 48 * 1024 + 1, trap_kernel)},
      {"static_beside_dynamic", launched("k", 1, 64, 48 * 1024 - 128, store_behind_static_kernel, 0, out)},
      {"store_behind_global", store_behind_global},
      {"store_behind_dynamic", launched("k", 1, 64, 256, store_behind_dynamic_kernel, 1)},
      {"store_behind_static", launched("k", 1, 64, 0, store_behind_static_kernel, 1, out)},
      {"signed_overflow", launched("k", 1, 1024, 0, signed_overflow_kernel, 1 << 24, &out_int)},
      {"misaligned_load",
       launched("k", 1, 2, 0, misaligned_load_kernel, static_cast<const float*>(out), out)},
      {"endless_recursion", launched("k", 1, 1, 0, endless_recursion_kernel, &out_int)},
  };
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const auto mode = modes().find(argc == 2 ? argv[1] : "");
  if (mode == modes().end()) {
    std::fprintf(stderr, "usage: self_test MODE, one of:\n");
    for (const auto& [name, run] : modes()) std::fprintf(stderr, "  %s\n", name.c_str());
    return 2;
  }
  try {
    mode->second();
  } catch (const Unexpected& unexpected) {
    std::fprintf(stderr, "%s\n", unexpected.what());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return 0;
}
