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

// Whether the kernels for few classes know the loss.
bool knows_few_classes(const DiceCeArguments& a) {
  const DiceCeOptions& o = a.options;
  return a.logits.scalar_type() != ScalarType::Double && a.class_indices &&
         is_class_index(a.labels.scalar_type()) && a.logits_layout.channels >= 2 &&
         a.logits_layout.channels <= most_few_classes && o.activation == Activation::softmax &&
         o.cross_entropy != CrossEntropy::binary && !o.squared && o.gamma == 0 &&
         (!o.has_ignore_index || o.ignore_index == static_cast<int>(o.ignore_index));
}

// Whether `count` elements from any multiple of `count` on are an aligned Pack.
bool is_aligned(const Tensor& tensor, int64_t stride, int64_t count) {
  const int64_t size = element_size(tensor.scalar_type()), bytes = std::min<int64_t>(16, count * size);
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0 && stride * size % bytes == 0;
}

// How the kernels for few classes read the tensors, if they can: labels and mask must have no gaps, and the
// logits none but between images and classes. `out` is the layout of the gradient, if there is one.
std::optional<Access> few_class_access(const DiceCeArguments& a, const VoxelLayout* out) {
  const VoxelLayout& l = a.logits_layout;
  const auto has_gaps = [&](const VoxelLayout& layout, int64_t step) {
    return layout.voxel_stride != step && l.voxels > 1;
  };
  if (!knows_few_classes(a) || has_gaps(a.labels_layout, 1) || (a.mask && has_gaps(a.mask_layout, 1))) {
    return std::nullopt;
  }
  const int64_t count = 16 / element_size(a.logits.scalar_type());
  const bool whole = l.voxels % count == 0 && is_aligned(a.logits, l.batch_stride, count) &&
                     is_aligned(a.labels, a.labels_layout.batch_stride, count) &&
                     (!a.mask || is_aligned(*a.mask, a.mask_layout.batch_stride, count));
  if (!has_gaps(l, 1) && (out == nullptr || !has_gaps(*out, 1))) {
    return whole && is_aligned(a.logits, l.channel_stride, count) ? Access::planes : Access::plane_elements;
  }
  const auto by_voxel = [&](const VoxelLayout& layout) {
    return layout.channel_stride == 1 && !has_gaps(layout, l.channels);
  };
  if (!by_voxel(l) || (out != nullptr && !by_voxel(*out))) return std::nullopt;
  return whole ? Access::interleaved : Access::interleaved_elements;
}

// Whether labels are uint8, or bool, and all of them count.
bool has_plain_labels(const DiceCeArguments& a) {
  return element_size(a.labels.scalar_type()) == 1 && !a.mask && !a.options.has_ignore_index;
}

// Voxels of a chunk of the first launch. Chunks depend on the shape alone; there are enough for every GPU to
// share them evenly, and few enough that one block of the second launch adds up what they leave in some
// microseconds.
int64_t few_class_chunk(const DiceCeArguments& a) {
#ifdef LUNGKIT_EMULATE
  constexpr int64_t chunks = 4;  // small inputs have to reach several runs a thread too
#else
  const int64_t classes = a.logits_layout.channels;
  const int64_t chunks = classes == 2 ? 1024 : classes == 3 ? 768 : 640;  // an H100 holds as many blocks
#endif
  constexpr int64_t fewest = few_threads * run_voxels;
  const int64_t step = few_threads * (16 / element_size(a.logits.scalar_type()));
  const int64_t of_image = std::max<int64_t>(1, chunks / std::max<int64_t>(1, a.logits_layout.batch));
  const int64_t wanted = ceil_div(ceil_div(a.logits_layout.voxels, of_image), step) * step;
  return std::clamp(wanted, fewest, fewest * most_runs);
}

