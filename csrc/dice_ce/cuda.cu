// dice_ce on CUDA: one launch reads logits and labels and leaves sums of each chunk of voxels in double, a
// second adds these up and finishes the loss; backward is one launch. Chunks depend on the shape alone, and
// additions have a fixed order, so the result has the same bits on every run.
//
// A class index out of range cannot raise without a synchronisation: all sums of its image become NaN, and so
// do the loss and its gradient.
#include <optional>
#include <tuple>

#define LUNGKIT_ISA cuda
#include "../support/cuda_launch.h"
#include "../support/cuda_maths.h"
#include "../support/parallel.h"
#include "ops.h"

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
  return a.class_indices && is_class_index(a.labels.scalar_type()) && a.logits_layout.channels >= 2 &&
         a.logits_layout.channels <= most_few_classes && o.activation == Activation::softmax &&
         o.cross_entropy != CrossEntropy::binary && !o.squared && o.gamma == 0 &&
         a.logits_layout.voxels % pack == 0 && is_aligned(a.logits, a.logits_layout, pack) &&
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
                (granted_shared_bytes / static_cast<int64_t>(sizeof(double)) - 1) / class_rows);
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
        const auto shared = static_cast<size_t>(warps * warp_bytes(classes));
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

struct Cuda {
  static Tensor statistics(const DiceCeArguments& a) {
    const DeviceGuard guard(a.logits);
    const Sums sums = sum_chunks(a);
    const Tensor statistics = torch::stable::new_empty(a.logits, {statistic_rows, sums.images, sums.classes},
                                                       statistics_type(a.logits));
    if (sums.outputs() == 0) return statistics;
    const auto blocks =
        static_cast<unsigned>(std::min<int64_t>(ceil_div(sums.outputs(), finish_threads / 32), 1024));
    with_statistics_type(a.logits, [&](auto zero) {
      using A = decltype(zero);
      LUNGKIT_LAUNCH((collect_statistics<A>), blocks, finish_threads, 0, current_stream(a.logits),
                     sums.of<A>(), static_cast<A*>(statistics.mutable_data_ptr()));
    });
    return statistics;
  }

  static std::tuple<Tensor, Tensor> loss(const DiceCeArguments& a, const std::optional<Tensor>& weight) {
    const DeviceGuard guard(a.logits);
    const Sums sums = sum_chunks(a);
    const ScalarType type = statistics_type(a.logits);
    const Tensor loss = torch::stable::new_empty(a.logits, {}, type);
    const Tensor slopes =
        torch::stable::new_empty(a.logits, {statistic_rows, sums.images, sums.classes}, type);
    const Tensor totals = torch::stable::new_empty(a.logits, {sums.outputs()}, ScalarType::Double);
    with_statistics_type(a.logits, [&](auto zero) {
      using A = decltype(zero);
      LUNGKIT_LAUNCH((finish_loss<A>), 1, finish_threads, 0, current_stream(a.logits), sums.of<A>(),
                     weight ? static_cast<const A*>(weight->const_data_ptr()) : nullptr, a.class_indices,
                     a.options, static_cast<double*>(totals.mutable_data_ptr()),
                     static_cast<A*>(loss.mutable_data_ptr()), static_cast<A*>(slopes.mutable_data_ptr()));
    });
    return {loss, slopes};
  }

  static void differentiate(const DiceCeArguments& a, const Tensor& slopes,
                            const std::optional<Tensor>& scale, Tensor& gradient) {
    const DeviceGuard guard(a.logits);
    const VoxelLayout out = channel_layout(gradient);
    const bool few = takes_few_classes(a) && out.voxel_stride == 1;
    const int64_t step = few ? few_threads * (16 / element_size(a.logits.scalar_type())) : most_warps * 32;
    const View view = view_of(a, 2 * step);
    const unsigned blocks = blocks_of(view);
    if (blocks == 0) return;
    dispatch_floating(a.logits.scalar_type(), "dice_ce", [&](auto zero) {
      using T = decltype(zero);
      using A = accumulate_t<T>;
      const auto* of_statistics = static_cast<const A*>(slopes.const_data_ptr());
      const auto* factor = scale ? static_cast<const A*>(scale->const_data_ptr()) : nullptr;
      auto* to = static_cast<T*>(gradient.mutable_data_ptr());
      if (few) {
        with_few_classes(out.channels, [&](auto c) {
          LUNGKIT_LAUNCH((few_class_gradient<T, decltype(c)::value>), blocks, few_threads, 0,
                         current_stream(a.logits), view, of_statistics, factor, to);
        });
      } else {
        LUNGKIT_LAUNCH((any_class_gradient<T>), blocks, most_warps * 32, 0, current_stream(a.logits), view,
                       of_statistics, factor, out, to);
      }
    });
  }
};

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA

LUNGKIT_CUDA_LIBRARY(m) {
  lungkit::DiceCeOps<lungkit::cuda::Cuda>::add_to(m);
}
