// Tests of the emulator itself: `self_test MODE` runs one of them.
//   exit status 0: what the mode expects came true
//               1: it did not; the message says what
//               2: no such mode
//               3: the emulator reported an error, which is printed
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda_on_cpu.h"
#include "self_test_kernels.h"

std::vector<unsigned> sequence_of_other_unit();  // self_test_unit.cpp

namespace {

using lungkit_emulator::launch;
using lungkit_emulator::launch_kernel;
using lungkit_emulator::Order;
using lungkit_emulator::set_order;
using lungkit_emulator::statistics;

struct Unexpected : std::logic_error {
  using std::logic_error::logic_error;
};

void expect(bool condition, const std::string& what) {
  if (!condition) throw Unexpected(what);
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Whether `run()`, which returns a vector, gives the same bits in every order of threads and blocks.
template <class Run>
bool is_order_independent(const Run& run) {
  set_order(Order::forward);
  const auto forward = run();
  set_order(Order::reverse);
  bool same = same_bits(run(), forward);
  for (unsigned seed = 0; seed < 3; ++seed) {
    set_order(Order::random, seed);
    same = same_bits(run(), forward) && same;
  }
  set_order(Order::forward);
  return same;
}

template <class T, class Run>
void expect_in_every_order(const std::vector<T>& expected, const Run& run) {
  expect(is_order_independent(run), "results depend on the order of threads");
  expect(same_bits(run(), expected), "the result is wrong");
}

template <class T>
std::vector<T> counting(size_t n) {
  std::vector<T> values(n);
  std::iota(values.begin(), values.end(), T(0));
  return values;
}

// Right kernels

void block_reduction() {
  const auto x = counting<float>(1000);
  expect_in_every_order(std::vector<float>{1000 * 999 / 2}, [&] {
    std::vector<float> sum(1);
    launch_kernel("sum", 1, 256, 0, sum_kernel<float, 256>, x.data(), 1000, sum.data());
    return sum;
  });
  const auto y = counting<double>(700);
  expect_in_every_order(std::vector<double>{700 * 699 / 2}, [&] {
    std::vector<double> sums(3);
    launch_kernel("sum", 3, 64, 0, sum_kernel<double, 64>, y.data(), 700, sums.data());
    return std::vector<double>{sums[0] + sums[1] + sums[2]};
  });
}

void warp_scan() {
  const std::vector<int> ones(128, 1);
  std::vector<int> expected(128);
  for (size_t i = 0; i < expected.size(); ++i) expected[i] = static_cast<int>(i % 32) + 1;
  expect_in_every_order(expected, [&] {
    std::vector<int> scan(128);
    launch_kernel("warp_scan", 2, 64, 0, warp_scan_kernel, ones.data(), scan.data());
    return scan;
  });
}

void tiled_transpose() {
  constexpr int rows = 37;
  constexpr int columns = 50;
  const auto x = counting<float>(rows * columns);
  std::vector<float> expected(x.size());
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column)
      expected[column * rows + row] = x[row * columns + column];
  }
  expect_in_every_order(expected, [&] {
    std::vector<float> y(x.size());
    launch_kernel("transpose", dim3(4, 3), dim3(16, 16), 16 * 17 * sizeof(float), transpose_kernel, x.data(),
                  rows, columns, y.data());
    return y;
  });
}

void histogram() {
  std::vector<uint8_t> x(999);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint8_t>(i * i % 5);
  std::vector<unsigned long long> expected(5);
  for (const uint8_t value : x) ++expected[value];
  expect_in_every_order(expected, [&] {
    std::vector<unsigned long long> counts(5);
    launch_kernel("histogram", 8, 128, 5 * sizeof(unsigned), histogram_kernel, x.data(), 999, 5,
                  counts.data());
    return counts;
  });
}

void last_block() {
  const std::vector<int> x(64 * 9, 2);
  expect_in_every_order(std::vector<int>{64 * 9 * 2}, [&] {
    std::vector<int> partial(9), total(1);
    unsigned finished = 0;
    launch_kernel("last_block_sum", 9, 64, 0, last_block_sum_kernel, x.data(), partial.data(), &finished,
                  total.data());
    return total;
  });
}

void votes() {
  std::vector<int> expected;
  for (int thread = 0; thread < 64; ++thread) {
    for (const int answer : {static_cast<int>(0xaaaaaaaau), 1, 0, 32, 1, 0}) expected.push_back(answer);
  }
  expect_in_every_order(expected, [] {
    std::vector<int> answers(6 * 64);
    launch_kernel("votes", 1, 64, 0, votes_kernel, answers.data());
    return answers;
  });
}

