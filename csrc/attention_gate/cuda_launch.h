// What both ways of the gate on the host begin with: its inputs and weights as the kernels read them.
#pragma once

#include <optional>

#include "../support/cuda_device.h"
#include "../support/cuda_launch.h"
#include "../support/parallel.h"
#include "arguments.h"
#include "cuda_tile.h"

namespace lungkit {

constexpr int64_t max_channels = 64, max_inner = 32, max_runs = INT64_C(0x7fffffff) - (1 << 20);

inline bool is_small(const GateArguments& a) {
  return a.x_layout.channels <= max_channels / 2 && a.phi_layout.channels <= max_inner / 2;
}

inline Tensor as_float(const Tensor& parameter) {
  if (parameter.scalar_type() == ScalarType::Float && parameter.is_contiguous()) return parameter;
  return torch::stable::contiguous(torch::stable::to(parameter, ScalarType::Float));
}

// float copies of the weights, kept alive for the launch.
struct GateWeights {
  Tensor w_x;
  Tensor w_psi;
  Tensor b_psi;
};

template <class Stored>
GateInputs<Stored> inputs_of(const GateArguments& a, const GateWeights& weights) {
  GateInputs<Stored> in{.x = static_cast<const Stored*>(a.x.const_data_ptr()),
                        .phi = static_cast<const Stored*>(a.phi.const_data_ptr()),
                        .x_layout = readable_layout(a.x),
                        .phi_layout = readable_layout(a.phi),
                        .axes = {},
                        .w_x = static_cast<const float*>(weights.w_x.const_data_ptr()),
                        .w_psi = static_cast<const float*>(weights.w_psi.const_data_ptr()),
                        .b_psi = static_cast<const float*>(weights.b_psi.const_data_ptr())};
  for (int d = 0; d < 3; ++d) in.axes[d] = {static_cast<int>(a.fine[d]), static_cast<int>(a.coarse[d])};
  return in;
}

// What the caller wants, and where it goes.
struct GateResults {
  std::optional<Tensor> grad_out;
  std::optional<Tensor> grad_alpha;
  bool needs_x, needs_phi, needs_sums;
  Tensor grad_x;
  Tensor grad_phi;
};

template <class Stored>
Stored* data_of(const Tensor& tensor, bool needed) {
  return needed ? static_cast<Stored*>(tensor.mutable_data_ptr()) : nullptr;
}
template <class Stored>
const Stored* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const Stored*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace lungkit
