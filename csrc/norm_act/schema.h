#pragma once

#include <torch/csrc/stable/library.h>

namespace lungkit {

// y = leaky(weight (x - mean) rstd + bias + residual); mean and rstd are (B, groups). A slope of 1 is no
// activation.
inline void define_norm_act(torch::stable::detail::StableLibrary& m) {
  m.def(
      "norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int groups, float eps, float slope)"
      " -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "norm_act_(Tensor(a!) x, Tensor? weight, Tensor? bias, Tensor? residual, int groups, float eps, float "
      "slope) -> ()");
  m.def(
      "norm_act_backward(Tensor grad_y, Tensor x, Tensor? y, Tensor mean, Tensor rstd, Tensor? weight, "
      "Tensor? "
      "bias, float slope, bool needs_residual) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, "
      "Tensor "
      "grad_residual)");
}

}  // namespace lungkit
