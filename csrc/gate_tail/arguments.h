// Checks that the CPU and the CUDA side of the gate's tail share.
#pragma once

#include "../support/check.h"
#include "../support/dispatch.h"
#include "../support/features.h"

namespace lungkit {

inline void check_same(const char* op, const char* first_name, const Tensor& first, const char* other_name,
                       const Tensor& other) {
  LUNGKIT_CHECK(on_same_device(first, other), op, ": ", first_name, " and ", other_name,
                " must be on the same device");
  LUNGKIT_CHECK(first.scalar_type() == other.scalar_type(), op, ": ", first_name, " is ",
                toString(first.scalar_type()), " but ", other_name, " is ", toString(other.scalar_type()));
}

inline bool have_same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

inline bool is_map_of(const Tensor& map, const Tensor& features) {
  bool fits = map.dim() == features.dim() && map.size(0) == features.size(0) && map.size(1) == 1;
  for (int64_t d = 2; fits && d < map.dim(); ++d) fits = map.size(d) == features.size(d);
  return fits;
}

inline void check_features(const char* op, const char* name, const Tensor& features) {
  LUNGKIT_CHECK(features.dim() == 4 || features.dim() == 5, op, ": ", name,
                " must be (B, C, Y, X) or (B, C, Z, Y, X), got ", shape_of(features));
  dispatch_floating(features.scalar_type(), op, [](auto) {});
}

inline void check_weight(const char* op, const Tensor& weight, const char* name, const Tensor& features) {
  LUNGKIT_CHECK(on_same_device(weight, features), op, ": ", name, " and weight must be on the same device");
  LUNGKIT_CHECK(weight.dim() == 1 && weight.size(0) == features.size(1), op, ": weight must be (C,) = (",
                features.size(1), ",) for ", name, " ", shape_of(features), ", got ", shape_of(weight));
  const ScalarType type = weight.scalar_type();
  LUNGKIT_CHECK(type == features.scalar_type() ||
                    (type == ScalarType::Float && features.scalar_type() != ScalarType::Double),
                op, ": weight must have the dtype of ", name, " (", toString(features.scalar_type()),
                "), or float32 where that is a half type, got ", toString(type));
}

inline void check_gate_psi(const Tensor& a, const Tensor& b, const Tensor& weight) {
  check_features("gate_psi", "a", a);
  LUNGKIT_CHECK(have_same_shape(a, b), "gate_psi: a and b must have the same shape, got ", shape_of(a),
                " and ", shape_of(b));
  check_same("gate_psi", "a", a, "b", b);
  check_weight("gate_psi", weight, "a", a);
}

inline void check_gate_psi_backward(const Tensor& grad_psi, const Tensor& q, const Tensor& weight) {
  check_features("gate_psi_backward", "q", q);
  LUNGKIT_CHECK(is_map_of(grad_psi, q), "gate_psi_backward: grad_psi must be (B, 1, *S) for q ", shape_of(q),
                ", got ", shape_of(grad_psi));
  check_same("gate_psi_backward", "q", q, "grad_psi", grad_psi);
  check_weight("gate_psi_backward", weight, "q", q);
}

inline void check_gate_scale(const Tensor& x, const Tensor& alpha) {
  check_features("gate_scale", "x", x);
  LUNGKIT_CHECK(is_map_of(alpha, x), "gate_scale: alpha must be (B, 1, *S) for x ", shape_of(x), ", got ",
                shape_of(alpha));
  check_same("gate_scale", "x", x, "alpha", alpha);
}

inline void check_gate_scale_backward(const Tensor& grad_out, const Tensor& x, const Tensor& alpha) {
  check_gate_scale(x, alpha);
  LUNGKIT_CHECK(have_same_shape(grad_out, x),
                "gate_scale_backward: grad_out and x must have the same shape, got ", shape_of(grad_out),
                " and ", shape_of(x));
  check_same("gate_scale_backward", "x", x, "grad_out", grad_out);
}

// An uninitialised map (B, 1, *S), or nothing.
inline Tensor new_map_if(bool needed, const Tensor& features) {
  return needed ? new_map(features) : torch::stable::new_empty(features, {0});
}

inline Tensor new_features_if(bool needed, const Tensor& like) {
  return needed ? new_features(like) : torch::stable::new_empty(like, {0});
}

}  // namespace lungkit
