// The CPU kernels of the norm: one run of elements that lie side by side.
#pragma once

#include <cstdint>

#include <torch/headeronly/core/ScalarType.h>

#include "../support/isa.h"

namespace lungkit {

// Element i of a run is of channel i % channels: a run of a channels-first image is part of one channel, one
// of a channels-last image holds whole voxels. What is known of each channel is laid out in `slots` numbers,
// a common multiple of the channels and of a vector's lanes, so that a vector of the run meets a vector of
// them. They are in the type that the kernels compute with: float, or double for double.
struct NormRun {
  torch::headeronly::ScalarType type;
  int64_t count;
  int64_t slots;
  const void* x;
};

// Of each slot: normalised = (x - mean) scale + shift.
struct NormAffine {
  const void* mean;
  const void* scale;
  const void* shift;
};

struct NormForward {
  NormAffine affine;
  const void* residual;  // null where there is none
  double slope;
  void* y;
};

// The activation's sign is y's where y is given, else it is computed anew.
struct NormGradient {
  NormAffine affine;
  const void* grad_y;
  const void* y;
  double slope;
};

// grad_x = to_gradient g - constant - (x - mean) to_x, with g the gradient before the activation.
struct NormInputGradient {
  const void* to_gradient;
  const void* constant;
  const void* to_x;
  void* grad_x;
  void* grad_residual;  // null where it is not asked for
};

struct NormKernels {
  int float_lanes;
  int double_lanes;
  void (*sums)(const NormRun&, void* sums);
  void (*squares)(const NormRun&, const void* mean, void* sums);  // of the distances to the mean
  void (*forward)(const NormRun&, const NormForward&);
  void (*gradient_sums)(const NormRun&, const NormGradient&, void* sum_g, void* sum_gx);
  void (*input_gradient)(const NormRun&, const NormGradient&, const NormInputGradient&);
};

}  // namespace lungkit

LUNGKIT_DECLARE_KERNELS(NormKernels, norm_kernels)