void shuffles() {
  std::vector<int> expected;
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 8 * 8;
    expected.push_back(group + 3);                               // lane 11 modulo 8 of the group
    expected.push_back(lane - 3 >= group ? lane - 3 : lane);     // up stops at the group's first lane
    expected.push_back(lane + 3 < group + 8 ? lane + 3 : lane);  // down at its last
    expected.push_back(lane ^ 5);
    expected.push_back((lane ^ 8) < group ? lane ^ 8
                                          : lane);  // an earlier group may be read, a later one not
    expected.push_back(31);                         // lane -1 modulo 32
  }
  expect_in_every_order(expected, [] {
    std::vector<int> lanes(6 * 32);
    launch_kernel("shuffles", 1, 32, 0, shuffles_kernel, lanes.data());
    return lanes;
  });
}

void half_warps() {
  std::vector<int> expected(32);
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane < 16 ? 8 : 16;
    for (int other = lane / group * group; other < lane / group * group + group; ++other)
      expected[lane] += other;
  }
  expect_in_every_order(expected, [] {
    std::vector<int> sums(32);
    launch_kernel("half_warps", 1, 32, 0, half_warps_kernel, sums.data());
    return sums;
  });
}

// 40 threads: the second warp has 8 lanes, and a full mask means those.
void partial_warp() {
  std::vector<int> expected(40);
  for (int thread = 0; thread < 40; ++thread) expected[thread] = thread ^ 1;
  expect_in_every_order(expected, [] {
    std::vector<int> neighbours(40);
    launch_kernel("neighbour", 1, 40, 0, neighbour_kernel, neighbours.data());
    return neighbours;
  });
}

void early_exit() {
  std::vector<float> expected(70, 2.0f);
  std::fill(expected.begin() + 50, expected.end(), 1.0f);
  expect_in_every_order(expected, [] {
    std::vector<float> x(70, 1.0f);
    launch_kernel("double_first", 3, 32, 0, double_first_kernel, x.data(), 50);
    return x;
  });
}

void kernel_arguments() {
  int evaluated = 0;
  float out = 0.0f;
  launch_kernel("sum_arguments", 1, 64, 0, sum_arguments_kernel, ++evaluated, 0.5f, &out);
  expect(evaluated == 1, "an argument was evaluated " + std::to_string(evaluated) + " times");
  expect(out == 1.0f, "a thread saw another thread's change of an argument");
}

void intrinsics() {
  expect(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64, "__popc");
  expect(__clz(1) == 31 && __clz(0) == 32 && __clzll(1) == 63, "__clz");
  expect(__ffs(0) == 0 && __ffs(8) == 4 && __ffsll(1ll << 40) == 41, "__ffs");
  expect(__float_as_int(-0.0f) == std::numeric_limits<int>::min(), "__float_as_int");
  expect(__uint_as_float(__float_as_uint(1.5f)) == 1.5f, "__uint_as_float");
  expect(__fmaf_rn(1 + 0x1p-12f, 1 + 0x1p-12f, -1.0f) == 0x1p-11f + 0x1p-24f, "__fmaf_rn rounds once");
  expect(min(3, 2u) == 2u && max(-1.0f, std::nanf("")) == -1.0f && min(1.0f, 2.0) == 1.0, "min and max");
  expect(__float2int_rn(2.5f) == 2 && __float2int_rz(-2.5f) == -2, "__float2int");
  expect(__float2int_rn(1e20f) == std::numeric_limits<int>::max(), "__float2int saturates");
  expect(sizeof(float3) == 12 && alignof(float3) == 4 && alignof(float4) == 16 && alignof(uchar4) == 4,
         "vectors");
  expect(make_float4(1, 2, 3, 4).w == 4.0f && make_ushort2(5, 6).y == 6, "make_");
  int limit = std::numeric_limits<int>::max();
  expect(atomicAdd(&limit, 1) == std::numeric_limits<int>::max(), "atomicAdd returns the old value");
  expect(limit == std::numeric_limits<int>::min(), "atomicAdd wraps around");
  unsigned word = 6;
  expect(atomicCAS(&word, 6u, 9u) == 6 && atomicCAS(&word, 6u, 1u) == 9 && word == 9, "atomicCAS");
  expect(atomicMax(&word, 7u) == 9 && atomicMin(&word, 7u) == 9 && atomicOr(&word, 8u) == 7 && word == 15,
         "atomics");
  expect(atomicExch(&word, 1u) == 15 && atomicSub(&word, 2u) == 1 && word == ~0u, "atomicExch, atomicSub");
}

void runtime_api() {
  int value = 0;
  expect(cudaGetDevice(&value) == cudaSuccess && value == 0, "cudaGetDevice");
  expect(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value == 4,
         "attribute");
  expect(cudaDeviceGetAttribute(&value, cudaDevAttrWarpSize, 1) == cudaErrorInvalidValue,
         "there is no device 1");
  std::vector<int> from(4), to(4, 7);
  expect(cudaMemsetAsync(from.data(), 1, 8) == cudaSuccess, "cudaMemsetAsync");
  expect(cudaMemcpyAsync(to.data(), from.data(), 12, cudaMemcpyDeviceToDevice) == cudaSuccess,
         "cudaMemcpyAsync");
  expect(to == std::vector<int>{0x01010101, 0x01010101, 0, 7}, "what was copied");
  expect(
      cudaMemcpyAsync(to.data(), from.data(), 4, cudaMemcpyDeviceToHost) == cudaErrorInvalidMemcpyDirection,
      "a copy to the host must fail");
}

