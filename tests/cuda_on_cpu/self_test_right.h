// Modes of self_test that hold right kernels, and what device code calls, against known answers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cuda_on_cpu.h"
#include "self_test_expect.h"
#include "self_test_kernels.h"

namespace {

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
    expected.push_back(lane % 16 >= 8 ? lane ^ 8 : lane);  // an earlier group may be read, a later one not
    expected.push_back(31);                                // lane -1 modulo 32
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

void intrinsics() {
  expect(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64, "__popc");
  expect(__clz(1) == 31 && __clz(0) == 32 && __clzll(1) == 63, "__clz");
  expect(__ffs(0) == 0 && __ffs(8) == 4 && __ffsll(1ll << 40) == 41, "__ffs");
  expect(__float_as_int(-0.0f) == std::numeric_limits<int>::min(), "__float_as_int");
  expect(__uint_as_float(__float_as_uint(1.5f)) == 1.5f, "__uint_as_float");
  expect(__fmaf_rn(1 + 0x1p-12f, 1 + 0x1p-12f, -1.0f) == 0x1p-11f + 0x1p-24f, "__fmaf_rn rounds once");
  using lungkit_emulator::ex2_approx_ftz, lungkit_emulator::rcp_approx_ftz;
  expect(ex2_approx_ftz(-1.0f) == 0.5f + 0x1p-23f && rcp_approx_ftz(2.0f) == 0.5f + 0x1p-24f,
         "approximations are off by 2 and 1 units in the last place");
  expect(ex2_approx_ftz(-0.0f) == 1.0f && ex2_approx_ftz(-127.0f) == 0.0f &&
             std::isnan(ex2_approx_ftz(std::nanf(""))),
         "ex2_approx_ftz at 0, of a subnormal result and of NaN");
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

}  // namespace
