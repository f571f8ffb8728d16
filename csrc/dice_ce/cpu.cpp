#include <atomic>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../support/huge_pages.h"
#include "../support/parallel.h"
#include "finish.h"
#include "kernel.h"
#include "ops.h"

namespace lungkit {
namespace {

constexpr int64_t chunk_voxels = 1 << 14;

// The chunk of image b that begins at voxel `first`, without scratch.
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

// The same with the scratch that its kernel needs.
struct Work {
  DiceCeChunk chunk;
  std::unique_ptr<double[]> scratch;

  Work(const DiceCeKernels& kernels, const DiceCeArguments& a, int64_t b, int64_t first, int64_t last)
      : chunk(chunk_of(a, b, first, last)),
        scratch(std::make_unique_for_overwrite<double[]>(
            ceil_div(kernels.scratch_bytes(chunk), sizeof(double)))) {
    chunk.scratch = scratch.get();
  }
};

// Names the first class index that is none; runs only once an error is certain.
template <class Label>
void fail_on_invalid(const DiceCeArguments& a) {
  const int64_t classes = a.logits_layout.channels == 1 ? 2 : a.logits_layout.channels;
  const DiceCeOptions& o = a.options;
  const auto* labels = static_cast<const Label*>(a.labels.const_data_ptr());
  const auto* mask = a.mask ? static_cast<const uint8_t*>(a.mask->const_data_ptr()) : nullptr;
  const std::string ignored = o.has_ignore_index ? "ignore_index is " + std::to_string(o.ignore_index)
                                                 : std::string("no ignore_index is set");
  for (int64_t b = 0; b < a.labels_layout.batch; ++b) {
    for (int64_t v = 0; v < a.labels_layout.voxels; ++v) {
      if (mask && !mask[b * a.mask_layout.batch_stride + v * a.mask_layout.voxel_stride]) continue;
      const Label stored = labels[b * a.labels_layout.batch_stride + v * a.labels_layout.voxel_stride];
      using Shown = std::conditional_t<std::is_integral_v<Label>, int64_t, double>;
      const auto value = static_cast<Shown>(stored), whole = static_cast<Shown>(std::round(value));
      const bool is_whole = std::abs(value - whole) <= index_tolerance;
      if (is_whole && o.has_ignore_index && whole == static_cast<Shown>(o.ignore_index)) continue;
      if (is_whole && whole >= 0 && whole < static_cast<Shown>(classes)) continue;
      const char* advice = "";
      if (value == 255 && classes == 2) {
        advice =
            "; of a mask of 0 and 255 pass (mask > 0), or ignore_index=255 where 255 marks voxels to leave "
            "out";
      } else if (!is_whole) {
        advice = "; class indices are whole numbers, and soft labels need one channel a class, (B, C, *S)";
      }
      fail("dice_ce: labels hold the value ", value, " in image ", b, "; classes are 0..", classes - 1,
           " and ", ignored, advice);
    }
  }
  fail("dice_ce: labels hold the value of no class, but changed while they were read");
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
    const Work work(kernels, a, b, first, last);
    if (!kernels.sums(work.chunk, &partial[(b * chunks + chunk) * width])) valid = false;
  });
  if (!valid) {
    dispatch_elements(a.labels.scalar_type(), "dice_ce",
                      [&](auto zero) { fail_on_invalid<decltype(zero)>(a); });
  }
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

// One thread alone, for finish().
struct Alone {
  int64_t rank() const { return 0; }
  int64_t size() const { return 1; }
  void add_up(double&, double&, double&) const {}
};

struct Cpu {
  static Tensor statistics(const DiceCeArguments& a) {
    return tensor_of(statistics_of(a), a.logits,
                     {statistic_rows, a.logits_layout.batch, a.logits_layout.channels});
  }

  static std::tuple<Tensor, Tensor> loss(const DiceCeArguments& a, const std::optional<Tensor>& weight) {
    const int64_t images = a.logits_layout.batch, classes = a.logits_layout.channels;
    const std::vector<double> sums = statistics_of(a);
    const std::vector<double> weights =
        weight ? doubles_of(*weight) : std::vector<double>(static_cast<size_t>(classes), 1.0);
    std::vector<double> slopes(sums.size());
    const auto at = [&](int64_t row, int64_t b, int64_t c) { return (row * images + b) * classes + c; };
    const double loss = finish(
        Alone{}, images, classes, a.class_indices, a.options, LossFactors(images, classes, a.options),
        [&](Row row, int64_t b, int64_t c) { return sums[at(row, b, c)]; },
        [&](int64_t c) { return weights[c]; },
        [&](Row row, int64_t b, int64_t c, double value) { slopes[at(row, b, c)] = value; });
    return {tensor_of({loss}, a.logits, {}), tensor_of(slopes, a.logits, {statistic_rows, images, classes})};
  }

  static void differentiate(const DiceCeArguments& a, const Tensor& slopes,
                            const std::optional<Tensor>& scale, Tensor& gradient) {
    prefer_huge_pages(gradient);
    const VoxelLayout out = channel_layout(gradient);
    const int64_t out_size = element_size(gradient.scalar_type());
    char* const data = static_cast<char*>(gradient.mutable_data_ptr());
    std::vector<double> of_statistics = doubles_of(slopes);
    if (scale) {
      const double factor = doubles_of(*scale)[0];
      for (double& slope : of_statistics) slope *= factor;
    }
    const DiceCeKernels& kernels = LUNGKIT_SELECT_KERNELS(dice_ce_kernels);
    for_each_chunk(out.batch, out.voxels, chunk_voxels, [&](int64_t b, int64_t, int64_t first, int64_t last) {
      const Work work(kernels, a, b, first, last);
      std::vector<double> of_image(statistic_rows * out.channels);
      for (int64_t row = 0; row < statistic_rows; ++row) {
        std::copy_n(&of_statistics[(row * out.batch + b) * out.channels], out.channels,
                    &of_image[row * out.channels]);
      }
      kernels.gradient(work.chunk, of_image.data(),
                       data + (b * out.batch_stride + first * out.voxel_stride) * out_size,
                       out.channel_stride, out.voxel_stride);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lungkit, CPU, m) {
  DiceCeOps<Cpu>::add_to(m);
}

}  // namespace lungkit
