#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../support/cuda_launch.h"
#include "../support/parallel.h"
#include "arguments.h"
#include "cuda_backward.h"
#include "cuda_forward.h"

namespace lungkit {
namespace {

constexpr int64_t max_blocks = 512;  // a constant, so that every device adds in the same order

// The kernels keep a tile's features and the sums of the weights' gradients on the chip.
// lungkit/ops/attention_gate.py takes the twin for what is larger, or double.
int size_class(const GateArguments& a) {
  const int64_t blocks = std::max(ceil_div(a.x_layout.channels, 32), ceil_div(a.phi_layout.channels, 16));
  const int64_t largest = a.x.scalar_type() == ScalarType::Float ? 2 : 4;
  const int64_t longest = std::max({a.fine[0], a.fine[1], a.fine[2]});
  LUNGKIT_CHECK(
      longest <= max_axis && a.x_layout.voxels <= max_image_voxels && a.x_layout.batch <= max_image_voxels,
      "attention_gate: the CUDA kernels take at most ", max_axis, " voxels along an axis and ",
      max_image_voxels, " an image, got ", shape_of(a.x));
  LUNGKIT_CHECK(blocks <= largest, "attention_gate: the CUDA kernels take at most ", 32 * largest,
                " channels of x and ", 16 * largest, " inner channels in this dtype, got ",
                a.x_layout.channels, " and ", a.phi_layout.channels);
  return blocks <= 1 ? 1 : blocks <= 2 ? 2 : 4;
}

template <class Body>
void dispatch_stored(ScalarType type, bool allow_tf32, Body&& body) {
  switch (type) {
    case ScalarType::Float: return allow_tf32 ? body(Tf32{}) : body(float{});
    case ScalarType::Half: return body(Half{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default:
      fail("attention_gate: the CUDA kernels take float32, float16 and bfloat16, got ", toString(type));
  }
}

Tensor as_float(const Tensor& parameter) {
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

// More than 48 KB of shared memory has to be asked for.
template <class Kernel>
void allow_shared_memory(Kernel kernel, size_t bytes) {
  int device = 0, most = 0;
  LUNGKIT_CUDA_CHECK(cudaGetDevice(&device));
  LUNGKIT_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  LUNGKIT_CHECK(bytes <= static_cast<size_t>(most), "attention_gate: a block needs ", bytes,
                " bytes of shared memory, this GPU has ", most);
  LUNGKIT_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

std::tuple<Tensor, Tensor> attention_gate_cuda(const Tensor& x, const Tensor& phi, const Tensor& w_x,
                                               const Tensor& w_psi, const Tensor& b_psi, bool allow_tf32) {
  const GateArguments a = check_attention_gate(x, phi, w_x, w_psi, b_psi);
  LUNGKIT_CHECK(on_device(x), "attention_gate: x must be on the GPU");
  const DeviceGuard guard(x);
  Tensor out = new_features(a.x);
  Tensor alpha = new_map(a.x);
  if (alpha.numel() == 0) return {out, alpha};
  size_class(a);
  const GateWeights weights{as_float(w_x), as_float(w_psi), as_float(b_psi)};
  dispatch_stored(a.x.scalar_type(), allow_tf32, [&](auto zero) {
    using Stored = decltype(zero);
    const GateInputs<Stored> in = inputs_of<Stored>(a, weights);
    const size_t bytes = GateForwardShared<Stored>::bytes(in.x_channels(), in.inner());
    allow_shared_memory(&gate_forward_kernel<Stored>, bytes);
    const int64_t tiles = ceil_div(a.x_layout.voxels, tile_voxels) * a.x_layout.batch;
    LUNGKIT_LAUNCH((gate_forward_kernel<Stored>), static_cast<unsigned>(std::min<int64_t>(tiles, 1 << 16)),
                   gate_threads, bytes, current_stream(x), in, static_cast<Stored*>(out.mutable_data_ptr()),
                   readable_layout(out), static_cast<Stored*>(alpha.mutable_data_ptr()));
  });
  return {out, alpha};
}

// Boxes small enough for two open planes in 32 KB and for several boxes a multiprocessor, large enough that
// few voxels belong to two.
BoxGrid plan_boxes(const GateArguments& a, bool needs_phi) {
  constexpr int64_t enough_boxes = 256;
  constexpr int run_voxels = 8 * tile_voxels;
  BoxGrid grid{a.fine != a.coarse && needs_phi, {1, 1, run_voxels}, {1, 1, 1}};
  if (!grid.interpolates) {
    grid.boxes[2] = static_cast<int>(ceil_div(a.x_layout.voxels, run_voxels));
    return grid;
  }
  const int coarse[3] = {static_cast<int>(a.coarse[0]), static_cast<int>(a.coarse[1]),
                         static_cast<int>(a.coarse[2])};
  const int cells = (32 << 10) / static_cast<int>(2 * sizeof(float) * a.phi_layout.channels);
  grid.box[2] = std::min(coarse[2], cells);
  grid.box[1] = std::clamp(cells / grid.box[2], 1, std::min(coarse[1], 4));
  grid.box[0] = std::min(coarse[0], 8);
  const auto count = [&] {
    for (int d = 0; d < 3; ++d) grid.boxes[d] = static_cast<int>(ceil_div(coarse[d], grid.box[d]));
    return grid.per_image() * a.x_layout.batch;
  };
  for (int d = 0; d < 2; ++d) {
    while (count() < enough_boxes && grid.box[d] > 2) grid.box[d] /= 2;
  }
  count();
  return grid;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Stored, int size>
void launch_backward(const GateArguments& a, const GateWeights& weights, const GateGradients<Stored>& out,
                     const BoxGrid& grid, int64_t blocks) {
  const GateInputs<Stored> in = inputs_of<Stored>(a, weights);
  const size_t bytes = GateBackwardShared<Stored>::bytes(in.x_channels(), in.inner(), grid);
  allow_shared_memory(&gate_backward_kernel<Stored, size>, bytes);
  LUNGKIT_LAUNCH((gate_backward_kernel<Stored, size>), static_cast<unsigned>(blocks), gate_threads, bytes,
                 current_stream(a.x), in, out, grid);
}

Gradients attention_gate_backward_cuda(std::optional<Tensor> grad_out, std::optional<Tensor> grad_alpha,
                                       const Tensor& x, const Tensor& phi, const Tensor& w_x,
                                       const Tensor& w_psi, const Tensor& b_psi, bool needs_x, bool needs_phi,
                                       bool needs_w_x, bool needs_psi, bool allow_tf32) {
  const GateArguments a = check_attention_gate(x, phi, w_x, w_psi, b_psi);
  LUNGKIT_CHECK(on_device(x), "attention_gate: x must be on the GPU");
  const DeviceGuard guard(x);
  const int64_t channels = a.x_layout.channels, inner = a.phi_layout.channels;
  const auto wanted = [&](bool needed, const std::vector<int64_t>& shape) {
    return torch::stable::new_zeros(w_x, needed ? shape : std::vector<int64_t>{0});
  };
  Tensor grad_x = needs_x ? new_features(a.x) : wanted(false, {});
  Tensor grad_phi = needs_phi ? new_features(a.phi) : wanted(false, {});
  Tensor grad_w_x = wanted(needs_w_x, {inner, channels});
  Tensor grad_w_psi = wanted(needs_psi, {inner});
  Tensor grad_b_psi = wanted(needs_psi, {1});
  const Gradients gradients{grad_x, grad_phi, grad_w_x, grad_w_psi, grad_b_psi};
  if (x.size(0) * a.x_layout.voxels == 0) return gradients;

  if (grad_out) grad_out = with_unit_stride(*grad_out);
  if (grad_alpha) grad_alpha = torch::stable::contiguous(*grad_alpha);
  const GateWeights weights{as_float(w_x), as_float(w_psi), as_float(b_psi)};
  const BoxGrid grid = plan_boxes(a, needs_phi);
  const int64_t blocks = std::min(grid.per_image() * a.x_layout.batch, max_blocks);
  const int64_t width = inner * channels + inner + 1;
  const bool sums = needs_w_x || needs_psi;
  const Tensor partial = torch::stable::new_empty(weights.w_x, {sums ? blocks * width : 0});
  dispatch_stored(a.x.scalar_type(), allow_tf32, [&](auto zero) {
    using Stored = decltype(zero);
    const auto data = [](const Tensor& tensor) { return static_cast<Stored*>(tensor.mutable_data_ptr()); };
    const GateGradients<Stored> out{
        .grad_out = grad_out ? static_cast<const Stored*>(grad_out->const_data_ptr()) : nullptr,
        .grad_alpha = grad_alpha ? static_cast<const Stored*>(grad_alpha->const_data_ptr()) : nullptr,
        .grad_x = needs_x ? data(grad_x) : nullptr,
        .grad_phi = needs_phi ? data(grad_phi) : nullptr,
        .partial = sums ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr,
        .grad_out_layout = grad_out ? readable_layout(*grad_out) : VoxelLayout{},
        .grad_x_layout = needs_x ? readable_layout(grad_x) : VoxelLayout{},
        .grad_phi_layout = needs_phi ? readable_layout(grad_phi) : VoxelLayout{}};
    switch (size_class(a)) {
      case 1: return launch_backward<Stored, 1>(a, weights, out, grid, blocks);
      case 2: return launch_backward<Stored, 2>(a, weights, out, grid, blocks);
      default:
        if constexpr (is_half_type<Stored>) return launch_backward<Stored, 4>(a, weights, out, grid, blocks);
    }
  });
  if (!sums) return gradients;
  dispatch_floating(w_x.scalar_type(), "attention_gate", [&](auto zero) {
    using Weight = decltype(zero);
    const auto data = [](const Tensor& tensor, bool needed) {
      return needed ? static_cast<Weight*>(tensor.mutable_data_ptr()) : nullptr;
    };
    LUNGKIT_LAUNCH((gate_weights_kernel<Weight>), static_cast<unsigned>(ceil_div(width, gate_threads)),
                   gate_threads, 0, current_stream(x), static_cast<const float*>(partial.const_data_ptr()),
                   static_cast<int>(blocks), inner * channels, inner, data(grad_w_x, needs_w_x),
                   data(grad_w_psi, needs_psi), data(grad_b_psi, needs_psi));
  });
  return gradients;
}

}  // namespace

LUNGKIT_CUDA_LIBRARY(m) {
  m.impl("attention_gate", TORCH_BOX(&attention_gate_cuda));
  m.impl("attention_gate_backward", TORCH_BOX(&attention_gate_backward_cuda));
}

}  // namespace lungkit
