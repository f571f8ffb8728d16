// Two torch ops on emulated kernels, to see that errors and control reach Python: a sum that is right, and
// one without its barrier; a third op fails.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda_on_cpu.h"
#include "self_test_kernels.h"

namespace {

using lungkit_emulator::launch_kernel;
using torch::stable::Tensor;

constexpr int threads = 256;

// Sums of 4 blocks, then their sum: two launches.
Tensor sum(const Tensor& x) {
  Tensor partial = torch::stable::new_empty(x, {4});
  Tensor total = torch::stable::new_empty(x, {});
  const auto* from = static_cast<const float*>(x.data_ptr());
  auto* sums = static_cast<float*>(partial.data_ptr());
  auto* out = static_cast<float*>(total.data_ptr());
  launch_kernel("sum", 4, threads, 0, sum_kernel<float, threads>, from, x.numel(), sums);
  launch_kernel("sum", 1, threads, 0, sum_kernel<float, threads>, sums, 4, out);
  return total;
}

Tensor sum_without_barrier(const Tensor& x) {
  Tensor total = torch::stable::new_empty(x, {});
  launch_kernel("missing_barrier", 1, threads, 0, missing_barrier_kernel<threads>,
                static_cast<const float*>(x.data_ptr()), static_cast<float*>(total.data_ptr()));
  return total;
}

Tensor divergent_barrier(const Tensor& x) {
  launch_kernel("barrier_after_exit", 1, threads, 0, barrier_after_exit_kernel);
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY(lungkit_emulator_test, m) {
  m.def("sum(Tensor x) -> Tensor");
  m.def("sum_without_barrier(Tensor x) -> Tensor");
  m.def("divergent_barrier(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lungkit_emulator_test, CPU, m) {
  m.impl("sum", TORCH_BOX(&sum));
  m.impl("sum_without_barrier", TORCH_BOX(&sum_without_barrier));
  m.impl("divergent_barrier", TORCH_BOX(&divergent_barrier));
}