int64_t any_class_chunk(const DiceCeArguments& a, int64_t step) {
  constexpr int64_t numbers = 1 << 17, fewest_chunks = 512, most_chunks = 8192;
  const int64_t all =
      std::clamp(numbers / partial_width(a.logits_layout.channels), fewest_chunks, most_chunks);
  const int64_t chunks = std::max<int64_t>(1, all / std::max<int64_t>(1, a.logits_layout.batch));
  return std::max(step, ceil_div(ceil_div(a.logits_layout.voxels, chunks), step) * step);
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
          .chunks = static_cast<unsigned>(ceil_div(a.logits_layout.voxels, chunk_voxels))};
}

unsigned blocks_of(const View& view) {
  const int64_t chunks = ceil_div(view.logits_layout.voxels, view.chunk_voxels);
  LUNGKIT_CHECK(view.logits_layout.batch * chunks < INT32_MAX, "dice_ce: a batch of ",
                view.logits_layout.batch, " images of ", view.logits_layout.voxels, " voxels is too large");
  return static_cast<unsigned>(view.logits_layout.batch * chunks);
}

template <Access access, bool plain>
struct Way {};

// Calls body(T{}, classes, way) with what chooses a kernel for few classes. Element by element all labels
// take one kernel.
template <class Body>
void with_few_classes(const DiceCeArguments& a, Access access, bool plain, const Body& body) {
  const auto with_way = [&](auto zero, auto classes) {
    switch (access) {
      case Access::planes:
        return plain ? body(zero, classes, Way<Access::planes, true>{})
                     : body(zero, classes, Way<Access::planes, false>{});
      case Access::interleaved:
        return plain ? body(zero, classes, Way<Access::interleaved, true>{})
                     : body(zero, classes, Way<Access::interleaved, false>{});
      case Access::plane_elements: return body(zero, classes, Way<Access::plane_elements, false>{});
      default: return body(zero, classes, Way<Access::interleaved_elements, false>{});
    }
  };
  dispatch_floating(a.logits.scalar_type(), "dice_ce", [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), double>) {
      switch (a.logits_layout.channels) {
        case 2: return with_way(zero, std::integral_constant<int, 2>{});
        case 3: return with_way(zero, std::integral_constant<int, 3>{});
        default: return with_way(zero, std::integral_constant<int, 4>{});
      }
    }
  });
}

// What the first launch leaves.
struct Sums {
  Tensor memory;
  int64_t images, classes;
  unsigned chunks;

  int64_t outputs() const { return images * partial_width(classes); }
  template <class A>
  Partial<A> of() const {
    return {static_cast<const A*>(memory.const_data_ptr()), images, static_cast<int>(classes),
            static_cast<int>(chunks)};
  }
};

