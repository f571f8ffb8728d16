// Launches of the kernels for float32.
#pragma once

#include <algorithm>

#include "cuda_backward.h"
#include "cuda_forward.h"
#include "cuda_launch.h"

namespace lungkit {

constexpr int64_t max_tile_blocks = 512;  // a constant, so that every device adds in the same order

template <class Stored>
void launch_tiles_forward(const Tensor& x, const GateInputs<Stored>& in, Stored* out,
                          const VoxelLayout& out_layout, Stored* alpha) {
  const size_t bytes = GateForwardShared<Stored>::bytes(in.x_channels(), in.inner());
  allow_shared_memory<&gate_tiles_forward_kernel<Stored>>("attention_gate", bytes);
  const int64_t tiles = ceil_div(in.x_layout.voxels, tile_voxels) * in.x_layout.batch;
  LUNGKIT_LAUNCH((gate_tiles_forward_kernel<Stored>),
                 static_cast<unsigned>(std::min<int64_t>(tiles, 1 << 16)), gate_threads, bytes,
                 current_stream(x), in, out, out_layout, alpha);
}

// Boxes of at most `cells` of a plane of phi, small enough for several boxes a multiprocessor, large enough
// that few voxels belong to two.
inline BoxGrid plan_boxes(const GateArguments& a, bool needs_phi, int cells) {
  constexpr int64_t enough_boxes = 256;
  constexpr int run_voxels = 8 * tile_voxels;
  BoxGrid grid{a.fine != a.coarse && needs_phi, {1, 1, run_voxels}, {1, 1, 1}};
  if (!grid.interpolates) {
    grid.boxes[2] = static_cast<int>(ceil_div(a.x_layout.voxels, run_voxels));
    return grid;
  }
  const int coarse[3] = {static_cast<int>(a.coarse[0]), static_cast<int>(a.coarse[1]),
                         static_cast<int>(a.coarse[2])};
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

// What a box needs for each of its cells, two planes of all inner channels; 4 bytes more where it is one row.
constexpr int64_t cell_bytes(int64_t inner) {
  return static_cast<int64_t>(2 * sizeof(float)) * inner;
}
constexpr int64_t fewest_cells = 8;  // with fewer, most of the work would be done twice

template <class Stored, int size>
void launch_tiles_backward(const Tensor& x, const GateInputs<Stored>& in, const GateGradients<Stored>& out,
                           const BoxGrid& grid, int64_t blocks) {
  const size_t bytes = GateBackwardShared<Stored>::bytes(in.x_channels(), in.inner(), grid);
  allow_shared_memory<&gate_boxes_backward_kernel<Stored, size>>("attention_gate", bytes);
  LUNGKIT_LAUNCH((gate_boxes_backward_kernel<Stored, size>), static_cast<unsigned>(blocks), gate_threads,
                 bytes, current_stream(x), in, out, grid);
}

// Each returns the blocks' parts of the gradients of the weights, (blocks, Ci * Cx + Ci + 1).
template <class Stored>
Tensor tiles_backward(const GateArguments& a, const GateWeights& weights, const GateResults& results) {
  // A gradient of phi takes the shared memory that is left, at most 32 KB, for two planes of a box.
  const GateInputs<Stored> in = inputs_of<Stored>(a, weights);
  const int64_t channels = in.x_channels(), inner = in.inner();
  const int64_t rest =
      static_cast<int64_t>(GateBackwardShared<Stored>::bytes(in.x_channels(), in.inner(), {}));
  const int64_t left = limits_of_current_device().shared_bytes - rest;
  const int64_t cells = std::min((32 << 10) / cell_bytes(inner), (left - 32) / (cell_bytes(inner) + 4));
  LUNGKIT_CHECK(!results.needs_phi || cells >= fewest_cells, "attention_gate: this GPU has ",
                limits_of_current_device().shared_bytes,
                " bytes of shared memory a block, too few for the backward pass of ", channels,
                " channels of x and ", inner, " inner channels in float32");
  const BoxGrid grid = plan_boxes(a, results.needs_phi, static_cast<int>(cells));
  const int64_t blocks = std::min(grid.per_image() * a.x_layout.batch, max_tile_blocks);
  const Tensor partial = torch::stable::new_empty(
      weights.w_x, {results.needs_sums ? blocks * (inner * channels + inner + 1) : 0});
  const GateGradients<Stored> out{
      .grad_out = data_of<Stored>(results.grad_out),
      .grad_alpha = data_of<Stored>(results.grad_alpha),
      .grad_x = data_of<Stored>(results.grad_x, results.needs_x),
      .grad_phi = data_of<Stored>(results.grad_phi, results.needs_phi),
      .partial = data_of<float>(partial, results.needs_sums),
      .grad_out_layout = results.grad_out ? readable_layout(*results.grad_out) : VoxelLayout{},
      .grad_x_layout = results.needs_x ? readable_layout(results.grad_x) : VoxelLayout{},
      .grad_phi_layout = results.needs_phi ? readable_layout(results.grad_phi) : VoxelLayout{}};
  if (is_small(a)) {
    launch_tiles_backward<Stored, 1>(a.x, in, out, grid, blocks);
  } else {
    launch_tiles_backward<Stored, 2>(a.x, in, out, grid, blocks);
  }
  return partial;
}

}  // namespace lungkit