// Launches

void statistics_count() {
  const auto before = statistics();
  launch("nothing", dim3(3, 2), dim3(8, 4), 0, [] {});
  const auto after = statistics();
  expect(after.launches - before.launches == 1, "launches");
  expect(after.blocks - before.blocks == 6, "blocks");
  expect(after.threads - before.threads == 6 * 32, "threads");
  expect(after.switches - before.switches == 2 * 6, "threads that never wait need one fibre a block");
}

// Every block must run once, whatever the order.
void every_block_runs_once() {
  expect_in_every_order(std::vector<int>(5 * 3 * 2, 1), [] {
    std::vector<int> runs(5 * 3 * 2);
    launch("count", dim3(5, 3, 2), 1, 0, [&] { ++runs[(blockIdx.z * 3 + blockIdx.y) * 5 + blockIdx.x]; });
    return runs;
  });
}

void orders_differ() {
  const auto sequence = [](Order order, unsigned seed) {
    std::vector<unsigned> threads;
    set_order(order, seed);
    launch("sequence", 2, 96, 0, [&] { threads.push_back(blockIdx.x * 96 + threadIdx.x); });
    return threads;
  };
  const auto forward = sequence(Order::forward, 0);
  expect(forward == counting<unsigned>(192), "forward runs threads in order");
  const auto reverse = sequence(Order::reverse, 0);
  expect(std::vector<unsigned>(reverse.rbegin(), reverse.rend()) == forward,
         "reverse is forward turned round");
  expect(sequence(Order::random, 1) == sequence(Order::random, 1), "a seed names one order");
  expect(sequence(Order::random, 1) != sequence(Order::random, 2), "another seed names another");
}

void translation_units() {
  const auto launches = statistics().launches;
  set_order(Order::reverse);
  expect(sequence_of_other_unit() == std::vector<unsigned>{3, 2, 1, 0},
         "the other unit has an order of its own");
  expect(statistics().launches == launches + 1, "the other unit counts for itself");
}

// Prints the order that the environment asks for.
void print_order() {
  launch("sequence", 1, 8, 0, [] { std::printf("%u ", threadIdx.x); });
}

void shared_opt_in() {
  constexpr size_t bytes = 100 * 1024;
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  expect(cudaFuncSetAttribute(store_behind_dynamic_kernel, attribute, bytes) == cudaSuccess, "opt-in");
  expect(cudaFuncSetAttribute(store_behind_dynamic_kernel, attribute, 228 * 1024) == cudaErrorInvalidValue,
         "more than a block can have must be refused");
  launch_kernel("opted_in", 1, 32, bytes, store_behind_dynamic_kernel, 0);
  launch_kernel("other", 1, 32, bytes, missing_syncwarp_kernel,
                nullptr);  // throws: this kernel has not opted in
}

void launches_after_an_error() {
  const auto fails = [](const auto& run) {
    try {
      run();
    } catch (const std::exception&) {
      return true;
    }
    return false;
  };
  for (int round = 0; round < 3; ++round) {
    expect(fails([] { launch_kernel("barrier_after_exit", 2, 1024, 0, barrier_after_exit_kernel); }),
           "barrier");
    expect(fails([] {
             launch("throws", 1, 64, 0, [] {
               __syncwarp();
               if (threadIdx.x == 9) throw std::out_of_range("thrown by a thread");
             });
           }),
           "throw");
    block_reduction();
  }
}

void exception_of_a_thread() {
  launch("throws", 1, 64, 0, [] {
    __syncthreads();
    if (threadIdx.x == 9) throw std::out_of_range("thrown by thread 9");
  });
}

void launch_in_a_kernel() {
  launch("outer", 1, 1, 0, [] { launch("inner", 1, 1, 0, [] {}); });
}

void launches_from_threads() {
  std::vector<std::string> problems(4);
  std::vector<std::thread> threads;
  for (std::string& problem : problems) {
    threads.emplace_back([&problem] {
      try {
        for (int i = 0; i < 20; ++i) {
          const std::vector<float> ones(640, 1.0f);
          float sum = 0.0f;
          launch_kernel("sum", 1, 128, 0, sum_kernel<float, 128>, ones.data(), 640, &sum);
          expect(sum == 640.0f, "the result is wrong");
        }
      } catch (const std::exception& error) {
        problem = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& problem : problems) expect(problem.empty(), problem);
}

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
