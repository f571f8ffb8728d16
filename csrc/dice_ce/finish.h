// From statistics to the loss and its slopes, the gradient with respect to the statistics, for both backends.
// All in double: there is little of it, and the Dice terms subtract nearly equal numbers.
#pragma once

#include <algorithm>
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
  const double ratio = numerator / divisor, inverse = 1 / divisor;  // 1 where they are equal
  return {1 - ratio, -2 * (options.jaccard ? 1 + ratio : 1) * inverse,
          (options.jaccard ? 2 : 1) * ratio * inverse};
}

// Factors of the terms, made where divisions cost nothing: a GPU's one warp would wait for each.
struct LossFactors {
  LossFactors(int64_t images, int64_t classes, const DiceCeOptions& options) {
    const int64_t counted = options.include_background || classes == 1 ? classes : classes - 1;
    const int64_t terms = (options.batch ? std::min<int64_t>(images, 1) : images) * counted;
    dice = options.lambda_dice / (options.mean ? static_cast<double>(terms) : 1.0);
    other_label = options.label_smoothing / static_cast<double>(classes);
  }
  double dice;         // of every Dice term
  double other_label;  // of every class, the label's included: the weight that smoothing gives it
};

// The pairs (row, column), in their order, of which a member of a team takes every size-th: a division each
// would take longer than what is done with them.
template <class Index>
struct Pairs {
  template <class Team>
  LUNGKIT_HD Pairs(const Team& team, Index columns)
      : columns(columns),
        first_row(static_cast<Index>(team.rank()) / columns),
        first_column(static_cast<Index>(team.rank()) - first_row * columns),
        row_step(static_cast<Index>(team.size()) / columns),
        column_step(static_cast<Index>(team.size()) - row_step * columns) {}

  template <class Body>
  LUNGKIT_HD void for_each(Index rows, const Body& body) const {
    for (Index row = first_row, column = first_column; row < rows; row += row_step) {
      body(row, column);
      column += column_step;
      if (column >= columns) {
        column -= columns;
        ++row;
      }
    }
  }

  Index columns, first_row, first_column, row_step, column_step;
};

// The loss of statistics sum(row, b, c), with class weights weight(c); slope(row, b, c, value) receives its
// gradient. Members of a team share the work: member `rank` of `size` takes every size-th term, and each must
// call team.add_up(numbers...), which makes each number its sum over the team. Index holds images * classes.
template <class Index, class Team, class Sum, class Weight, class Slope>
LUNGKIT_HD double finish(const Team& team, Index images, Index classes, bool class_indices,
                         const DiceCeOptions& options, const LossFactors& factors, const Sum& sum,
                         const Weight& weight, const Slope& slope) {
  const Index first = options.include_background || classes == 1 ? 0 : 1, counted = classes - first;
  const Index groups = !options.batch ? images : images > 0 ? 1 : 0;
  const Index images_a_group = options.batch ? images : 1;
  const Pairs<Index> pairs(team, classes);
  double dice = 0;
  pairs.for_each(groups, [&](Index group, Index c) {
    double intersection = 0, total = 0;
#pragma unroll 1
    for (Index b = group; b < group + images_a_group; ++b) {
      intersection += sum(row_intersection, b, c);
      total += sum(row_prediction, b, c) + sum(row_label, b, c);
    }
    const DiceTerm term = c < first ? DiceTerm{0, 0, 0} : dice_term(intersection, total, options);
    // A class that counts alone is not weighted.
    const double scale = factors.dice * (counted > 1 ? weight(c) : 1.0);
    dice += scale * term.loss;
#pragma unroll 1
    for (Index b = group; b < group + images_a_group; ++b) {
      slope(row_intersection, b, c, scale * term.intersection);
      slope(row_prediction, b, c, scale * term.prediction);
      slope(row_label, b, c, 0);
      slope(row_voxels, b, c, 0);
    }
  });

  // The cross-entropy is sum_bc (a_c L + r_c R) / divisor, L and R being row_cross_entropy and row_rest. Its
  // mean divides by the weights of the voxels for class indices, else by the voxels.
  const bool binary = options.cross_entropy == CrossEntropy::binary;
  const auto of_label = [&](Index c) { return weight(c) * (binary ? 1 : 1 - options.label_smoothing); };
  const auto of_rest = [&](Index c) { return binary ? 1 : weight(c) * factors.other_label; };
  double entropy = 0, divisor = 0;
  pairs.for_each(images, [&](Index b, Index c) {
    entropy += of_label(c) * sum(row_cross_entropy, b, c) + of_rest(c) * sum(row_rest, b, c);
    if (class_indices && !binary) {
      divisor += weight(c) * sum(row_label, b, c);
    } else if (binary || c == 0) {
      divisor += sum(row_voxels, b, c);
    }
  });
  team.add_up(dice, entropy, divisor);
  const double of_entropy = options.lambda_ce / (!options.mean || divisor == 0 ? 1 : divisor);
  pairs.for_each(images, [&](Index b, Index c) {
    slope(row_cross_entropy, b, c, of_entropy * of_label(c));
    slope(row_rest, b, c, of_entropy * of_rest(c));
  });
  return dice + of_entropy * entropy;
}

}  // namespace lungkit
