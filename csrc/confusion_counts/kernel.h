// The CPU kernel of confusion_counts: one chunk of voxels of one image.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/headeronly/core/ScalarType.h>

#include "../support/isa.h"

namespace lungkit {

// Class indices travel as 16-bit codes; the two highest mark voxels that are not counted.
using ClassCode = uint16_t;
inline constexpr ClassCode ignored_code = 0xffff;
inline constexpr ClassCode invalid_code = 0xfffe;
inline constexpr int64_t max_classes = 0xfffe;

struct ConfusionChunk {
  const void* pred;  // first voxel of the chunk; logits of channel 0, or class indices
  const void* labels;
  torch::headeronly::ScalarType pred_type;
  torch::headeronly::ScalarType label_type;
  int64_t voxels;
  int64_t pred_channels;  // 0: pred holds class indices
  int64_t pred_channel_stride;
  int64_t pred_voxel_stride;
  int64_t label_voxel_stride;
  int64_t num_classes;
  std::optional<int64_t> ignore_index;
};

struct ConfusionKernels {
  // Adds the chunk's TP, FP, FN of every class to counts (num_classes, 3), which starts at zero, and returns
  // the voxels counted, or -1 where a counted voxel has a class index outside 0 .. num_classes - 1.
  int64_t (*count)(const ConfusionChunk& chunk, int64_t* counts);
};

}  // namespace lungkit

LUNGKIT_DECLARE_KERNELS(ConfusionKernels, confusion_kernels)
