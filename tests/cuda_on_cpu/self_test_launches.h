// Modes of self_test about launching: arguments, orders, statistics, errors, and the runtime API.
#pragma once

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda_on_cpu.h"
#include "self_test_expect.h"
#include "self_test_kernels.h"
#include "self_test_right.h"

std::vector<unsigned> sequence_of_other_unit();  // self_test_unit.cpp

namespace {

using lungkit_emulator::statistics;

void kernel_arguments() {
  int evaluated = 0;
  float out = 0.0f;
  launch_kernel("sum_arguments", 1, 64, 0, sum_arguments_kernel, ++evaluated, 0.5f, &out);
  expect(evaluated == 1, "an argument was evaluated " + std::to_string(evaluated) + " times");
  expect(out == 1.0f, "a thread saw another thread's change of an argument");
}

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
  // What one kernel may have, another may not: this throws.
  launch_kernel("other", 1, 32, bytes, missing_syncwarp_kernel, nullptr);
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

void runtime_api() {
  int value = 0;
  expect(cudaGetDevice(&value) == cudaSuccess && value == 0, "cudaGetDevice");
  expect(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value == 4,
         "attribute");
  expect(cudaDeviceGetAttribute(&value, cudaDevAttrWarpSize, lungkit_emulator::device_count) ==
             cudaErrorInvalidValue,
         "there is no such device");
  std::vector<int> from(4), to(4, 7);
  expect(cudaMemsetAsync(from.data(), 1, 8) == cudaSuccess, "cudaMemsetAsync");
  expect(cudaMemcpyAsync(to.data(), from.data(), 12, cudaMemcpyDeviceToDevice) == cudaSuccess,
         "cudaMemcpyAsync");
  expect(to == std::vector<int>{0x01010101, 0x01010101, 0, 7}, "what was copied");
  expect(
      cudaMemcpyAsync(to.data(), from.data(), 4, cudaMemcpyDeviceToHost) == cudaErrorInvalidMemcpyDirection,
      "a copy to the host must fail");
}

}  // namespace
