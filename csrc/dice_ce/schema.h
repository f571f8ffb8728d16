#pragma once

#include <torch/csrc/stable/library.h>

namespace lungkit {

inline void define_dice_ce(torch::stable::detail::StableLibrary& m) {
  m.def(
      "dice_ce_statistics(Tensor logits, Tensor labels, Tensor? mask, str activation, str cross_entropy,"
      " bool squared, float gamma, int? ignore_index, bool minimum) -> Tensor");
  m.def(
      "dice_ce_loss(Tensor logits, Tensor labels, Tensor? mask, Tensor? weight, str activation, str "
      "cross_entropy,"
      " bool squared, float gamma, int? ignore_index, bool minimum, bool include_background, bool jaccard,"
      " bool batch, bool mean,"
      " float smooth_nr, float smooth_dr, float lambda_dice, float lambda_ce, float label_smoothing)"
      " -> (Tensor loss, Tensor slopes)");
  m.def(
      "dice_ce_backward(Tensor slopes, Tensor? scale, Tensor logits, Tensor labels, Tensor? mask, str "
      "activation,"
      " str cross_entropy, bool squared, float gamma, int? ignore_index, bool minimum) -> Tensor");
}

}  // namespace lungkit
