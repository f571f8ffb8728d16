// Features (B, C, *S) as the kernels read and write them: channels-first or channels-last, without a copy.
#pragma once

#include <vector>

#include <torch/csrc/stable/ops.h>

#include "layout.h"

namespace lungkit {

// Channels-last: the channels of a voxel lie side by side. Everything else is read as channels-first.
inline bool is_by_voxel(const Tensor& tensor) {
  return tensor.size(1) > 1 && tensor.stride(1) == 1 && has_flat_voxels(tensor, 2) &&
         voxel_stride_of(tensor, 2) != 1;
}

// `tensor` itself where the kernels can read it as it is, else a copy.
inline Tensor with_unit_stride(const Tensor& tensor) {
  const bool readable =
      has_flat_voxels(tensor, 2) && (voxel_stride_of(tensor, 2) == 1 || is_by_voxel(tensor));
  return readable ? tensor : torch::stable::contiguous(tensor);
}

// An uninitialised tensor of `like`'s shape, channels-last where `like` is.
inline Tensor new_features(const Tensor& like) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < like.dim(); ++d) shape.push_back(like.size(d));
  if (!is_by_voxel(like)) return torch::stable::new_empty(like, shape);
  shape.erase(shape.begin() + 1);
  shape.push_back(like.size(1));
  Tensor features = torch::stable::new_empty(like, shape);
  for (int64_t d = like.dim() - 1; d > 1; --d) features = torch::stable::transpose(features, d - 1, d);
  return features;
}

// An uninitialised map (B, 1, *S) beside features (B, C, *S).
inline Tensor new_map(const Tensor& features) {
  std::vector<int64_t> shape{features.size(0), 1};
  for (int64_t d = 2; d < features.dim(); ++d) shape.push_back(features.size(d));
  return torch::stable::new_empty(features, shape);
}

// The strides of features that with_unit_stride() returned; a voxel stride of 1 says that they are
// channels-first.
inline VoxelLayout readable_layout(const Tensor& features) {
  VoxelLayout layout = channel_layout(features);
  if (!is_by_voxel(features)) layout.voxel_stride = 1;
  return layout;
}

// `grad` as the kernels read it beside x: in x's order of memory.
inline Tensor in_order_of(const Tensor& x, const Tensor& grad) {
  using torch::headeronly::MemoryFormat;
  const Tensor readable = with_unit_stride(grad);
  if (is_by_voxel(readable) == is_by_voxel(x)) return readable;
  if (!is_by_voxel(x)) return torch::stable::contiguous(readable);
  if (x.dim() == 3) {  // PyTorch names no memory format for (B, C, X)
    const Tensor turned = torch::stable::contiguous(torch::stable::transpose(readable, 1, 2));
    return torch::stable::transpose(turned, 1, 2);
  }
  return torch::stable::contiguous(readable,
                                   x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
}

}  // namespace lungkit
