#include <atomic>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../support/huge_pages.h"
#include "../support/parallel.h"
#include "arguments.h"
#include "finish.h"
#include "kernel.h"

namespace lungkit {
namespace {

constexpr int64_t chunk_voxels = 1 << 14;

// The chunk of image b that begins at voxel `first`.
DiceCeChunk chunk_of(const DiceCeArguments& a, int64_t b, int64_t first, int64_t last) {
  const auto at = [&](const Tensor& tensor, const VoxelLayout& layout) {
    const int64_t offset = b * layout.batch_stride + first * layout.voxel_stride;
    return static_cast<const char*>(tensor.const_data_ptr()) + offset * element_size(tensor.scalar_type());
  };
  return {.logits = at(a.logits, a.logits_layout),
          .labels = at(a.labels, a.labels_layout),
          .mask = a.mask ? reinterpret_cast<const uint8_t*>(at(*a.mask, a.mask_layout)) : nullptr,
          .logits_type = a.logits.scalar_type(),
          .labels_type = a.labels.scalar_type(),
          .logits_channel_stride = a.logits_layout.channel_stride,
          .logits_voxel_stride = a.logits_layout.voxel_stride,
          .labels_channel_stride = a.labels_layout.channel_stride,
          .labels_voxel_stride = a.labels_layout.voxel_stride,
          .mask_voxel_stride = a.mask_layout.voxel_stride,
          .voxels = last - first,
          .classes = a.logits_layout.channels,
          .class_indices = a.class_indices,
          .options = a.options,
          .scratch = nullptr};
}

// Names the first class index that is out of range; runs only once an error is certain.
[[noreturn]] void fail_on_invalid(const DiceCeArguments& a) {
  const int64_t classes = a.logits_layout.channels == 1 ? 2 : a.logits_layout.channels;
  dispatch_labels(a.labels.scalar_type(), "dice_ce", [&](auto zero) {
    const auto* labels = static_cast<const decltype(zero)*>(a.labels.const_data_ptr());
    const auto* mask = a.mask ? static_cast<const uint8_t*>(a.mask->const_data_ptr()) : nullptr;
    for (int64_t b = 0; b < a.labels_layout.batch; ++b) {
      for (int64_t v = 0; v < a.labels_layout.voxels; ++v) {
        const int64_t label = labels[b * a.labels_layout.batch_stride + v * a.labels_layout.voxel_stride];
        const bool counts = (!a.options.has_ignore_index || label != a.options.ignore_index) &&
                            (!mask || mask[b * a.mask_layout.batch_stride + v * a.mask_layout.voxel_stride]);
        LUNGKIT_CHECK(!counts || (label >= 0 && label < classes), "dice_ce: labels hold the value ", label,
                      " in image ", b, "; classes are 0..", classes - 1, " and ",
                      a.options.has_ignore_index ? "ignore_index is " + std::to_string(a.options.ignore_index)
                                                 : std::string("no ignore_index is set"));
      }
    }
  });
  fail("dice_ce: labels changed while they were read");
}

// Sums (statistic_rows, B, C). Each chunk writes its own, and they are added in order afterwards.
std::vector<double> statistics_of(const DiceCeArguments& a) {
  const DiceCeKernels& kernels = LUNGKIT_SELECT_KERNELS(dice_ce_kernels);
  const auto [images, classes, voxels, batch_stride, channel_stride, voxel_stride] = a.logits_layout;
  const int64_t chunks = ceil_div(voxels, chunk_voxels);
  const int64_t width = statistic_rows * classes;
  std::vector<double> partial(images * chunks * width);
  std::atomic<bool> valid{true};
  for_each_chunk(images, voxels, chunk_voxels, [&](int64_t b, int64_t chunk, int64_t first, int64_t last) {
    DiceCeChunk work = chunk_of(a, b, first, last);
    const auto scratch =
        std::make_unique_for_overwrite<double[]>(ceil_div(kernels.scratch_bytes(work), sizeof(double)));
    work.scratch = scratch.get();
    if (!kernels.sums(work, &partial[(b * chunks + chunk) * width])) valid = false;
  });
  if (!valid) fail_on_invalid(a);
  std::vector<double> sums(images * width);
  for (int64_t b = 0; b < images; ++b) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double* of_chunk = &partial[(b * chunks + chunk) * width];
      for (int64_t row = 0; row < statistic_rows; ++row) {
        for (int64_t c = 0; c < classes; ++c)
          sums[(row * images + b) * classes + c] += of_chunk[row * classes + c];
      }
    }
  }
  return sums;
}

