// dice_ce on CUDA: one launch reads logits and labels and leaves sums of each chunk of voxels in double, a
// second adds these up and finishes the loss; backward is one launch. Chunks depend on the shape alone, and
// additions have a fixed order, so the result has the same bits on every run.
//
// A class index out of range cannot raise without a synchronisation: all sums of its image become NaN, and so
// do the loss and its gradient.
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#define LUNGKIT_ISA cuda
#include "../support/cuda_launch.h"
#include "../support/parallel.h"
#include "arguments.h"
#include "cuda_scalar.h"

#include "cuda_any_classes.h"
#include "cuda_few_classes.h"
#include "cuda_finish.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

bool is_aligned(const Tensor& tensor, const VoxelLayout& layout, int64_t pack) {
  const int64_t size = element_size(tensor.scalar_type()), bytes = std::min<int64_t>(16, pack * size);
  return layout.voxel_stride == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0 &&
         layout.batch_stride * size % bytes == 0 && layout.channel_stride * size % bytes == 0;
}

// Whether the kernels for few classes apply: the usual loss, all of whose accesses are whole and aligned.
bool takes_few_classes(const DiceCeArguments& a) {
  const int64_t pack = 16 / element_size(a.logits.scalar_type());
  const DiceCeOptions& o = a.options;
  return a.class_indices && a.logits_layout.channels >= 2 && a.logits_layout.channels <= most_few_classes &&
         o.activation == Activation::softmax && o.cross_entropy != CrossEntropy::binary && !o.squared &&
         o.gamma == 0 && a.logits_layout.voxels % pack == 0 && is_aligned(a.logits, a.logits_layout, pack) &&
         is_aligned(a.labels, a.labels_layout, pack);
}

// Voxels of a chunk of the first launch, a multiple of `step`. Small chunks give many blocks, which share a
// GPU evenly; but one block of the second launch adds up what each of them leaves, so there are not more than
// it reads in some microseconds.
int64_t chunk_for_sums(const DiceCeArguments& a, int64_t step, int64_t smallest) {
  constexpr int64_t numbers = 1 << 17, fewest_chunks = 512, most_chunks = 8192;
  const int64_t all =
      std::clamp(numbers / partial_width(a.logits_layout.channels), fewest_chunks, most_chunks);
  const int64_t chunks = std::max<int64_t>(1, all / std::max<int64_t>(1, a.logits_layout.batch));
  return std::max(smallest, ceil_div(ceil_div(a.logits_layout.voxels, chunks), step) * step);
}

View view_of(const DiceCeArguments& a, int64_t chunk_voxels) {
  return {.logits = a.logits.const_data_ptr(),
          .labels = a.labels.const_data_ptr(),
          .mask = a.mask ? static_cast<const uint8_t*>(a.mask->const_data_ptr()) : nullptr,
          .logits_layout = a.logits_layout,
          .labels_layout = a.labels_layout,
          .mask_layout = a.mask_layout,
          .labels_type = a.labels.scalar_type(),
          .class_indices = a.class_indices,
          .options = a.options,
          .chunk_voxels = chunk_voxels,
          .chunks = ceil_div(a.logits_layout.voxels, chunk_voxels)};
}

unsigned blocks_of(const View& view) {
  const int64_t blocks = view.logits_layout.batch * view.chunks;
  LUNGKIT_CHECK(blocks < INT32_MAX, "dice_ce: a batch of ", view.logits_layout.batch, " images is too large");
  return static_cast<unsigned>(blocks);
}

template <class Body>
void with_few_classes(int64_t classes, const Body& body) {
  switch (classes) {
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    default: return body(std::integral_constant<int, 4>{});
  }
}

// What the first launch leaves.
struct Sums {
  Tensor memory;
  int64_t images, classes, chunks;

  int64_t outputs() const { return images * partial_width(classes); }
  template <class A>
  Partial<A> of() const {
    return {static_cast<const A*>(memory.const_data_ptr()), images, classes, chunks};
  }
};

