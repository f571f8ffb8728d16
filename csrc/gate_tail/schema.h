#pragma once

#include <torch/csrc/stable/library.h>

namespace lungkit {

inline void define_gate_tail(torch::stable::detail::StableLibrary& m) {
  m.def("gate_psi(Tensor a, Tensor b, Tensor weight) -> (Tensor psi, Tensor q)");
  m.def(
      "gate_psi_backward(Tensor grad_psi, Tensor q, Tensor weight, bool needs_features, bool needs_weight)"
      " -> (Tensor grad_features, Tensor grad_weight)");
  m.def("gate_scale(Tensor x, Tensor alpha) -> Tensor");
  m.def(
      "gate_scale_backward(Tensor grad_out, Tensor x, Tensor alpha, bool needs_x, bool needs_alpha)"
      " -> (Tensor grad_x, Tensor grad_alpha)");
}

}  // namespace lungkit
