// From statistics to the loss and its slopes, the gradient with respect to the statistics, for both backends.
// All in double: there is little of it, and the Dice terms subtract nearly equal numbers.
#pragma once

#include <cstdint>

#include "../support/host_device.h"
#include "options.h"

namespace lungkit {

struct DiceTerm {
  double loss;
  double intersection;  // its derivatives
  double prediction;
};

// 1 - (2 I + smooth_nr) / (T + smooth_dr) with T = P + Y, or 2 (P + Y - I) for Jaccard; 0 where the divisor
// is 0.
LUNGKIT_HD DiceTerm dice_term(double intersection, double total, const DiceCeOptions& options) {
  const double numerator = 2 * intersection + options.smooth_nr;
  const double divisor = (options.jaccard ? 2 * (total - intersection) : total) + options.smooth_dr;
  if (divisor == 0) return {0, 0, 0};
  const double ratio = numerator / divisor;
  return {1 - ratio, -2 * (options.jaccard ? 1 + ratio : 1) / divisor,
          (options.jaccard ? 2 : 1) * ratio / divisor};
}

// The loss of statistics sum(row, b, c), with class weights weight(c); slope(row, b, c, value) receives its
// gradient. Members of a team share the work: member `rank` of `size` takes every size-th term, and each must
// call team.add_up(numbers...), which makes each number its sum over the team. Index holds images * classes.
template <class Index, class Team, class Sum, class Weight, class Slope>
LUNGKIT_HD double finish(const Team& team, Index images, Index classes, bool class_indices,
                         const DiceCeOptions& options, const Sum& sum, const Weight& weight,
                         const Slope& slope) {
  const Index first = options.include_background || classes == 1 ? 0 : 1, counted = classes - first;
  const Index groups = !options.batch ? images : images > 0 ? 1 : 0;
  const Index images_a_group = options.batch ? images : 1;
  const double terms = options.mean ? static_cast<double>(groups * counted) : 1.0;
  double dice = 0;
  for (Index i = team.rank(); i < groups * classes; i += team.size()) {
    const Index group = i / classes, c = i % classes;
    double intersection = 0, total = 0;
    for (Index b = group; b < group + images_a_group; ++b) {
      intersection += sum(row_intersection, b, c);
      total += sum(row_prediction, b, c) + sum(row_label, b, c);
    }
    const DiceTerm term = c < first ? DiceTerm{0, 0, 0} : dice_term(intersection, total, options);
    // A class that counts alone is not weighted.
    const double scale = options.lambda_dice * (counted > 1 ? weight(c) : 1.0) / terms;
    dice += scale * term.loss;
    for (Index b = group; b < group + images_a_group; ++b) {
      slope(row_intersection, b, c, scale * term.intersection);
      slope(row_prediction, b, c, scale * term.prediction);
      slope(row_label, b, c, 0);
      slope(row_voxels, b, c, 0);
    }
  }

  // The cross-entropy is sum_bc (a_c L + r_c R) / divisor, L and R being row_cross_entropy and row_rest. Its
  // mean divides by the weights of the voxels for class indices, else by the voxels.
  const bool binary = options.cross_entropy == CrossEntropy::binary;
  const auto of_label = [&](Index c) { return weight(c) * (binary ? 1 : 1 - options.label_smoothing); };
  const auto of_rest = [&](Index c) {
    return binary ? 1 : weight(c) * options.label_smoothing / static_cast<double>(classes);
  };
  double entropy = 0, divisor = 0;
  for (Index i = team.rank(); i < images * classes; i += team.size()) {
    const Index b = i / classes, c = i % classes;
    entropy += of_label(c) * sum(row_cross_entropy, b, c) + of_rest(c) * sum(row_rest, b, c);
    if (class_indices && !binary) {
      divisor += weight(c) * sum(row_label, b, c);
    } else if (binary || c == 0) {
      divisor += sum(row_voxels, b, c);
    }
  }
  team.add_up(dice, entropy, divisor);
  if (!options.mean || divisor == 0) divisor = 1;
  for (Index i = team.rank(); i < images * classes; i += team.size()) {
    const Index b = i / classes, c = i % classes;
    slope(row_cross_entropy, b, c, options.lambda_ce * of_label(c) / divisor);
    slope(row_rest, b, c, options.lambda_ce * of_rest(c) / divisor);
  }
  return dice + options.lambda_ce * entropy / divisor;
}

}  // namespace lungkit
