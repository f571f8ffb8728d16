// One thread a voxel at a time over a fixed grid; TP, FP and FN are counted in shared memory (integers: the
// order of additions does not matter, so the result is exact and reproducible) and added to the output once a
// block.
//
// A class index outside 0 .. num_classes - 1 cannot raise without a synchronisation: such a voxel is left out
// of `counts` and of `voxels`, so that voxels + ignored < the image's voxels reveals it.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../support/cuda_launch.h"
#include "../support/parallel.h"
#include "arguments.h"

namespace lungkit {
namespace {

using Count = unsigned long long;  // CUDA's 64-bit atomicAdd takes this type; the output tensors hold int64

constexpr int block_threads = 256;
constexpr int64_t max_shared_classes =
    2048;  // 3 counters of 4 bytes each: half of the 48 KB that need no opt-in

// A block's 32-bit counters hold its share of one image: the grid is widened past this many voxels a block.
constexpr int64_t max_voxels_per_block = int64_t{1} << 30;

struct ConfusionView {
  VoxelLayout pred;
  VoxelLayout labels;
  int64_t num_classes;
  int64_t ignore_index;
  bool has_ignore_index;
};

template <class T>
__device__ int64_t argmax(const T* logits, const VoxelLayout& layout) {
  using Real = accumulate_t<T>;
  Real best = static_cast<Real>(*logits);
  if (layout.channels == 1) return best > Real(0) ? 1 : 0;
  int64_t index = 0;
  for (int64_t c = 1; c < layout.channels; ++c) {
    const Real value = static_cast<Real>(logits[c * layout.channel_stride]);
    if (value > best || (value != value && best == best)) {  // NaN counts as the largest, as in torch.argmax
      best = value;
      index = c;
    }
  }
  return index;
}

template <class Pred, bool logits>
__device__ int64_t predicted_class(const Pred* pred, const VoxelLayout& layout) {
  if constexpr (logits) {
    return argmax(pred, layout);
  } else {
    return static_cast<int64_t>(*pred);
  }
}

template <class Pred, class Label, bool logits>
__global__ void confusion_counts_kernel(const Pred* __restrict__ pred, const Label* __restrict__ labels,
                                        ConfusionView view, bool shared_counters, Count* __restrict__ counts,
                                        Count* __restrict__ voxels) {
  LUNGKIT_DYNAMIC_SHARED(unsigned, local);  // (num_classes, 3), then the voxels counted
  const int64_t image = blockIdx.y;
  const int64_t width = 3 * view.num_classes;
  const int64_t local_size = shared_counters ? width + 1 : 1;
  for (int64_t k = threadIdx.x; k < local_size; k += block_threads) local[k] = 0;
  __syncthreads();

  Count* const image_counts = counts + image * width;
  unsigned* const seen = local + (local_size - 1);
  const auto add = [&](int64_t k) {
    if (shared_counters) {
      atomicAdd(&local[k], 1u);
    } else {
      atomicAdd(&image_counts[k], Count{1});
    }
  };
  const int64_t step = static_cast<int64_t>(gridDim.x) * block_threads;
  for (int64_t v = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x; v < view.labels.voxels;
       v += step) {
    const int64_t label =
        static_cast<int64_t>(labels[image * view.labels.batch_stride + v * view.labels.voxel_stride]);
    if (view.has_ignore_index && label == view.ignore_index) continue;
    const int64_t guess = predicted_class<Pred, logits>(
        pred + image * view.pred.batch_stride + v * view.pred.voxel_stride, view.pred);
    if (label < 0 || label >= view.num_classes || guess < 0 || guess >= view.num_classes) continue;
    atomicAdd(seen, 1u);
    if (guess == label) {
      add(3 * label);
    } else {
      add(3 * guess + 1);
      add(3 * label + 2);
    }
  }
  __syncthreads();
  if (shared_counters) {
    for (int64_t k = threadIdx.x; k < width; k += block_threads) {
      if (local[k]) atomicAdd(&image_counts[k], Count{local[k]});
    }
  }
  if (threadIdx.x == 0) atomicAdd(&voxels[image], Count{*seen});
}

template <class Pred, class Label, bool logits>
void launch_confusion_counts(const ConfusionArguments& a, const Tensor& counts, const Tensor& voxels) {
  const ConfusionView view{a.pred_layout, a.label_layout, a.num_classes, a.ignore_index.value_or(0),
                           a.ignore_index.has_value()};
  constexpr int64_t blocks_per_image = 1024;
  constexpr int64_t max_images_per_launch = 65535;
  const int64_t blocks = std::max(std::min(ceil_div(view.labels.voxels, block_threads), blocks_per_image),
                                  ceil_div(view.labels.voxels, max_voxels_per_block));
  const bool shared_counters = a.num_classes <= max_shared_classes;
  const size_t shared_bytes = sizeof(unsigned) * (shared_counters ? 3 * a.num_classes + 1 : 1);
  const auto* pred = static_cast<const Pred*>(a.pred.const_data_ptr());
  const auto* labels = static_cast<const Label*>(a.labels.const_data_ptr());
  auto* count_out = static_cast<Count*>(counts.mutable_data_ptr());
  auto* voxel_out = static_cast<Count*>(voxels.mutable_data_ptr());
  for (int64_t first = 0; first < view.labels.batch; first += max_images_per_launch) {
    const dim3 grid(static_cast<unsigned>(blocks),
                    static_cast<unsigned>(std::min(view.labels.batch - first, max_images_per_launch)));
    LUNGKIT_LAUNCH((confusion_counts_kernel<Pred, Label, logits>), grid, block_threads, shared_bytes,
                   current_stream(a.labels), pred + first * view.pred.batch_stride,
                   labels + first * view.labels.batch_stride, view, shared_counters,
                   count_out + first * 3 * a.num_classes, voxel_out + first);
  }
}

std::tuple<Tensor, Tensor> confusion_counts_cuda(const Tensor& pred, const Tensor& labels,
                                                 int64_t num_classes, std::optional<int64_t> ignore_index) {
  const ConfusionArguments a = check_confusion_counts(pred, labels, num_classes, ignore_index);
  LUNGKIT_CHECK(on_device(a.labels), "confusion_counts: pred and labels must be on the GPU");
  const DeviceGuard guard(a.labels);
  auto [counts, voxels] = new_confusion_outputs(a.labels, a.label_layout.batch, num_classes);
  if (a.label_layout.batch * a.label_layout.voxels == 0) return {counts, voxels};
  dispatch_labels(a.labels.scalar_type(), "confusion_counts", [&](auto label_zero) {
    using Label = decltype(label_zero);
    if (a.logits) {
      dispatch_floating(a.pred.scalar_type(), "confusion_counts", [&](auto pred_zero) {
        launch_confusion_counts<decltype(pred_zero), Label, true>(a, counts, voxels);
      });
    } else {
      dispatch_labels(a.pred.scalar_type(), "confusion_counts", [&](auto pred_zero) {
        launch_confusion_counts<decltype(pred_zero), Label, false>(a, counts, voxels);
      });
    }
  });
  return {counts, voxels};
}

}  // namespace

LUNGKIT_CUDA_LIBRARY(m) {
  m.impl("confusion_counts", TORCH_BOX(&confusion_counts_cuda));
}

}  // namespace lungkit
