// The three ops as the dispatcher calls them. Here the flat arguments of schema.h become one DiceCeOptions
// and are checked; a backend works on DiceCeArguments:
//   static Tensor statistics(const DiceCeArguments& a);
//   static std::tuple<Tensor, Tensor> loss(const DiceCeArguments& a, const std::optional<Tensor>& weight);
//   static void differentiate(const DiceCeArguments& a, const Tensor& slopes,
//                             const std::optional<Tensor>& scale, Tensor& gradient);
// weight and slopes are contiguous there.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "arguments.h"

namespace lungkit {

template <class Backend>
struct DiceCeOps {
  static Tensor statistics(const Tensor& logits, const Tensor& labels, std::optional<Tensor> mask,
                           std::string activation, std::string cross_entropy, bool squared, double gamma,
                           std::optional<int64_t> ignore_index, bool minimum) {
    return Backend::statistics(
        check_dice_ce(logits, labels, mask,
                      of_statistics(activation, cross_entropy, squared, gamma, ignore_index, minimum)));
  }

  static std::tuple<Tensor, Tensor> loss(const Tensor& logits, const Tensor& labels,
                                         std::optional<Tensor> mask, std::optional<Tensor> weight,
                                         std::string activation, std::string cross_entropy, bool squared,
                                         double gamma, std::optional<int64_t> ignore_index, bool minimum,
                                         bool include_background, bool jaccard, bool batch, bool mean,
                                         double smooth_nr, double smooth_dr, double lambda_dice,
                                         double lambda_ce, double label_smoothing) {
    DiceCeOptions options = of_statistics(activation, cross_entropy, squared, gamma, ignore_index, minimum);
    options.needs_rest = label_smoothing > 0 || options.cross_entropy == CrossEntropy::binary;
    options.include_background = include_background;
    options.jaccard = jaccard;
    options.batch = batch;
    options.mean = mean;
    options.smooth_nr = smooth_nr;
    options.smooth_dr = smooth_dr;
    options.lambda_dice = lambda_dice;
    options.lambda_ce = lambda_ce;
    options.label_smoothing = label_smoothing;
    const DiceCeArguments a = check_dice_ce(logits, labels, mask, options);
    check_weight(weight, a);
    if (weight) weight = torch::stable::contiguous(*weight);
    return Backend::loss(a, weight);
  }

  static Tensor backward(const Tensor& slopes, std::optional<Tensor> scale, const Tensor& logits,
                         const Tensor& labels, std::optional<Tensor> mask, std::string activation,
                         std::string cross_entropy, bool squared, double gamma,
                         std::optional<int64_t> ignore_index, bool minimum) {
    const DiceCeArguments a =
        check_dice_ce(logits, labels, mask,
                      of_statistics(activation, cross_entropy, squared, gamma, ignore_index, minimum));
    check_slopes(slopes, scale, a);
    Tensor gradient = new_gradient(logits);
    Backend::differentiate(a, torch::stable::contiguous(slopes), scale, gradient);
    return gradient;
  }

  static void add_to(torch::stable::detail::StableLibrary& m) {
    m.impl("dice_ce_statistics", TORCH_BOX(&statistics));
    m.impl("dice_ce_loss", TORCH_BOX(&loss));
    m.impl("dice_ce_backward", TORCH_BOX(&backward));
  }

 private:
  static DiceCeOptions of_statistics(const std::string& activation, const std::string& cross_entropy,
                                     bool squared, double gamma, std::optional<int64_t> ignore_index,
                                     bool minimum) {
    return {.activation = activation_from(activation),
            .cross_entropy = cross_entropy_from(cross_entropy),
            .squared = squared,
            .gamma = gamma,
            .has_ignore_index = ignore_index.has_value(),
            .ignore_index = ignore_index.value_or(0),
            .minimum = minimum};
  }
};

}  // namespace lungkit