// The first launch.
Sums sum_chunks(const DiceCeArguments& a) {
  const int64_t images = a.logits_layout.batch, classes = a.logits_layout.channels;
  const auto few = few_class_access(a, nullptr);
  const int warps = warps_for(classes);
  LUNGKIT_CHECK(few || warps > 0, "dice_ce: ", classes, " classes are more than the CUDA kernel's limit of ",
                (granted_shared_bytes / static_cast<int64_t>(sizeof(double)) - 1) / class_rows);
  const View view =
      view_of(a, few ? few_class_chunk(a) : any_class_chunk(a, static_cast<int64_t>(warps) * warp_voxels));
  const unsigned blocks = blocks_of(view);
  const Tensor memory = torch::stable::new_empty(a.logits, {images * partial_width(classes) * view.chunks},
                                                 statistics_type(a.logits));
  const Sums sums{memory, images, classes, view.chunks};
  if (blocks == 0) return sums;
  if (few) {
    with_few_classes(a, *few, has_plain_labels(a) && !a.options.needs_rest,
                     [&]<class T, class Classes, Access access, bool plain>(T, Classes, Way<access, plain>) {
                       LUNGKIT_LAUNCH((few_class_sums<T, Classes::value, access, plain>), blocks, few_threads,
                                      0, current_stream(a.logits), view,
                                      static_cast<float*>(memory.mutable_data_ptr()));
                     });
  } else {
    dispatch_floating(a.logits.scalar_type(), "dice_ce", [&](auto zero) {
      using T = decltype(zero);
      const auto shared = static_cast<size_t>(warps * warp_bytes(classes));
      LUNGKIT_LAUNCH((any_class_sums<T>), blocks, 32 * warps, shared, current_stream(a.logits), view,
                     static_cast<accumulate_t<T>*>(memory.mutable_data_ptr()));
    });
  }
  return sums;
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
    LUNGKIT_CHECK(statistic_rows * sums.outputs() < INT32_MAX, "dice_ce: ", sums.images, " images of ",
                  sums.classes, " classes are too many for one loss");
    const ScalarType type = statistics_type(a.logits);
    const Tensor loss = torch::stable::new_empty(a.logits, {}, type);
    const Tensor slopes =
        torch::stable::new_empty(a.logits, {statistic_rows, sums.images, sums.classes}, type);
    std::optional<Tensor> totals;
    if (sums.outputs() > most_shared_sums) {
      totals = torch::stable::new_empty(a.logits, {sums.outputs()}, ScalarType::Double);
    }
    with_statistics_type(a.logits, [&](auto zero) {
      using A = decltype(zero);
      const auto finish_by = [&]<class Team>(Team team) {
        LUNGKIT_LAUNCH((finish_loss<A, Team>), 1, finish_threads, 0, current_stream(a.logits), sums.of<A>(),
                       weight ? static_cast<const A*>(weight->const_data_ptr()) : nullptr, a.class_indices,
                       a.options, LossFactors(sums.images, sums.classes, a.options), team,
                       totals ? static_cast<double*>(totals->mutable_data_ptr()) : nullptr,
                       static_cast<A*>(loss.mutable_data_ptr()), static_cast<A*>(slopes.mutable_data_ptr()));
      };
      const int64_t terms = sums.images * sums.classes;
      terms <= most_warp_terms ? finish_by(Warp(terms)) : finish_by(Block(terms));
    });
    return {loss, slopes};
  }

  static void differentiate(const DiceCeArguments& a, const Tensor& slopes,
                            const std::optional<Tensor>& scale, Tensor& gradient) {
    const DeviceGuard guard(a.logits);
    const VoxelLayout out = channel_layout(gradient);
    const auto few = few_class_access(a, &out);
    const View view = view_of(a, few ? few_threads * run_voxels : 2 * 32 * most_warps);
    const unsigned blocks = blocks_of(view);
    if (blocks == 0) return;
    if (few) {
      with_few_classes(
          a, *few, has_plain_labels(a),
          [&]<class T, class Classes, Access access, bool plain>(T, Classes, Way<access, plain>) {
            LUNGKIT_LAUNCH((few_class_gradient<T, Classes::value, access, plain>), blocks, few_threads, 0,
                           current_stream(a.logits), view, static_cast<const float*>(slopes.const_data_ptr()),
                           scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr, out,
                           static_cast<T*>(gradient.mutable_data_ptr()));
          });
      return;
    }
    dispatch_floating(a.logits.scalar_type(), "dice_ce", [&](auto zero) {
      using T = decltype(zero);
      using A = accumulate_t<T>;
      LUNGKIT_LAUNCH((any_class_gradient<T>), blocks, most_warps * 32, 0, current_stream(a.logits), view,
                     static_cast<const A*>(slopes.const_data_ptr()),
                     scale ? static_cast<const A*>(scale->const_data_ptr()) : nullptr, out,
                     static_cast<T*>(gradient.mutable_data_ptr()));
    });
  }
};

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA

LUNGKIT_CUDA_LIBRARY(m) {
  lungkit::DiceCeOps<lungkit::cuda::Cuda>::add_to(m);
}