Tensor tensor_of(const std::vector<double>& values, const Tensor& logits, std::vector<int64_t> shape) {
  Tensor tensor = torch::stable::new_empty(logits, shape, statistics_type(logits));
  dispatch_floating(tensor.scalar_type(), "dice_ce", [&](auto zero) {
    auto* to = static_cast<decltype(zero)*>(tensor.mutable_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) to[i] = static_cast<decltype(zero)>(values[i]);
  });
  return tensor;
}

std::vector<double> doubles_of(const Tensor& tensor) {
  std::vector<double> values(tensor.numel());
  const Tensor flat = torch::stable::contiguous(tensor);
  dispatch_floating(flat.scalar_type(), "dice_ce", [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(flat.const_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(data[i]);
  });
  return values;
}

// The loss; `slopes` receives its gradient with respect to `sums`.
double finish(const std::vector<double>& sums, const std::vector<double>& weight, const DiceCeArguments& a,
              const LossOptions& options, std::vector<double>& slopes) {
  const int64_t images = a.logits_layout.batch, classes = a.logits_layout.channels;
  const bool binary = a.options.cross_entropy == CrossEntropy::binary;
  const auto at = [&](int row, int64_t b, int64_t c) { return (row * images + b) * classes + c; };
  const auto weight_of = [&](int64_t c) { return weight.empty() ? 1.0 : weight[c]; };

  const int64_t first = first_dice_class(classes, options);
  const int64_t groups = options.batch ? std::min<int64_t>(images, 1) : images;
  const int64_t images_a_group = options.batch ? images : 1;
  const int64_t terms = groups * (classes - first);
  double dice = 0;
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t c = first; c < classes; ++c) {
      double intersection = 0, total = 0;
      for (int64_t b = group; b < group + images_a_group; ++b) {
        intersection += sums[at(row_intersection, b, c)];
        total += sums[at(row_prediction, b, c)] + sums[at(row_label, b, c)];
      }
      const DiceTerm term = dice_term(intersection, total, options);
      const double scale =
          (classes - first > 1 ? weight_of(c) : 1.0) / (options.mean ? static_cast<double>(terms) : 1.0);
      dice += scale * term.loss;
      for (int64_t b = group; b < group + images_a_group; ++b) {
        slopes[at(row_intersection, b, c)] = options.lambda_dice * scale * term.intersection;
        slopes[at(row_prediction, b, c)] = options.lambda_dice * scale * term.prediction;
      }
    }
  }

  double entropy = 0, divisor = 0;
  for (int64_t b = 0; b < images; ++b) {
    for (int64_t c = 0; c < classes; ++c) {
      const EntropyWeights w = entropy_weights(weight_of(c), classes, binary, options);
      entropy += w.label * sums[at(row_cross_entropy, b, c)] + w.rest * sums[at(row_rest, b, c)];
      divisor += entropy_divisor(weight_of(c), sums[at(row_label, b, c)], sums[at(row_voxels, b, c)], c,
                                 binary, a.class_indices);
    }
  }
  if (!options.mean || divisor == 0) divisor = 1;
  for (int64_t b = 0; b < images; ++b) {
    for (int64_t c = 0; c < classes; ++c) {
      const EntropyWeights w = entropy_weights(weight_of(c), classes, binary, options);
      slopes[at(row_cross_entropy, b, c)] = options.lambda_ce * w.label / divisor;
      slopes[at(row_rest, b, c)] = options.lambda_ce * w.rest / divisor;
    }
  }
  return options.lambda_dice * dice + options.lambda_ce * entropy / divisor;
}

