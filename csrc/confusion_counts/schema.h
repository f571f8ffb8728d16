#pragma once

#include <torch/csrc/stable/library.h>

namespace lungkit {

inline void define_confusion_counts(torch::stable::detail::StableLibrary& m) {
  m.def(
      "confusion_counts(Tensor pred, Tensor labels, int num_classes, int? ignore_index=None)"
      " -> (Tensor counts, Tensor voxels)");
}

}  // namespace lungkit
