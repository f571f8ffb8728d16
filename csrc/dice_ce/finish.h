// From statistics to the loss and its slopes, the gradient with respect to the statistics: the arithmetic
// that the CPU and the CUDA kernel share. All in double: there is little of it, and the Dice terms subtract
// nearly equal numbers.
#pragma once

#include <cstdint>

#include "../support/host_device.h"
#include "options.h"

namespace lungkit {

struct LossOptions {
  bool include_background;
  bool jaccard;
  bool batch;  // sum over the images before the division
  bool mean;   // else the sum over images, classes and voxels
  double smooth_nr;
  double smooth_dr;
  double lambda_dice;
  double lambda_ce;
  double label_smoothing;
};

struct DiceTerm {
  double loss;
  double intersection;  // its derivatives
  double prediction;
};

// 1 - (2 I + smooth_nr) / (T + smooth_dr) with T = P + Y, or 2 (P + Y - I) for Jaccard; 0 where the divisor
// is 0.
LUNGKIT_HD DiceTerm dice_term(double intersection, double total, const LossOptions& options) {
  const double numerator = 2 * intersection + options.smooth_nr;
  const double divisor = (options.jaccard ? 2 * (total - intersection) : total) + options.smooth_dr;
  if (divisor == 0) return {0, 0, 0};
  const double ratio = numerator / divisor;
  return {1 - ratio, -2 * (options.jaccard ? 1 + ratio : 1) / divisor,
          (options.jaccard ? 2 : 1) * ratio / divisor};
}

// First class of the Dice term, and whether its terms are weighted: one class alone is not.
LUNGKIT_HD int64_t first_dice_class(int64_t classes, const LossOptions& options) {
  return options.include_background || classes == 1 ? 0 : 1;
}

// The cross-entropy is sum_bc (a_c L + r_c R) / divisor, L and R being row_cross_entropy and row_rest.
struct EntropyWeights {
  double label;
  double rest;
};

LUNGKIT_HD EntropyWeights entropy_weights(double class_weight, int64_t classes, bool binary,
                                          const LossOptions& options) {
  if (binary) return {class_weight, 1};
  return {class_weight * (1 - options.label_smoothing),
          class_weight * options.label_smoothing / static_cast<double>(classes)};
}

// What image b and class c add to the divisor of the mean: the weights of the voxels for class indices, else
// voxels.
LUNGKIT_HD double entropy_divisor(double class_weight, double labels, double voxels, int64_t c, bool binary,
                                  bool class_indices) {
  if (binary) return voxels;
  if (class_indices) return class_weight * labels;
  return c == 0 ? voxels : 0;
}

}  // namespace lungkit
