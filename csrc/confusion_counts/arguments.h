// Checks and shapes that the CPU and the CUDA side of confusion_counts share.
#pragma once

#include <optional>
#include <utility>

#include <torch/csrc/stable/ops.h>

#include "../support/check.h"
#include "../support/dispatch.h"
#include "../support/layout.h"
#include "kernel.h"

namespace lungkit {

struct ConfusionArguments {
  Tensor pred;    // logits (B, C, *S), or class indices (B, *S) or (B, 1, *S); voxels in one constant step
  Tensor labels;  // class indices, likewise
  VoxelLayout pred_layout;
  VoxelLayout label_layout;
  bool logits;
  int64_t num_classes;
  std::optional<int64_t> ignore_index;
};

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline ConfusionArguments check_confusion_counts(const Tensor& pred, const Tensor& labels,
                                                 int64_t num_classes, std::optional<int64_t> ignore_index) {
  LUNGKIT_CHECK(num_classes >= 2 && num_classes <= max_classes,
                "confusion_counts: num_classes must be between 2 and ", max_classes, ", got ", num_classes);
  LUNGKIT_CHECK(on_same_device(pred, labels), "confusion_counts: pred and labels must be on the same device");
  const bool logits = is_floating(pred.scalar_type());
  // The kernels trust their dtypes: refuse what no dispatch knows.
  dispatch_labels(labels.scalar_type(), "confusion_counts", [](auto) {});
  if (!logits) dispatch_labels(pred.scalar_type(), "confusion_counts", [](auto) {});
  LUNGKIT_CHECK(pred.dim() >= (logits ? 3 : 2),
                "confusion_counts: pred must be (B, C, *S) logits or (B, *S) class"
                " indices with at least one spatial axis, got ",
                shape_of(pred));
  const bool pred_has_channel = logits || (pred.dim() == labels.dim() + 1 && pred.size(1) == 1);
  const int64_t dims = pred.dim() + (pred_has_channel ? 0 : 1);  // axes with a channel axis counted in
  const bool labels_have_channel = labels.dim() == dims && labels.size(1) == 1;
  bool same = labels.dim() + (labels_have_channel ? 0 : 1) == dims && pred.size(0) == labels.size(0);
  for (int64_t d = 2; same && d < dims; ++d) {
    same = pred.size(pred_has_channel ? d : d - 1) == labels.size(labels_have_channel ? d : d - 1);
  }
  LUNGKIT_CHECK(same, "confusion_counts: pred ", shape_of(pred), " and labels ", shape_of(labels),
                " do not agree; labels must be (B, *S) or (B, 1, *S) over pred's batch and voxels");
  LUNGKIT_CHECK(!logits || pred.size(1) == num_classes || (pred.size(1) == 1 && num_classes == 2),
                "confusion_counts: logits ", shape_of(pred), " have ", pred.size(1),
                " channels for num_classes=", num_classes,
                "; expected num_classes channels, or one for two classes");
  ConfusionArguments a{.pred = with_flat_voxels(pred, pred_has_channel ? 2 : 1),
                       .labels = with_flat_voxels(labels, labels_have_channel ? 2 : 1),
                       .pred_layout = {},
                       .label_layout = {},
                       .logits = logits,
                       .num_classes = num_classes,
                       .ignore_index = ignore_index};
  a.pred_layout = logits ? channel_layout(a.pred) : label_layout(a.pred, dims);
  a.label_layout = label_layout(a.labels, dims);
  return a;
}

// counts (B, K, 3) and voxels (B,), both int64 zeros on the device of `like`.
inline std::pair<Tensor, Tensor> new_confusion_outputs(const Tensor& like, int64_t batch,
                                                       int64_t num_classes) {
  return {torch::stable::new_zeros(like, {batch, num_classes, 3}, ScalarType::Long),
          torch::stable::new_zeros(like, {batch}, ScalarType::Long)};
}

}  // namespace lungkit
