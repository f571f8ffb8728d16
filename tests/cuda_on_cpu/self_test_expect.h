// What the modes of self_test check with.
#pragma once

#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

namespace {

using lungkit_emulator::launch;
using lungkit_emulator::launch_kernel;
using lungkit_emulator::Order;
using lungkit_emulator::set_order;

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

}  // namespace