// The first launch.
Sums sum_chunks(const DiceCeArguments& a) {
  const int64_t images = a.logits_layout.batch, classes = a.logits_layout.channels;
  const bool few = takes_few_classes(a);
  const int warps = warps_for(classes);
  LUNGKIT_CHECK(few || warps > 0, "dice_ce: ", classes, " classes are more than the CUDA kernel's limit of ",
                granted_shared_bytes / (few_rows * static_cast<int64_t>(sizeof(double))));
  const int64_t step = few ? few_threads * (16 / element_size(a.logits.scalar_type()))
                           : static_cast<int64_t>(warps) * warp_voxels;
  const View view = view_of(a, chunk_for_sums(a, step, few ? 4 * step : step));
  const unsigned blocks = blocks_of(view);
  const Tensor memory = torch::stable::new_empty(a.logits, {images * partial_width(classes) * view.chunks},
                                                 statistics_type(a.logits));
  if (blocks > 0) {
    dispatch_floating(a.logits.scalar_type(), "dice_ce", [&](auto zero) {
      using T = decltype(zero);
      auto* partial = static_cast<accumulate_t<T>*>(memory.mutable_data_ptr());
      if (few) {
        with_few_classes(classes, [&](auto c) {
          if (a.options.needs_rest) {
            LUNGKIT_LAUNCH((few_class_sums<T, decltype(c)::value, true>), blocks, few_threads, 0,
                           current_stream(a.logits), view, partial);
          } else {
            LUNGKIT_LAUNCH((few_class_sums<T, decltype(c)::value, false>), blocks, few_threads, 0,
                           current_stream(a.logits), view, partial);
          }
        });
      } else {
        const size_t shared = warps * few_rows * classes * sizeof(double);
        LUNGKIT_LAUNCH((any_class_sums<T>), blocks, 32 * warps, shared, current_stream(a.logits), view,
                       partial);
      }
    });
  }
  return {memory, images, classes, view.chunks};
}

template <class Body>
void with_statistics_type(const Tensor& logits, const Body& body) {
  return statistics_type(logits) == ScalarType::Double ? body(double{}) : body(float{});
}

Tensor dice_ce_statistics_cuda(const Tensor& logits, const Tensor& labels, std::optional<Tensor> mask,
                               std::string activation, std::string cross_entropy, bool squared, double gamma,
                               std::optional<int64_t> ignore_index) {
  LUNGKIT_CHECK(on_device(logits), "dice_ce: logits must be on the GPU");
  const DeviceGuard guard(logits);
  const DiceCeArguments a =
      check_dice_ce(logits, labels, mask, activation, cross_entropy, squared, gamma, ignore_index);
  const Sums sums = sum_chunks(a);
  const Tensor statistics = torch::stable::new_empty(logits, {statistic_rows, logits.size(0), logits.size(1)},
                                                     statistics_type(logits));
  if (sums.outputs() == 0) return statistics;
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>(ceil_div(sums.outputs(), finish_threads / 32), 1024));
  with_statistics_type(logits, [&](auto zero) {
    using A = decltype(zero);
    LUNGKIT_LAUNCH((collect_statistics<A>), blocks, finish_threads, 0, current_stream(logits), sums.of<A>(),
                   static_cast<A*>(statistics.mutable_data_ptr()));
  });
  return statistics;
}

