// Launches of the half types' kernels.
#pragma once

#include <algorithm>
#include <utility>

#include "cuda_adjoint.h"
#include "cuda_launch.h"
#include "cuda_rows_backward.h"
#include "cuda_rows_forward.h"

namespace lungkit {

constexpr int64_t enough_adjoint_threads = 50'000;

inline bool is_by_voxel(const VoxelLayout& layout) {
  return layout.voxel_stride != 1;
}

// Whether rows of `columns` elements, `row_step` apart, all start on 16 bytes and are whole pieces of 16.
inline bool are_pieces(const void* data, const VoxelLayout& layout, int64_t width, int64_t element_bytes) {
  const int64_t piece = 16 / element_bytes;
  const bool by_voxel = is_by_voxel(layout);
  const int64_t columns = by_voxel ? layout.channels : width;
  const int64_t step = by_voxel ? layout.voxel_stride : layout.channel_stride;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && columns % piece == 0 && step % piece == 0 &&
         layout.batch_stride % piece == 0;
}

// The half types' view: a 2D image is one plane of rows.
template <class Stored>
GateInputs<Stored> rows_of(GateInputs<Stored> in) {
  if (in.axes[1].fine == 1) std::swap(in.axes[0], in.axes[1]);
  return in;
}

// Weights along an axis are multiples of 1 / (2 * its ratio); with whole ratios that are powers of two a
// product of those of several axes is a whole multiple, below 256, of a power of two: no more bits than
// bfloat16 has.
inline bool has_exact_weights(const GateAxis* first, const GateAxis* end) {
  int steps = 1;
  for (; first != end; ++first) {
    const GateAxis& axis = *first;
    const int ratio = axis.fine / axis.coarse;
    if (axis.fine % axis.coarse != 0 || (ratio & (ratio - 1)) != 0) return false;
    steps *= ratio == 1 ? 1 : 2 * ratio - 1;
  }
  return steps <= 256;
}

// Whether what a lane loads of phi at once is aligned: `word` elements.
template <class Stored, int size, bool by_voxel>
bool has_phi_words(const GateInputs<Stored>& in, int64_t word = by_voxel ? 2 * size : 2) {
  const VoxelLayout& phi = in.phi_layout;
  if (is_by_voxel(phi) != by_voxel) return false;
  return reinterpret_cast<uintptr_t>(in.phi) % (2 * word) == 0 && phi.batch_stride % word == 0 &&
         (by_voxel ? phi.channels : in.axes[2].coarse) % word == 0 &&
         (by_voxel ? phi.voxel_stride : phi.channel_stride) % word == 0;
}

template <class Stored, int size, bool by_voxel>
RowGrid row_grid(const GateInputs<Stored>& in) {
  const GateAxis& along_x = in.axes[2];
  const int64_t per_row = ceil_div(along_x.fine, run_voxels);
  const int64_t runs = per_row * in.axes[0].fine * in.axes[1].fine * in.images();
  LUNGKIT_CHECK(runs <= max_runs, "attention_gate: the CUDA kernels take at most ", max_runs,
                " runs of 32 voxels, got ", runs);
  const bool fits = has_phi_words<Stored, size, by_voxel>(in) &&
                    in.phi_layout.voxel_stride * along_x.coarse <= max_runs;  // offsets in a row are ints
  return {.runs = static_cast<int>(runs),
          .z = RowAxis(in.axes[0]),
          .y = RowAxis(in.axes[1]),
          .x = RowAxis(along_x),
          .height = Divisor(in.axes[1].fine),
          .runs_per_row = Divisor(static_cast<int>(per_row)),
          .depth = Divisor(in.axes[0].fine),
          // PhiRows interpolates along z and y in float.
          .fast = fits && 2 * along_x.coarse <= along_x.fine &&
                  has_exact_weights(in.axes + (by_voxel ? 0 : 2), in.axes + 3),
          .phi_pieces = has_phi_words<Stored, size, by_voxel>(in, 4),
          .x_pieces = are_pieces(in.x, in.x_layout, along_x.fine, sizeof(Stored))};
}

template <class Stored, int size, bool by_voxel>
void launch_rows_forward(const Tensor& x, const GateInputs<Stored>& in, Stored* out,
                         const VoxelLayout& out_layout, Stored* alpha) {
  constexpr size_t bytes = sizeof(RowsForwardShared<Stored, size, by_voxel>);
  const RowGrid grid = row_grid<Stored, size, by_voxel>(in);
  allow_shared_memory<&gate_rows_forward_kernel<Stored, size, by_voxel>>("attention_gate", bytes);
  const int64_t resident = int64_t{limits_of_current_device().multiprocessors} * rows_forward_blocks<size>;
  const int64_t blocks = std::min<int64_t>(ceil_div(grid.runs, row_warps), resident);
  LUNGKIT_LAUNCH((gate_rows_forward_kernel<Stored, size, by_voxel>), static_cast<unsigned>(blocks),
                 gate_threads, bytes, current_stream(x), in, grid, out, out_layout, alpha);
}

template <class Stored>
using AdjointKernel = void (*)(AdjointTask<Stored>);

// For grids that differ by 2, and by 2 or not at all along z and y.
template <class Stored, bool by_voxel>
AdjointKernel<Stored> halving_adjoint_kernel(bool halves_z, bool halves_y) {
  if (halves_z) {
    return halves_y ? &gate_halving_adjoint_kernel<Stored, by_voxel, true, true>
                    : &gate_halving_adjoint_kernel<Stored, by_voxel, true, false>;
  }
  return halves_y ? &gate_halving_adjoint_kernel<Stored, by_voxel, false, true>
                  : &gate_halving_adjoint_kernel<Stored, by_voxel, false, false>;
}

template <class Stored, bool by_voxel>
void launch_adjoint(const GateArguments& a, const Tensor& grad_phi, const Tensor& fine, int row_stride,
                    int voxel_stride) {
  const VoxelLayout to = readable_layout(grad_phi);
  AdjointTask<Stored> task{
      .fine = static_cast<const Stored*>(fine.const_data_ptr()),
      .coarse = static_cast<Stored*>(grad_phi.mutable_data_ptr()),
      .coarse_layout = to,
      .axes = {},
      .row_stride = row_stride,
      .voxel_stride = voxel_stride,
      .pieces = is_by_voxel(to) && are_pieces(grad_phi.const_data_ptr(), to, a.coarse[2], sizeof(Stored)),
      .planes = 0,
      .segments = 0,
      .threads = 0};
  for (int d = 0; d < 3; ++d) task.axes[d] = {static_cast<int>(a.fine[d]), static_cast<int>(a.coarse[d])};
  const auto halves = [&](int d) { return a.fine[d] == 2 * a.coarse[d]; };
  const auto halves_or_equals = [&](int d) { return halves(d) || a.fine[d] == a.coarse[d]; };
  const bool halving = halves(2) && halves_or_equals(0) && halves_or_equals(1);
  const int64_t columns = halving && !by_voxel ? ceil_div(a.coarse[2], 4) : a.coarse[2];
  const int64_t groups = by_voxel ? ceil_div(to.channels, 8) : to.channels;
  // The more planes a thread takes the fewer it reads twice; every multiprocessor needs some threads.
  for (int planes = 8; planes == 8 || (planes >= 2 && task.threads < enough_adjoint_threads); planes /= 2) {
    task.planes = planes;
    task.segments = static_cast<int>(ceil_div(a.coarse[0], planes));
    task.threads = to.batch * task.segments * groups * a.coarse[1] * columns;
  }
  LUNGKIT_CHECK(task.threads <= max_runs, "attention_gate: phi ", shape_of(grad_phi),
                " is too large for the CUDA kernels");
  const AdjointKernel<Stored> kernel = halving
                                           ? halving_adjoint_kernel<Stored, by_voxel>(halves(0), halves(1))
                                           : &gate_adjoint_kernel<Stored, by_voxel>;
  LUNGKIT_LAUNCH((kernel), static_cast<unsigned>(ceil_div(task.threads, adjoint_threads)), adjoint_threads, 0,
                 current_stream(grad_phi), task);
}

template <class Stored, int size, bool by_voxel>
Tensor rows_backward(const GateArguments& a, const GateWeights& weights, const GateResults& results) {
  const GateInputs<Stored> in = rows_of(inputs_of<Stored>(a, weights));
  const int64_t channels = in.x_channels(), inner = in.inner();
  RowGrid grid = row_grid<Stored, size, by_voxel>(in);
  if (results.grad_out) {
    grid.x_pieces =
        grid.x_pieces && are_pieces(results.grad_out->const_data_ptr(), readable_layout(*results.grad_out),
                                    in.axes[2].fine, sizeof(Stored));
  }
  // The gradient of up(phi) lies as x does; on equal grids it is phi's, if that lies so too.
  const bool direct = results.needs_phi && a.fine == a.coarse &&
                      is_by_voxel(readable_layout(results.grad_phi)) == by_voxel &&
                      (!by_voxel || inner % (2 * size) == 0);
  const bool needs_adjoint = results.needs_phi && !direct;
  const int64_t rows = int64_t{in.axes[0].fine} * in.axes[1].fine, width = in.axes[2].fine;
  const auto padded = [&](int64_t n) { return direct ? n : ceil_div(n, 8) * 8; };
  const int64_t voxel_stride = by_voxel ? padded(inner) : 0;
  const int64_t row_stride = by_voxel ? width * voxel_stride : padded(width);
  const int64_t image_stride = rows * row_stride * (by_voxel ? 1 : inner);
  const Tensor fine = torch::stable::new_empty(a.phi, {needs_adjoint ? in.images() * image_stride : 0});
  ThetaGradient<Stored> theta{.data = nullptr,
                              .image_stride = image_stride,
                              .channel_stride = rows * row_stride,
                              .row_stride = static_cast<int>(row_stride),
                              .voxel_stride = static_cast<int>(voxel_stride),
                              .pieces = row_stride % 8 == 0};
  if (results.needs_phi) theta.data = data_of<Stored>(direct ? results.grad_phi : fine, true);

  const unsigned blocks = rows_backward_blocks;
  const Tensor partial = torch::stable::new_empty(
      weights.w_x, {results.needs_sums ? int64_t{blocks} * (inner * channels + inner + 1) : 0});
  const RowsGradients<Stored> out{
      .grad_out = data_of<Stored>(results.grad_out),
      .grad_alpha = data_of<Stored>(results.grad_alpha),
      .grad_x = data_of<Stored>(results.grad_x, results.needs_x),
      .partial = data_of<float>(partial, results.needs_sums),
      .grad_out_layout = results.grad_out ? readable_layout(*results.grad_out) : VoxelLayout{},
      .grad_x_layout = results.needs_x ? readable_layout(results.grad_x) : VoxelLayout{},
      .theta = theta};
  constexpr size_t bytes = sizeof(RowsBackwardShared<Stored, size, by_voxel>);
  allow_shared_memory<&gate_rows_backward_kernel<Stored, size, by_voxel>>("attention_gate", bytes);
  LUNGKIT_LAUNCH((gate_rows_backward_kernel<Stored, size, by_voxel>), blocks, gate_threads, bytes,
                 current_stream(a.x), in, out, grid);
  if (needs_adjoint) {
    launch_adjoint<Stored, by_voxel>(a, results.grad_phi, fine, theta.row_stride, theta.voxel_stride);
  }
  return partial;
}

}  // namespace lungkit
