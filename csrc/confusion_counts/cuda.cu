// Each thread takes a group of neighbouring voxels at a time, by 16-byte loads where addresses allow it. Up
// to four classes are counted in registers. With more, a thread holds a run of equal (prediction, label) and
// adds it to counters in shared memory when another begins: labels come in runs. Integers: the order of
// additions does not matter, so the result is exact and reproducible. A block adds to the output once.
//
// A class index outside 0 .. num_classes - 1 cannot raise without a synchronisation: such a voxel is left out
// of `counts` and of `voxels`, so that voxels + ignored < the image's voxels reveals it.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../support/cuda_launch.h"
#include "../support/parallel.h"
#include "arguments.h"
#include "cuda_counters.h"

namespace lungkit {
namespace {

using Count = unsigned long long;  // CUDA's 64-bit atomicAdd takes this type; the output tensors hold int64

constexpr int64_t max_shared_classes =
    2048;  // 3 counters of 4 bytes each: half of the 48 KB that need no opt-in

// A block's 32-bit counters hold its share of one image: the grid is widened past this many voxels a block.
constexpr int64_t max_voxels_per_block = int64_t{1} << 30;

// Pred is the type of the logits, or void for class indices.
template <class Pred, Classes classes>
__global__ void __launch_bounds__(block_threads, std::is_same_v<Pred, double> ? 3 : 4)
    confusion_counts_kernel(ConfusionView view, bool shared_counters, Count* __restrict__ counts,
                            Count* __restrict__ voxels) {
  LUNGKIT_DYNAMIC_SHARED(unsigned, local);  // (num_classes, 3), then the voxels counted
  const int64_t image = blockIdx.y;
  const int width = 3 * view.num_classes;
  const int local_size = shared_counters ? width + 1 : 1;
  for (int k = threadIdx.x; k < local_size; k += block_threads) local[k] = 0;
  __syncthreads();

  Count* const image_counts = counts + image * width;
  unsigned* const seen = local + (local_size - 1);
  const auto add = [&](int k, unsigned count) {
    if (shared_counters) {
      atomicAdd(&local[k], count);
    } else {
      atomicAdd(&image_counts[k], Count{count});
    }
  };
  Counter<classes> counter;
  for (int64_t first = blockIdx.x * int64_t{block_voxels}; first < view.label_layout.voxels;
       first += gridDim.x * int64_t{block_voxels}) {
    const Group group(view, first);
    if constexpr (classes == Classes::few_bytes) {
      const uint2 guesses = bytes_of(view.pred, view.pred_layout, image, group),
                  labels = bytes_of(view.labels, view.label_layout, image, group);
      counter.see_bytes(guesses.x, labels.x, view);
      counter.see_bytes(guesses.y, labels.y, view);
    } else {
      if constexpr (classes == Classes::two && std::is_void_v<Pred>) {
        if (view.bytes && group.whole) {
          const uint2 guesses = bytes_of(view.pred, view.pred_layout, image, group),
                      labels = bytes_of(view.labels, view.label_layout, image, group);
          counter.see_bytes(guesses.x, labels.x, view.ignored);
          counter.see_bytes(guesses.y, labels.y, view.ignored);
          continue;
        }
      }
      int labels[group_voxels], guesses[group_voxels];
      load_codes(view.labels, view.label_type, view.label_layout, view, image, group, view.ignored, labels);
      if constexpr (std::is_void_v<Pred>) {
        load_codes(view.pred, view.pred_type, view.pred_layout, view, image, group, -1, guesses);
      } else {
        load_argmax<Pred>(view, image, group, guesses);
      }
      if (!group.whole) {
#pragma unroll
        for (int k = 0; k < group_voxels; ++k) labels[k] = group.has(k) ? labels[k] : not_counted;
      }
#pragma unroll
      for (int k = 0; k < group_voxels; ++k) counter.see(guesses[k], labels[k], add);
    }
    counter.end_of_group(add);
  }
  counter.finish(add);
  atomicAdd(seen, counter.voxels);
  __syncthreads();
  if (shared_counters) {
    for (int k = threadIdx.x; k < width; k += block_threads) {
      if (local[k]) atomicAdd(&image_counts[k], Count{local[k]});
    }
  }
  if (threadIdx.x == 0) atomicAdd(&voxels[image], Count{*seen});
}

template <class T>
bool is_packed(const Tensor& tensor, const VoxelLayout& layout) {
  constexpr int64_t bytes = alignof(Pack<T>), size = sizeof(T);
  return layout.voxel_stride == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0 &&
         layout.batch_stride * size % bytes == 0 && layout.channel_stride * size % bytes == 0;
}

bool is_packed(const Tensor& tensor, const VoxelLayout& layout) {
  bool packed = false;
  dispatch_elements(tensor.scalar_type(), "confusion_counts",
                    [&](auto zero) { packed = is_packed<decltype(zero)>(tensor, layout); });
  return packed;
}

template <class Pred>
void launch_confusion_counts(const ConfusionArguments& a, const Tensor& counts, const Tensor& voxels) {
#ifdef LUNGKIT_EMULATE
  constexpr int64_t fewest_blocks = 2, most_blocks = 2;  // small inputs reach many groups a thread too
#else
  // Of an image: a block's counters cost as much as some hundred voxels of each thread.
  constexpr int64_t fewest_blocks = 128, most_blocks = 1024;
#endif
  constexpr int64_t max_images_per_launch = 65535;
  const int64_t images = a.label_layout.batch, of_image = a.label_layout.voxels;
  const int64_t blocks_per_image = std::max(fewest_blocks, most_blocks / std::max<int64_t>(images, 1));
  const int64_t blocks = std::max(std::min(ceil_div(of_image, block_voxels), blocks_per_image),
                                  ceil_div(of_image, max_voxels_per_block));
  const bool shared_counters = a.num_classes <= max_shared_classes;
  const size_t shared_bytes = sizeof(unsigned) * (shared_counters ? 3 * a.num_classes + 1 : 1);
  const int64_t pred_size = element_size(a.pred.scalar_type());
  const int64_t label_size = element_size(a.labels.scalar_type());
  const bool packed = is_packed(a.pred, a.pred_layout) && is_packed(a.labels, a.label_layout);
  auto* count_out = static_cast<Count*>(counts.mutable_data_ptr());
  auto* voxel_out = static_cast<Count*>(voxels.mutable_data_ptr());
  for (int64_t first = 0; first < images; first += max_images_per_launch) {
    const ConfusionView view{
        .pred = static_cast<const char*>(a.pred.const_data_ptr()) +
                first * a.pred_layout.batch_stride * pred_size,
        .labels = static_cast<const char*>(a.labels.const_data_ptr()) +
                  first * a.label_layout.batch_stride * label_size,
        .pred_type = a.pred.scalar_type(),
        .label_type = a.labels.scalar_type(),
        .pred_layout = a.pred_layout,
        .label_layout = a.label_layout,
        .num_classes = static_cast<int>(a.num_classes),
        .ignored =
            a.ignore_index && *a.ignore_index >= 0 && *a.ignore_index < a.num_classes ? *a.ignore_index : -1,
        .packed = packed,
        .bytes = packed && pred_size == 1 && label_size == 1};
    const dim3 grid(static_cast<unsigned>(blocks),
                    static_cast<unsigned>(std::min(images - first, max_images_per_launch)));
    const auto launch = [&]<Classes classes>(std::integral_constant<Classes, classes>) {
      LUNGKIT_LAUNCH((confusion_counts_kernel<Pred, classes>), grid, block_threads, shared_bytes,
                     current_stream(a.labels), view, shared_counters, count_out + first * 3 * a.num_classes,
                     voxel_out + first);
    };
    if (a.num_classes == 2) {
      launch(std::integral_constant<Classes, Classes::two>{});
    } else if (std::is_void_v<Pred> && view.bytes && a.num_classes > 2 && a.num_classes <= few_classes) {
      if constexpr (std::is_void_v<Pred>) launch(std::integral_constant<Classes, Classes::few_bytes>{});
    } else if (a.num_classes <= few_classes) {
      launch(std::integral_constant<Classes, Classes::few>{});
    } else {
      launch(std::integral_constant<Classes, Classes::any>{});
    }
  }
}

std::tuple<Tensor, Tensor> confusion_counts_cuda(const Tensor& pred, const Tensor& labels,
                                                 int64_t num_classes, std::optional<int64_t> ignore_index) {
  const ConfusionArguments a = check_confusion_counts(pred, labels, num_classes, ignore_index);
  LUNGKIT_CHECK(on_device(a.labels), "confusion_counts: pred and labels must be on the GPU");
  const DeviceGuard guard(a.labels);
  auto [counts, voxels] = new_confusion_outputs(a.labels, a.label_layout.batch, num_classes);
  if (a.label_layout.batch * a.label_layout.voxels == 0) return {counts, voxels};
  if (a.logits) {
    dispatch_floating(a.pred.scalar_type(), "confusion_counts",
                      [&](auto zero) { launch_confusion_counts<decltype(zero)>(a, counts, voxels); });
  } else {
    launch_confusion_counts<void>(a, counts, voxels);
  }
  return {counts, voxels};
}

}  // namespace

LUNGKIT_CUDA_LIBRARY(m) {
  m.impl("confusion_counts", TORCH_BOX(&confusion_counts_cuda));
}

}  // namespace lungkit
