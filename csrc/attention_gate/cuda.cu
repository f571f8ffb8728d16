#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "cuda_launch.h"
#include "cuda_launch_rows.h"
#include "cuda_launch_tiles.h"
#include "cuda_weights.h"

namespace lungkit {
namespace {

// The half types go by rows (cuda_rows.h), float32 by tiles (cuda_tile.h). Both keep the features of some
// voxels and the sums of the weights' gradients on the chip; lungkit/ops/attention_gate.py takes the
// library's product and the fused tail for what is larger, for what this device has too little memory for,
// and for double.
void check_size(const GateArguments& a) {
  const ScalarType type = a.x.scalar_type();
  const bool is_half = type == ScalarType::Half || type == ScalarType::BFloat16;
  LUNGKIT_CHECK(is_half || type == ScalarType::Float,
                "attention_gate: the CUDA kernels take float32, float16 and bfloat16, got ", toString(type));
  const int64_t longest = std::max({a.fine[0], a.fine[1], a.fine[2]});
  LUNGKIT_CHECK(
      longest <= max_axis && a.x_layout.voxels <= max_image_voxels && a.x_layout.batch <= max_image_voxels,
      "attention_gate: the CUDA kernels take at most ", max_axis, " voxels along an axis and ",
      max_image_voxels, " an image, got ", shape_of(a.x));
  LUNGKIT_CHECK(a.x_layout.channels <= max_channels && a.phi_layout.channels <= max_inner,
                "attention_gate: the CUDA kernels take at most ", max_channels, " channels of x and ",
                max_inner, " inner channels, got ", a.x_layout.channels, " and ", a.phi_layout.channels);
  LUNGKIT_CHECK(!is_half || limits_of_current_device().capability >= 80,
                "attention_gate: the CUDA kernels take ", toString(type), " from compute capability 8.0 on");
}

// Calls body(size, by_voxel) with the kernels' template arguments.
template <class Body>
void dispatch_rows(const GateArguments& a, const Body& body) {
  using Small = std::integral_constant<int, 1>;
  using Large = std::integral_constant<int, 2>;
  const bool by_voxel = is_by_voxel(readable_layout(a.x));
  if (is_small(a)) return by_voxel ? body(Small{}, std::true_type{}) : body(Small{}, std::false_type{});
  return by_voxel ? body(Large{}, std::true_type{}) : body(Large{}, std::false_type{});
}

template <class Body>
void dispatch_half(ScalarType type, const Body& body) {
  type == ScalarType::Half ? body(Half{}) : body(BFloat16{});
}

std::tuple<Tensor, Tensor> attention_gate_cuda(const Tensor& x, const Tensor& phi, const Tensor& w_x,
                                               const Tensor& w_psi, const Tensor& b_psi, bool allow_tf32) {
  const GateArguments a = check_attention_gate(x, phi, w_x, w_psi, b_psi);
  LUNGKIT_CHECK(on_device(x), "attention_gate: x must be on the GPU");
  const DeviceGuard guard(x);
  Tensor out = new_features(a.x);
  Tensor alpha = new_map(a.x);
  if (alpha.numel() == 0) return {out, alpha};
  check_size(a);
  const GateWeights weights{as_float(w_x), as_float(w_psi), as_float(b_psi)};
  const auto run = [&](auto zero, const auto& launch) {
    using Stored = decltype(zero);
    launch(inputs_of<Stored>(a, weights), static_cast<Stored*>(out.mutable_data_ptr()), readable_layout(out),
           static_cast<Stored*>(alpha.mutable_data_ptr()));
  };
  if (x.scalar_type() != ScalarType::Float) {
    dispatch_half(x.scalar_type(), [&](auto zero) {
      using Stored = decltype(zero);
      run(zero, [&](const GateInputs<Stored>& in, Stored* to, const VoxelLayout& layout, Stored* map) {
        dispatch_rows(a, [&](auto size, auto by_voxel) {
          launch_rows_forward<Stored, decltype(size)::value, decltype(by_voxel)::value>(x, rows_of(in), to,
                                                                                        layout, map);
        });
      });
    });
    return {out, alpha};
  }
  const auto launch = [&](const auto& in, auto* to, const VoxelLayout& layout, auto* map) {
    launch_tiles_forward(x, in, to, layout, map);
  };
  allow_tf32 ? run(Tf32{}, launch) : run(float{}, launch);
  return {out, alpha};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor compute_backward(const GateArguments& a, const GateWeights& weights, const GateResults& results,
                        bool allow_tf32) {
  const ScalarType type = a.x.scalar_type();
  if (type == ScalarType::Float) {
    return allow_tf32 ? tiles_backward<Tf32>(a, weights, results)
                      : tiles_backward<float>(a, weights, results);
  }
  Tensor partial;
  dispatch_half(type, [&](auto zero) {
    dispatch_rows(a, [&](auto size, auto by_voxel) {
      partial = rows_backward<decltype(zero), decltype(size)::value, decltype(by_voxel)::value>(a, weights,
                                                                                                results);
    });
  });
  return partial;
}

Gradients attention_gate_backward_cuda(std::optional<Tensor> grad_out, std::optional<Tensor> grad_alpha,
                                       const Tensor& x, const Tensor& phi, const Tensor& w_x,
                                       const Tensor& w_psi, const Tensor& b_psi, bool needs_x, bool needs_phi,
                                       bool needs_w_x, bool needs_psi, bool allow_tf32) {
  const GateArguments a = check_attention_gate(x, phi, w_x, w_psi, b_psi);
  check_gate_gradients(grad_out, grad_alpha, x);
  LUNGKIT_CHECK(on_device(x), "attention_gate: x must be on the GPU");
  const DeviceGuard guard(x);
  const int64_t channels = a.x_layout.channels, inner = a.phi_layout.channels;
  const bool nothing = x.size(0) * a.x_layout.voxels == 0;
  const auto wanted = [&](bool needed, const std::vector<int64_t>& shape) {
    if (!needed) return torch::stable::new_empty(w_x, {0});
    return nothing ? torch::stable::new_zeros(w_x, shape) : torch::stable::new_empty(w_x, shape);
  };
  Tensor grad_x = needs_x ? new_features(a.x) : wanted(false, {});
  Tensor grad_phi = needs_phi ? new_features(a.phi) : wanted(false, {});
  Tensor grad_w_x = wanted(needs_w_x, {inner, channels});
  Tensor grad_w_psi = wanted(needs_psi, {inner});
  Tensor grad_b_psi = wanted(needs_psi, {1});
  const Gradients gradients{grad_x, grad_phi, grad_w_x, grad_w_psi, grad_b_psi};
  if (nothing) return gradients;
  check_size(a);

  if (grad_out) grad_out = in_order_of(a.x, *grad_out);
  if (grad_alpha) grad_alpha = torch::stable::contiguous(*grad_alpha);
  const GateWeights weights{as_float(w_x), as_float(w_psi), as_float(b_psi)};
  const bool needs_sums = needs_w_x || needs_psi;
  const Tensor partial = compute_backward(
      a, weights, {grad_out, grad_alpha, needs_x, needs_phi, needs_sums, grad_x, grad_phi}, allow_tf32);
  if (!needs_sums) return gradients;
  const int64_t width = inner * channels + inner + 1, blocks = partial.numel() / width;
  dispatch_floating(w_x.scalar_type(), "attention_gate", [&](auto zero) {
    using Weight = decltype(zero);
    LUNGKIT_LAUNCH((gate_weights_kernel<Weight>), static_cast<unsigned>(ceil_div(width, weights_columns)),
                   weights_columns * weights_slices, 0, current_stream(x),
                   static_cast<const float*>(partial.const_data_ptr()), static_cast<int>(blocks),
                   static_cast<int>(inner * channels), static_cast<int>(inner),
                   data_of<Weight>(grad_w_x, needs_w_x), data_of<Weight>(grad_w_psi, needs_psi),
                   data_of<Weight>(grad_b_psi, needs_psi));
  });
  return gradients;
}

}  // namespace

LUNGKIT_CUDA_LIBRARY(m) {
  m.impl("attention_gate", TORCH_BOX(&attention_gate_cuda));
  m.impl("attention_gate_backward", TORCH_BOX(&attention_gate_backward_cuda));
}

}  // namespace lungkit