std::tuple<Tensor, Tensor> dice_ce_loss_cuda(const Tensor& logits, const Tensor& labels,
                                             std::optional<Tensor> mask, std::optional<Tensor> weight,
                                             std::string activation, std::string cross_entropy, bool squared,
                                             double gamma, std::optional<int64_t> ignore_index,
                                             bool include_background, bool jaccard, bool batch, bool mean,
                                             double smooth_nr, double smooth_dr, double lambda_dice,
                                             double lambda_ce, double label_smoothing) {
  LUNGKIT_CHECK(on_device(logits), "dice_ce: logits must be on the GPU");
  const DeviceGuard guard(logits);
  DiceCeArguments a =
      check_dice_ce(logits, labels, mask, activation, cross_entropy, squared, gamma, ignore_index);
  check_weight(weight, a);
  LUNGKIT_CHECK(!weight || (on_device(*weight) && weight->stride(0) == 1),
                "dice_ce: weight must be contiguous and on the GPU");
  a.options.needs_rest = label_smoothing > 0 || a.options.cross_entropy == CrossEntropy::binary;
  const LossOptions options{include_background, jaccard,     batch,     mean,           smooth_nr,
                            smooth_dr,          lambda_dice, lambda_ce, label_smoothing};
  const bool binary = a.options.cross_entropy == CrossEntropy::binary;
  const Sums sums = sum_chunks(a);
  const ScalarType type = statistics_type(logits);
  const Tensor loss = torch::stable::new_empty(logits, {}, type);
  const Tensor slopes = torch::stable::new_empty(logits, {statistic_rows, sums.images, sums.classes}, type);
  const Tensor totals = torch::stable::new_empty(logits, {sums.outputs()}, ScalarType::Double);
  with_statistics_type(logits, [&](auto zero) {
    using A = decltype(zero);
    LUNGKIT_LAUNCH((finish_loss<A>), 1, finish_threads, 0, current_stream(logits), sums.of<A>(),
                   weight ? static_cast<const A*>(weight->const_data_ptr()) : nullptr, a.class_indices,
                   binary, options, static_cast<double*>(totals.mutable_data_ptr()),
                   static_cast<A*>(loss.mutable_data_ptr()), static_cast<A*>(slopes.mutable_data_ptr()));
  });
  return {loss, slopes};
}

Tensor dice_ce_backward_cuda(const Tensor& slopes, std::optional<Tensor> scale, const Tensor& logits,
                             const Tensor& labels, std::optional<Tensor> mask, std::string activation,
                             std::string cross_entropy, bool squared, double gamma,
                             std::optional<int64_t> ignore_index) {
  LUNGKIT_CHECK(on_device(logits) && on_device(slopes) && (!scale || on_device(*scale)),
                "dice_ce: logits, slopes and scale must be on the GPU");
  const DeviceGuard guard(logits);
  const DiceCeArguments a =
      check_dice_ce(logits, labels, mask, activation, cross_entropy, squared, gamma, ignore_index);
  check_slopes(slopes, scale, a);
  const Tensor contiguous_slopes = torch::stable::contiguous(slopes);
  const Tensor gradient = new_gradient(logits);
  const VoxelLayout out = channel_layout(gradient);
  const bool few = takes_few_classes(a) && out.voxel_stride == 1;
  const int64_t step = few ? few_threads * (16 / element_size(logits.scalar_type())) : most_warps * 32;
  const View view = view_of(a, 2 * step);
  const unsigned blocks = blocks_of(view);
  if (blocks == 0) return gradient;
  dispatch_floating(logits.scalar_type(), "dice_ce", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const auto* of_statistics = static_cast<const A*>(contiguous_slopes.const_data_ptr());
    const auto* factor = scale ? static_cast<const A*>(scale->const_data_ptr()) : nullptr;
    auto* to = static_cast<T*>(gradient.mutable_data_ptr());
    if (few) {
      with_few_classes(out.channels, [&](auto c) {
        LUNGKIT_LAUNCH((few_class_gradient<T, decltype(c)::value>), blocks, few_threads, 0,
                       current_stream(logits), view, of_statistics, factor, to);
      });
    } else {
      LUNGKIT_LAUNCH((any_class_gradient<T>), blocks, most_warps * 32, 0, current_stream(logits), view,
                     of_statistics, factor, out, to);
    }
  });
  return gradient;
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA

LUNGKIT_CUDA_LIBRARY(m) {
  m.impl("dice_ce_statistics", TORCH_BOX(&lungkit::cuda::dice_ce_statistics_cuda));
  m.impl("dice_ce_loss", TORCH_BOX(&lungkit::cuda::dice_ce_loss_cuda));
  m.impl("dice_ce_backward", TORCH_BOX(&lungkit::cuda::dice_ce_backward_cuda));
}
