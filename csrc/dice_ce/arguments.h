// Checks and shapes that the CPU and the CUDA side of dice_ce share.
#pragma once

#include <optional>
#include <string>

#include <torch/csrc/stable/ops.h>

#include "../support/check.h"
#include "../support/dispatch.h"
#include "../support/host_device.h"
#include "../support/layout.h"
#include "options.h"

namespace lungkit {

struct DiceCeArguments {
  Tensor logits;  // (B, C, *S), its voxels in one constant step
  Tensor labels;  // (B, *S), (B, 1, *S) or (B, C, *S), likewise
  std::optional<Tensor> mask;
  VoxelLayout logits_layout;
  VoxelLayout labels_layout;
  VoxelLayout mask_layout;
  bool class_indices;
  DiceCeOptions options;
};

inline Activation activation_from(const std::string& name) {
  if (name == "softmax") return Activation::softmax;
  if (name == "sigmoid") return Activation::sigmoid;
  LUNGKIT_CHECK(name == "none", "dice_ce: activation must be softmax, sigmoid or none, got ", name);
  return Activation::none;
}

inline CrossEntropy cross_entropy_from(const std::string& name) {
  if (name == "softmax") return CrossEntropy::softmax;
  if (name == "binary") return CrossEntropy::binary;
  LUNGKIT_CHECK(name == "none", "dice_ce: cross_entropy must be softmax, binary or none, got ", name);
  return CrossEntropy::none;
}

LUNGKIT_HD bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline bool is_class_index(ScalarType type) {
  return type == ScalarType::Byte || type == ScalarType::Bool || type == ScalarType::Short ||
         type == ScalarType::Int || type == ScalarType::Long;
}

// Whether `tensor` has the batch and the voxels of the logits, with `channels` channels or, for one, with no
// such axis.
inline bool covers(const Tensor& tensor, const Tensor& logits, int64_t channels) {
  const bool has_channel = tensor.dim() == logits.dim();
  if (!has_channel && (channels != 1 || tensor.dim() != logits.dim() - 1)) return false;
  if (has_channel && tensor.size(1) != channels) return false;
  if (tensor.size(0) != logits.size(0)) return false;
  for (int64_t d = 2; d < logits.dim(); ++d) {
    if (tensor.size(has_channel ? d : d - 1) != logits.size(d)) return false;
  }
  return true;
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& logits) {
  LUNGKIT_CHECK(on_same_device(tensor, logits), "dice_ce: ", name,
                " must be on the device of the logits, but their device types and indices are ",
                static_cast<int>(tensor.device().type()), ":", static_cast<int>(tensor.device().index()),
                " and ", static_cast<int>(logits.device().type()), ":",
                static_cast<int>(logits.device().index()));
}

inline DiceCeArguments check_dice_ce(const Tensor& logits, const Tensor& labels,
                                     const std::optional<Tensor>& mask, const DiceCeOptions& options) {
  LUNGKIT_CHECK(logits.dim() >= 3 && is_floating(logits.scalar_type()),
                "dice_ce: logits must be (B, C, *S) of a floating dtype, got ", shape_of(logits));
  LUNGKIT_CHECK(logits.size(1) >= 1 && logits.size(1) < INT32_MAX, "dice_ce: logits ", shape_of(logits),
                " have no channel, or more than there are class indices");
  const bool one_channel = covers(labels, logits, 1);
  const bool floating = is_floating(labels.scalar_type());
  // Beside one channel floating numbers are soft labels.
  const bool class_indices = one_channel && !(floating && logits.size(1) == 1);
  LUNGKIT_CHECK((class_indices || covers(labels, logits, logits.size(1))) &&
                    (floating || is_class_index(labels.scalar_type())),
                "dice_ce: labels ", shape_of(labels), " do not fit logits ", shape_of(logits),
                "; expected class indices (B, *S) or (B, 1, *S), or vectors (B, C, *S)");
  LUNGKIT_CHECK(!mask || (covers(*mask, logits, 1) && (mask->scalar_type() == ScalarType::Bool ||
                                                       mask->scalar_type() == ScalarType::Byte)),
                "dice_ce: mask must be bool or uint8, (B, *S) or (B, 1, *S) over the voxels of logits ",
                shape_of(logits));
  check_device("labels", labels, logits);
  if (mask) check_device("mask", *mask, logits);
  const auto first_spatial = [&](const Tensor& tensor) { return tensor.dim() == logits.dim() ? 2 : 1; };
  DiceCeArguments a{.logits = with_flat_voxels(logits, 2),
                    .labels = with_flat_voxels(labels, first_spatial(labels)),
                    .mask = std::nullopt,
                    .logits_layout = {},
                    .labels_layout = {},
                    .mask_layout = {},
                    .class_indices = class_indices,
                    .options = options};
  a.options.minimum = options.minimum && !class_indices;
  a.logits_layout = channel_layout(a.logits);
  a.labels_layout = class_indices || labels.dim() < logits.dim() ? label_layout(a.labels, logits.dim())
                                                                 : channel_layout(a.labels);
  if (mask) {
    a.mask = with_flat_voxels(*mask, first_spatial(*mask));
    a.mask_layout = label_layout(*a.mask, logits.dim());
  }
  return a;
}

// Dtype of statistics, slopes and class weights.
inline ScalarType statistics_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_slopes(const Tensor& slopes, const std::optional<Tensor>& scale, const DiceCeArguments& a) {
  check_device("slopes", slopes, a.logits);
  if (scale) check_device("scale", *scale, a.logits);
  const ScalarType expected = statistics_type(a.logits);
  LUNGKIT_CHECK(slopes.dim() == 3 && slopes.size(0) == statistic_rows &&
                    slopes.size(1) == a.logits_layout.batch && slopes.size(2) == a.logits_layout.channels &&
                    slopes.scalar_type() == expected,
                "dice_ce: slopes must be (6, B, C) of the statistics' dtype, got ", shape_of(slopes));
  LUNGKIT_CHECK(!scale || (scale->numel() == 1 && scale->scalar_type() == expected),
                "dice_ce: scale must be one number of the statistics' dtype");
}

inline void check_weight(const std::optional<Tensor>& weight, const DiceCeArguments& a) {
  if (weight) check_device("weight", *weight, a.logits);
  LUNGKIT_CHECK(!weight || (weight->dim() == 1 && weight->size(0) == a.logits_layout.channels &&
                            weight->scalar_type() == statistics_type(a.logits)),
                "dice_ce: weight must be (C,) = (", a.logits_layout.channels,
                ",) of the statistics' dtype, got ", shape_of(*weight));
}

// The gradient of the logits is laid out as they are where that is channels-last, else contiguously.
inline Tensor new_gradient(const Tensor& logits) {
  int64_t step = logits.size(1);
  bool channels_last = step > 1 && logits.stride(1) == 1;
  for (int64_t d = logits.dim() - 1; channels_last && d != 0; d = d == 2 ? 0 : d - 1) {
    channels_last = logits.stride(d) == step;
    step *= logits.size(d);
  }
  channels_last = channels_last && logits.stride(0) == step;
  return channels_last ? torch::stable::empty_like(logits)
                       : torch::stable::new_empty(logits, logits.sizes(), logits.scalar_type());
}

}  // namespace lungkit
