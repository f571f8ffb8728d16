#include <atomic>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../support/parallel.h"
#include "arguments.h"
#include "kernel.h"

namespace lungkit {
namespace {

constexpr int64_t chunk_voxels = 1 << 16;

// Reads the class index of voxel v of image b of a tensor of any label dtype.
int64_t class_at(const Tensor& tensor, const VoxelLayout& layout, int64_t b, int64_t v) {
  int64_t value = 0;
  dispatch_labels(tensor.scalar_type(), "confusion_counts", [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(tensor.const_data_ptr());
    value = data[b * layout.batch_stride + v * layout.voxel_stride];
  });
  return value;
}

// Names the first class index outside 0 .. num_classes - 1; runs only once an error is certain.
[[noreturn]] void fail_on_invalid(const ConfusionArguments& a) {
  const std::string ignored =
      a.ignore_index ? "ignore_index is " + std::to_string(*a.ignore_index) : "no ignore_index is set";
  const auto check = [&](const char* name, int64_t value, int64_t image) {
    LUNGKIT_CHECK(value >= 0 && value < a.num_classes, "confusion_counts: ", name, " holds the value ", value,
                  " in image ", image, "; classes are 0..", a.num_classes - 1,
                  " (num_classes=", a.num_classes, ") and ", ignored);
  };
  for (int64_t b = 0; b < a.label_layout.batch; ++b) {
    for (int64_t v = 0; v < a.label_layout.voxels; ++v) {
      const int64_t label = class_at(a.labels, a.label_layout, b, v);
      if (a.ignore_index && label == *a.ignore_index) continue;
      check("labels", label, b);
      if (!a.logits) check("pred", class_at(a.pred, a.pred_layout, b, v), b);
    }
  }
  fail("confusion_counts: pred or labels changed while they were read");
}

std::tuple<Tensor, Tensor> confusion_counts_cpu(const Tensor& pred, const Tensor& labels, int64_t num_classes,
                                                std::optional<int64_t> ignore_index) {
  const ConfusionArguments a = check_confusion_counts(pred, labels, num_classes, ignore_index);

  const VoxelLayout& p = a.pred_layout;
  const VoxelLayout& l = a.label_layout;
  auto [counts, voxels] = new_confusion_outputs(a.labels, l.batch, num_classes);
  const int64_t width = 3 * num_classes;
  const int64_t chunks = ceil_div(l.voxels, chunk_voxels);
  std::vector<int64_t> partial(l.batch * chunks * width, 0);
  std::vector<int64_t> counted(l.batch * chunks, 0);
  const auto* pred_data = static_cast<const char*>(a.pred.const_data_ptr());
  const auto* label_data = static_cast<const char*>(a.labels.const_data_ptr());
  const int64_t pred_size = element_size(a.pred.scalar_type());
  const int64_t label_size = element_size(a.labels.scalar_type());
  const ConfusionKernels& kernels = LUNGKIT_SELECT_KERNELS(confusion_kernels);

  std::atomic<bool> valid{true};
  for_each_chunk(l.batch, l.voxels, chunk_voxels, [&](int64_t b, int64_t chunk, int64_t first, int64_t last) {
    const ConfusionChunk work{
        .pred = pred_data + (b * p.batch_stride + first * p.voxel_stride) * pred_size,
        .labels = label_data + (b * l.batch_stride + first * l.voxel_stride) * label_size,
        .pred_type = a.pred.scalar_type(),
        .label_type = a.labels.scalar_type(),
        .voxels = last - first,
        .pred_channels = a.logits ? p.channels : 0,
        .pred_channel_stride = p.channel_stride,
        .pred_voxel_stride = p.voxel_stride,
        .label_voxel_stride = l.voxel_stride,
        .num_classes = num_classes,
        .ignore_index = ignore_index};
    const int64_t i = b * chunks + chunk;
    counted[i] = kernels.count(work, &partial[i * width]);
    if (counted[i] < 0) valid = false;
  });
  if (!valid) fail_on_invalid(a);

  auto* count_out = static_cast<int64_t*>(counts.mutable_data_ptr());
  auto* voxel_out = static_cast<int64_t*>(voxels.mutable_data_ptr());
  for (int64_t i = 0; i < l.batch * chunks; ++i) {
    for (int64_t k = 0; k < width; ++k) count_out[i / chunks * width + k] += partial[i * width + k];
    voxel_out[i / chunks] += counted[i];
  }
  return {counts, voxels};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lungkit, CPU, m) {
  m.impl("confusion_counts", TORCH_BOX(&confusion_counts_cpu));
}

}  // namespace lungkit
