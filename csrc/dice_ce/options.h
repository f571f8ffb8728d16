// What every part of dice_ce means by its options and by the rows of its statistics.
#pragma once

#include <cstdint>

namespace lungkit {

enum class Activation : int { softmax, sigmoid, none };
enum class CrossEntropy : int { softmax, binary, none };

// Rows of the statistics (6, B, C), and of the gradient with respect to them. y is the label of a voxel as a
// vector, p its activated prediction, z its logits.
enum Row : int {
  row_intersection = 0,   // sum p y, or min(p, y)
  row_prediction = 1,     // sum p, or p^2
  row_label = 2,          // sum y, or y^2
  row_cross_entropy = 3,  // sum y f(p), f(p) = -(1 - p)^gamma log p
  row_rest = 4,           // softmax: sum -log p; binary: sum (1 - y) f(1 - p)
  row_voxels = 5,         // sum 1, the same for each class
  statistic_rows = 6,
  class_rows = row_voxels  // what is summed for each class
};

struct DiceCeOptions {
  Activation activation = Activation::softmax;
  CrossEntropy cross_entropy = CrossEntropy::softmax;
  bool squared = false;    // p^2 and y^2 in row_prediction and row_label
  double gamma = 0;        // focal exponent
  bool needs_rest = true;  // row_rest may be anything where not
  bool has_ignore_index = false;
  int64_t ignore_index = 0;
  bool minimum = false;  // min(p, y) in row_intersection; false beside class indices, where it is p y

  // Of the loss alone.
  bool include_background = true;
  bool jaccard = false;
  bool batch = false;  // sum over the images before the division
  bool mean = true;    // else the sum over images, classes and voxels
  double smooth_nr = 1e-5;
  double smooth_dr = 1e-5;
  double lambda_dice = 1;
  double lambda_ce = 1;
  double label_smoothing = 0;
};

// A floating class index may be so far from a whole number.
constexpr double index_tolerance = 1e-3;

}  // namespace lungkit