Tensor dice_ce_statistics_cpu(const Tensor& logits, const Tensor& labels, std::optional<Tensor> mask,
                              std::string activation, std::string cross_entropy, bool squared, double gamma,
                              std::optional<int64_t> ignore_index) {
  const DiceCeArguments a =
      check_dice_ce(logits, labels, mask, activation, cross_entropy, squared, gamma, ignore_index);
  return tensor_of(statistics_of(a), logits, {statistic_rows, logits.size(0), logits.size(1)});
}

std::tuple<Tensor, Tensor> dice_ce_loss_cpu(const Tensor& logits, const Tensor& labels,
                                            std::optional<Tensor> mask, std::optional<Tensor> weight,
                                            std::string activation, std::string cross_entropy, bool squared,
                                            double gamma, std::optional<int64_t> ignore_index,
                                            bool include_background, bool jaccard, bool batch, bool mean,
                                            double smooth_nr, double smooth_dr, double lambda_dice,
                                            double lambda_ce, double label_smoothing) {
  DiceCeArguments a =
      check_dice_ce(logits, labels, mask, activation, cross_entropy, squared, gamma, ignore_index);
  check_weight(weight, a);
  a.options.needs_rest = label_smoothing > 0 || a.options.cross_entropy == CrossEntropy::binary;
  const LossOptions options{include_background, jaccard,     batch,     mean,           smooth_nr,
                            smooth_dr,          lambda_dice, lambda_ce, label_smoothing};
  const std::vector<double> sums = statistics_of(a);
  std::vector<double> slopes(sums.size());
  const double loss = finish(sums, weight ? doubles_of(*weight) : std::vector<double>{}, a, options, slopes);
  return {tensor_of({loss}, logits, {}),
          tensor_of(slopes, logits, {statistic_rows, logits.size(0), logits.size(1)})};
}

Tensor dice_ce_backward_cpu(const Tensor& slopes, std::optional<Tensor> scale, const Tensor& logits,
                            const Tensor& labels, std::optional<Tensor> mask, std::string activation,
                            std::string cross_entropy, bool squared, double gamma,
                            std::optional<int64_t> ignore_index) {
  const DiceCeArguments a =
      check_dice_ce(logits, labels, mask, activation, cross_entropy, squared, gamma, ignore_index);
  check_slopes(slopes, scale, a);
  Tensor gradient = new_gradient(logits);
  prefer_huge_pages(gradient);
  const VoxelLayout out = channel_layout(gradient);
  const int64_t classes = out.channels;
  const int64_t out_size = element_size(gradient.scalar_type());
  char* const data = static_cast<char*>(gradient.mutable_data_ptr());
  std::vector<double> of_statistics = doubles_of(slopes);
  if (scale) {
    const double factor = doubles_of(*scale)[0];
    for (double& slope : of_statistics) slope *= factor;
  }
  const DiceCeKernels& kernels = LUNGKIT_SELECT_KERNELS(dice_ce_kernels);
  for_each_chunk(out.batch, out.voxels, chunk_voxels, [&](int64_t b, int64_t, int64_t first, int64_t last) {
    DiceCeChunk work = chunk_of(a, b, first, last);
    const auto scratch =
        std::make_unique_for_overwrite<double[]>(ceil_div(kernels.scratch_bytes(work), sizeof(double)));
    work.scratch = scratch.get();
    std::vector<double> of_image(statistic_rows * classes);
    for (int64_t row = 0; row < statistic_rows; ++row) {
      std::copy_n(&of_statistics[(row * out.batch + b) * classes], classes, &of_image[row * classes]);
    }
    kernels.gradient(work, of_image.data(),
                     data + (b * out.batch_stride + first * out.voxel_stride) * out_size, out.channel_stride,
                     out.voxel_stride);
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lungkit, CPU, m) {
  m.impl("dice_ce_statistics", TORCH_BOX(&dice_ce_statistics_cpu));
  m.impl("dice_ce_loss", TORCH_BOX(&dice_ce_loss_cpu));
  m.impl("dice_ce_backward", TORCH_BOX(&dice_ce_backward_cpu));
}

}  // namespace lungkit
