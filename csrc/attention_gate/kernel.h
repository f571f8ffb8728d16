// The CPU kernels of the attention gate: one chunk of voxels of one image.
#pragma once

#include <cstddef>
#include <cstdint>

#include <torch/headeronly/core/ScalarType.h>

#include "../support/isa.h"

namespace lungkit {

// One image (C, Z, Y, X) whose voxels lie in one constant step; channel_stride or voxel_stride is 1.
struct ImageView {
  const void* data = nullptr;
  int64_t channel_stride = 0;
  int64_t voxel_stride = 0;
};
struct MutableImageView {
  void* data = nullptr;
  int64_t channel_stride = 0;
  int64_t voxel_stride = 0;
};

// Linear interpolation along one axis: position p of the fine grid reads (1 - weight[p]) * coarse[lower[p]] +
// weight[p] * coarse[lower[p] + 1]; where the weight is 0 the second term may lie outside and is not read.
struct AxisView {
  int64_t fine;
  int64_t coarse;
  const int64_t* lower;
  const double* weight;
};

// What forward and backward share. Packed operands are in the type that the kernel computes with (float, or
// double for double) and in rows padded with zeros.
struct GateProblem {
  torch::headeronly::ScalarType type;
  int64_t x_channels;
  int64_t inner_channels;
  AxisView axes[3];  // z, y, x
  bool same_grid;    // phi lies at x's grid: nothing to interpolate
  int64_t tile_voxels;
  bool past_caches;      // write features around the caches, which they would fill
  const void* w_x;       // (padded_rows(Cx), padded_row(Ci)): the transposed weight
  const void* w_x_rows;  // (Ci, padded_row(Cx)); channels-last x only, for its gradient
  const void* w_psi;     // (padded_row(Ci))
  double b_psi;
};

struct GateForwardChunk {
  int64_t first_voxel;
  int64_t last_voxel;
  ImageView x;
  ImageView phi;
  MutableImageView out;
  void* alpha;  // of the image: alpha[v] is voxel v
};

struct GateBackwardChunk {
  int64_t first_voxel;
  int64_t last_voxel;
  ImageView x;
  ImageView phi;
  ImageView grad_out;         // data may be null: no gradient
  const void* grad_alpha;     // of the image, may be null
  MutableImageView grad_x;    // data null: not asked for
  MutableImageView grad_phi;  // likewise
  // Gradients of phi's planes that only this chunk touches are written at once. The first plane may also
  // receive from the chunk before, and the plane after the last one belongs to the chunk after: both are left
  // here, in rows padded as the inner channels are. Both null: the chunk is a whole image and writes every
  // plane.
  void* first_plane;
  void* next_plane;
  void* grad_w_x;  // (padded_rows(Cx), padded_row(Ci)), of this chunk; null: not asked for
  void* grad_psi;  // padded_row(Ci), then one for the bias; null: not asked for
};

inline constexpr int64_t padded_row(int64_t n) {
  return (n + 15) / 16 * 16;
}
inline constexpr int64_t padded_rows(int64_t n) {
  return (n + 3) / 4 * 4;
}

struct GateKernels {
  size_t (*scratch_bytes)(const GateProblem&);
  void (*forward)(const GateProblem&, const GateForwardChunk&, void* scratch);
  void (*backward)(const GateProblem&, const GateBackwardChunk&, void* scratch);
  // grad_phi[plane] = a + b, both in padded rows; b may be null.
  void (*store_plane)(const GateProblem&, const void* a, const void* b, int64_t plane,
                      MutableImageView grad_phi);
};

}  // namespace lungkit

LUNGKIT_DECLARE_KERNELS(GateKernels, gate_kernels)
