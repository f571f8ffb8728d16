#pragma once

#include <torch/csrc/stable/library.h>

namespace lungkit {

inline void define_attention_gate(torch::stable::detail::StableLibrary& m) {
  m.def(
      "attention_gate(Tensor x, Tensor phi, Tensor w_x, Tensor w_psi, Tensor b_psi,"
      " bool allow_tf32=False) -> (Tensor out, Tensor alpha)");
  // A gradient that is not asked for comes back as an empty tensor.
  m.def(
      "attention_gate_backward(Tensor? grad_out, Tensor? grad_alpha, Tensor x, Tensor phi, Tensor w_x, "
      "Tensor w_psi,"
      " Tensor b_psi, bool needs_x, bool needs_phi, bool needs_w_x, bool needs_psi, bool allow_tf32=False)"
      " -> (Tensor grad_x, Tensor grad_phi, Tensor grad_w_x, Tensor grad_w_psi, Tensor grad_b_psi)");
}

}  // namespace lungkit
