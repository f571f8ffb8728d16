// The CPU kernels of dice_ce: one chunk of voxels of one image.
#pragma once

#include <cstddef>
#include <cstdint>

#include <torch/headeronly/core/ScalarType.h>

#include "../support/isa.h"
#include "options.h"

namespace lungkit {

struct DiceCeChunk {
  const void* logits;  // of class 0 at the first voxel of the chunk, as are all pointers here
  const void* labels;
  const uint8_t* mask;  // 0 where a voxel does not count; null where all do
  torch::headeronly::ScalarType logits_type;
  torch::headeronly::ScalarType labels_type;
  int64_t logits_channel_stride;
  int64_t logits_voxel_stride;
  int64_t labels_channel_stride;
  int64_t labels_voxel_stride;
  int64_t mask_voxel_stride;
  int64_t voxels;
  int64_t classes;
  bool class_indices;  // labels hold one class index a voxel, else a vector
  DiceCeOptions options;
  void* scratch;  // scratch_bytes of it, the chunk's own
};

struct DiceCeKernels {
  size_t (*scratch_bytes)(const DiceCeChunk& chunk);

  // Writes the chunk's sums (statistic_rows, classes); false where a class index that counts is out of range.
  bool (*sums)(const DiceCeChunk& chunk, double* sums);

  // Writes the gradient of the chunk's logits; `slopes` (statistic_rows, classes) is the gradient of its
  // sums, and `gradient` is laid out by the strides given, in the logits' dtype.
  void (*gradient)(const DiceCeChunk& chunk, const double* slopes, void* gradient, int64_t channel_stride,
                   int64_t voxel_stride);
};

}  // namespace lungkit

LUNGKIT_DECLARE_KERNELS(DiceCeKernels, dice_ce_kernels)
