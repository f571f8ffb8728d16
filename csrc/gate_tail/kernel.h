// The CPU kernels of the gate's tail: one chunk of voxels of one image.
#pragma once

#include <cstdint>

#include <torch/headeronly/core/ScalarType.h>

#include "../support/isa.h"

namespace lungkit {

// From the first voxel of the chunk on. Features lie in one order of memory: channel_stride or voxel_stride
// is 1. Maps have one value a voxel, side by side. Null where a gradient is not asked for.
struct TailChunk {
  torch::headeronly::ScalarType type;
  int64_t channels;
  int64_t voxels;
};

struct TailFeatures {
  const void* data;
  int64_t channel_stride;
  int64_t voxel_stride;
};
struct MutableTailFeatures {
  void* data;
  int64_t channel_stride;
  int64_t voxel_stride;
};

// A row of weights, or of their gradients, ends on a whole vector of any instruction set.
inline constexpr int64_t padded_channels(int64_t n) {
  return (n + 15) / 16 * 16;
}

// Weights and their gradients are in the type that the kernels compute with: float, or double for double.
struct TailKernels {
  void (*psi)(const TailChunk&, TailFeatures a, TailFeatures b, const void* weight, void* psi,
              MutableTailFeatures q);
  void (*psi_backward)(const TailChunk&, const void* grad_psi, TailFeatures q, const void* weight,
                       MutableTailFeatures grad_features, void* grad_weight);
  void (*scale)(const TailChunk&, TailFeatures x, const void* alpha, MutableTailFeatures out);
  void (*scale_backward)(const TailChunk&, TailFeatures grad_out, TailFeatures x, const void* alpha,
                         MutableTailFeatures grad_x, void* grad_alpha);
};

}  // namespace lungkit

LUNGKIT_DECLARE_KERNELS(TailKernels, tail_kernels)
