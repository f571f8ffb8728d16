// Checks and shapes that the CPU and the CUDA side of the attention gate share.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "../support/check.h"
#include "../support/dispatch.h"
#include "../support/features.h"

namespace lungkit {

struct GateArguments {
  Tensor x;
  Tensor phi;
  VoxelLayout x_layout;
  VoxelLayout phi_layout;
  std::array<int64_t, 3>
      fine;  // the grids as (Z, Y, X); a 2D image is (Y, 1, X), so that it has planes to split
  std::array<int64_t, 3> coarse;
};

inline std::array<int64_t, 3> grid_of(const Tensor& tensor, bool flat) {
  const int64_t y = tensor.size(tensor.dim() - 2), x = tensor.size(tensor.dim() - 1);
  if (flat) return {y, 1, x};
  return {tensor.size(2), y, x};
}

inline void check_gate_parameter(const Tensor& parameter, const char* name, const Tensor& x, ScalarType type,
                                 const std::vector<int64_t>& shape) {
  LUNGKIT_CHECK(on_same_device(parameter, x), "attention_gate: x and ", name, " must be on the same device");
  bool same = parameter.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; same && d < shape.size(); ++d) same = parameter.size(d) == shape[d];
  std::string expected;
  for (const int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  LUNGKIT_CHECK(same, "attention_gate: ", name, " must be (", expected, ") for x and phi's channels, got ",
                shape_of(parameter));
  LUNGKIT_CHECK(parameter.scalar_type() == type, "attention_gate: w_x is ", toString(type), " but ", name,
                " is ", toString(parameter.scalar_type()));
}

inline GateArguments check_attention_gate(const Tensor& x, const Tensor& phi, const Tensor& w_x,
                                          const Tensor& w_psi, const Tensor& b_psi) {
  LUNGKIT_CHECK(x.dim() == 4 || x.dim() == 5,
                "attention_gate: x must be (B, Cx, Y, X) or (B, Cx, Z, Y, X), got ", shape_of(x));
  dispatch_floating(x.scalar_type(), "attention_gate", [](auto) {});
  bool fits = phi.dim() == x.dim() && phi.size(0) == x.size(0);
  for (int64_t d = 2; fits && d < x.dim(); ++d)
    fits = phi.size(d) <= x.size(d) && (phi.size(d) > 0 || x.size(d) == 0);
  LUNGKIT_CHECK(fits,
                "attention_gate: phi must be (B, Ci, *Sg) with x's batch and a grid no finer than x's, got ",
                shape_of(phi), " for x ", shape_of(x));
  LUNGKIT_CHECK(on_same_device(phi, x), "attention_gate: x and phi must be on the same device");
  LUNGKIT_CHECK(phi.scalar_type() == x.scalar_type(), "attention_gate: x is ", toString(x.scalar_type()),
                " but phi is ", toString(phi.scalar_type()));
  const ScalarType type = w_x.scalar_type();
  LUNGKIT_CHECK(
      type == x.scalar_type() || (type == ScalarType::Float && x.scalar_type() != ScalarType::Double),
      "attention_gate: w_x must have x's dtype (", toString(x.scalar_type()),
      "), or float32 where x is a half type, got ", toString(type));
  check_gate_parameter(w_x, "w_x", x, type, {phi.size(1), x.size(1)});
  check_gate_parameter(w_psi, "w_psi", x, type, {phi.size(1)});
  check_gate_parameter(b_psi, "b_psi", x, type, {1});

  const bool flat = x.dim() == 4 || (x.size(2) == 1 && phi.size(2) == 1);
  GateArguments a{.x = with_unit_stride(x),
                  .phi = with_unit_stride(phi),
                  .x_layout = {},
                  .phi_layout = {},
                  .fine = grid_of(x, flat),
                  .coarse = grid_of(phi, flat)};
  a.x_layout = channel_layout(a.x);
  a.phi_layout = channel_layout(a.phi);
  return a;
}

// Gradients of out and of alpha, where there are any.
inline void check_gate_gradients(const std::optional<Tensor>& grad_out,
                                 const std::optional<Tensor>& grad_alpha, const Tensor& x) {
  const auto check = [&](const std::optional<Tensor>& grad, const char* name, int64_t channels) {
    if (!grad) return;
    LUNGKIT_CHECK(on_same_device(*grad, x), "attention_gate_backward: x and ", name,
                  " must be on the same device");
    bool fits = grad->dim() == x.dim() && grad->size(0) == x.size(0) && grad->size(1) == channels;
    for (int64_t d = 2; fits && d < x.dim(); ++d) fits = grad->size(d) == x.size(d);
    LUNGKIT_CHECK(fits && grad->scalar_type() == x.scalar_type(), "attention_gate_backward: ", name,
                  " must be (B, ", channels, ", *S) in x's dtype for x ", shape_of(x), " in ",
                  toString(x.scalar_type()), ", got ", shape_of(*grad), " in ",
                  toString(grad->scalar_type()));
  };
  check(grad_out, "grad_out", x.size(1));
  check(grad_alpha, "grad_alpha", 1);
}

}  // namespace lungkit
