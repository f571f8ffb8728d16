// How a tensor (B, C, *S) lies in memory, so that kernels read channels-first and channels-last without a
// copy.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace lungkit {

using torch::stable::Tensor;

// Element (b, c, v) of a (B, C, *S) tensor, v the flat index of a voxel, lies at
// b * batch_stride + c * channel_stride + v * voxel_stride.
struct VoxelLayout {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t voxels = 0;
  int64_t batch_stride = 0;
  int64_t channel_stride = 0;
  int64_t voxel_stride = 1;
};

// True where the spatial axes, from `first_spatial` on, walk memory in one constant step.
inline bool has_flat_voxels(const Tensor& tensor, int64_t first_spatial) {
  int64_t expected = -1;
  for (int64_t d = tensor.dim() - 1; d >= first_spatial; --d) {
    if (tensor.size(d) == 1) continue;
    if (expected >= 0 && tensor.stride(d) != expected) return false;
    expected = tensor.stride(d) * tensor.size(d);
  }
  return true;
}

inline int64_t voxel_stride_of(const Tensor& tensor, int64_t first_spatial) {
  for (int64_t d = tensor.dim() - 1; d >= first_spatial; --d) {
    if (tensor.size(d) != 1) return tensor.stride(d);
  }
  return 1;
}

// `tensor` itself where its voxels lie in one constant step, else a contiguous copy.
inline Tensor with_flat_voxels(const Tensor& tensor, int64_t first_spatial) {
  return has_flat_voxels(tensor, first_spatial) ? tensor : torch::stable::contiguous(tensor);
}

// Layout of (B, C, *S); call with_flat_voxels(tensor, 2) first.
inline VoxelLayout channel_layout(const Tensor& tensor) {
  VoxelLayout layout{tensor.size(0),   tensor.size(1),   1,
                     tensor.stride(0), tensor.stride(1), voxel_stride_of(tensor, 2)};
  for (int64_t d = 2; d < tensor.dim(); ++d) layout.voxels *= tensor.size(d);
  return layout;
}

// Layout of labels (B, *S) or (B, 1, *S) beside logits of `dims` axes; call with_flat_voxels first.
inline VoxelLayout label_layout(const Tensor& labels, int64_t dims) {
  const int64_t first_spatial = labels.dim() == dims ? 2 : 1;
  VoxelLayout layout{labels.size(0), 1, 1, labels.stride(0), 0, voxel_stride_of(labels, first_spatial)};
  for (int64_t d = first_spatial; d < labels.dim(); ++d) layout.voxels *= labels.size(d);
  return layout;
}

}  // namespace lungkit
