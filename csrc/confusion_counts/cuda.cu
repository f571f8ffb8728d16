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

namespace lungkit {
namespace {

using Count = unsigned long long;  // CUDA's 64-bit atomicAdd takes this type; the output tensors hold int64

constexpr int block_threads = 256;
constexpr int64_t max_shared_classes =
    2048;  // 3 counters of 4 bytes each: half of the 48 KB that need no opt-in

// A block's 32-bit counters hold its share of one image: the grid is widened past this many voxels a block.
constexpr int64_t max_voxels_per_block = int64_t{1} << 30;

constexpr int group_voxels = 8;
constexpr int block_voxels = block_threads * group_voxels;
constexpr int not_counted = -1;  // code of a voxel that is ignored or whose class index is out of range

struct ConfusionView {
  const void* pred;
  const void* labels;
  ScalarType pred_type;
  ScalarType label_type;
  VoxelLayout pred_layout;
  VoxelLayout label_layout;
  int num_classes;
  int64_t ignored;  // -1 where no class index is
  bool packed;      // whether voxels have no gaps and groups of them are aligned
  bool bytes;       // whether moreover both are class indices of one byte
};

// The group of a thread: in `packed` memory neighbours, else the threads' groups are interleaved, so that
// neighbouring threads read neighbouring voxels.
struct Group {
  int64_t first;
  int64_t between;
  int64_t voxels;  // of the image
  bool whole;      // all its voxels exist

  __device__ Group(const ConfusionView& view, int64_t block_first) : voxels(view.label_layout.voxels) {
    const int thread = static_cast<int>(threadIdx.x);
    first = block_first + (view.packed ? thread * group_voxels : thread);
    between = view.packed ? 1 : block_threads;
    whole = first + (group_voxels - 1) * between < voxels;
  }
  __device__ bool has(int k) const { return whole || first + k * between < voxels; }
};

template <class T>
struct alignas(sizeof(T) * group_voxels < 16 ? sizeof(T) * group_voxels : 16) Pack {
  T of[group_voxels];
};

// `from` is the image's first voxel; 0 where a voxel does not exist.
template <class T>
__device__ __forceinline__ void load_group(const T* from, int64_t stride, const Group& group, bool packed,
                                           T (&elements)[group_voxels]) {
  from += group.first * stride;
  if (packed && group.whole) {
    const auto pack = *reinterpret_cast<const Pack<T>*>(from);
#pragma unroll
    for (int k = 0; k < group_voxels; ++k) elements[k] = pack.of[k];
    return;
  }
#pragma unroll
  for (int k = 0; k < group_voxels; ++k, from += group.between * stride) {
    elements[k] = group.has(k) ? *from : T(0);
  }
}

// The group's class indices of masks whose `bytes` are packed; no class where a voxel does not exist.
__device__ __forceinline__ uint2 bytes_of(const void* data, const VoxelLayout& layout, int64_t image,
                                          const Group& group) {
  const uint8_t* const from = static_cast<const uint8_t*>(data) + image * layout.batch_stride + group.first;
  if (group.whole) return *reinterpret_cast<const uint2*>(from);
  unsigned words[2] = {};
#pragma unroll
  for (int k = 0; k < group_voxels; ++k) {
    words[k / 4] |= (group.has(k) ? unsigned{from[k]} : 0xffu) << 8 * (k % 4);
  }
  return {words[0], words[1]};
}

// Class indices below num_classes, not_counted for all others.
template <class Index>
__device__ __forceinline__ void load_codes(const Index* from, int64_t stride, const ConfusionView& view,
                                           const Group& group, int64_t ignored, int (&codes)[group_voxels]) {
  Index indices[group_voxels];
  load_group(from, stride, group, view.packed, indices);
#pragma unroll
  for (int k = 0; k < group_voxels; ++k) {
    using Wide = std::conditional_t<sizeof(Index) < 8, int, int64_t>;
    const Wide index = indices[k];
    const bool counted = index >= 0 && index < view.num_classes && index != static_cast<Wide>(ignored);
    codes[k] = counted ? static_cast<int>(index) : not_counted;
  }
}

__device__ __forceinline__ void load_codes(const void* data, ScalarType type, const VoxelLayout& layout,
                                           const ConfusionView& view, int64_t image, const Group& group,
                                           int64_t ignored, int (&codes)[group_voxels]) {
  const auto load = [&](auto zero) {
    load_codes(static_cast<const decltype(zero)*>(data) + image * layout.batch_stride, layout.voxel_stride,
               view, group, ignored, codes);
  };
  switch (type) {
    case ScalarType::Short: return load(int16_t{});
    case ScalarType::Int: return load(int32_t{});
    case ScalarType::Long: return load(int64_t{});
    default: return load(uint8_t{});  // and bool
  }
}

// Most probable classes.
template <class T>
__device__ __forceinline__ void load_argmax(const ConfusionView& view, int64_t image, const Group& group,
                                            int (&codes)[group_voxels]) {
  using Real = accumulate_t<T>;
  const VoxelLayout& layout = view.pred_layout;
  const T* const logits = static_cast<const T*>(view.pred) + image * layout.batch_stride;
  Real best[group_voxels];
  T values[group_voxels];
  load_group(logits, layout.voxel_stride, group, view.packed, values);
#pragma unroll
  for (int k = 0; k < group_voxels; ++k) {
    best[k] = static_cast<Real>(values[k]);
    codes[k] = layout.channels == 1 && best[k] > Real(0) ? 1 : 0;
  }
  for (int c = 1; c < static_cast<int>(layout.channels); ++c) {
    load_group(logits + c * layout.channel_stride, layout.voxel_stride, group, view.packed, values);
#pragma unroll
    for (int k = 0; k < group_voxels; ++k) {
      const Real value = static_cast<Real>(values[k]);
      // The first of the largest, NaN being larger than all: as in torch.argmax.
      const bool larger = !(value <= best[k]) && best[k] == best[k];
      best[k] = larger ? value : best[k];
      codes[k] = larger ? c : codes[k];
    }
  }
}

// In lane 0.
__device__ unsigned warp_sum(unsigned value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  return value;
}

// What a thread has seen of two classes, of up to four, of up to four in masks of bytes, or of any number.
// All threads of a warp call end_of_group() and finish(), which hand it on as add(k, number), for counts[k].
enum class Classes { two, few, few_bytes, any };
constexpr int few_classes = 4;

template <Classes classes>
struct Counter {
  unsigned voxels = 0, guesses = 0, labels = 0, both = 0;  // the last three of class 1

  template <class Add>
  __device__ __forceinline__ void see(int guess, int label, const Add&) {
    const bool counted = (guess | label) >= 0;
    voxels += counted;
    guesses += counted ? guess : 0;
    labels += counted ? label : 0;
    both += counted ? guess & label : 0;
  }
  // The same for four voxels whose class indices are the bytes of a word.
  __device__ __forceinline__ void see_bytes(unsigned guess, unsigned label, int64_t ignored) {
    constexpr unsigned each = 0x01010101u;
    const unsigned others = (guess | label) & 0xfe * each;  // not 0 in bytes that hold another class
    const unsigned has_others = (((others & 0x7f * each) + 0x7f * each) | others) >> 7;
    const unsigned is_ignored = ignored == 0 ? ~label : ignored == 1 ? label : 0;
    const unsigned counted = each & ~has_others & ~is_ignored;
    voxels += __popc(counted);
    guesses += __popc(counted & guess);
    labels += __popc(counted & label);
    both += __popc(counted & guess & label);
  }
  template <class Add>
  __device__ void finish(const Add& add) const {
    const unsigned n = warp_sum(voxels), g = warp_sum(guesses), l = warp_sum(labels), b = warp_sum(both);
    if (threadIdx.x % 32 != 0) return;
    const unsigned counts[] = {n - g - l + b, l - b, g - b, b, g - b, l - b};
    for (int k = 0; k < 6; ++k) add(k, counts[k]);
  }
  template <class Add>
  __device__ void end_of_group(const Add&) {}
};

// Voxels of each label, a byte each, by prediction.
template <>
struct Counter<Classes::few> {
  unsigned of_guess[few_classes] = {}, voxels = 0;
  int groups = 0;

  template <class Add>
  __device__ __forceinline__ void see(int guess, int label, const Add&) {
    const unsigned one = (guess | label) >= 0 ? 1u << 8 * (label & 3) : 0;
#pragma unroll
    for (int g = 0; g < few_classes; ++g) of_guess[g] += guess == g ? one : 0;
  }
  template <class Add>
  __device__ __forceinline__ void end_of_group(const Add& add) {
    if (++groups == 255 / group_voxels) finish(add);
  }
  template <class Add>
  __device__ void finish(const Add& add) {
    groups = 0;
#pragma unroll
    for (int g = 0; g < few_classes; ++g) {
      // Two sums in one: a warp's are below 2^16.
      const unsigned even = warp_sum(of_guess[g] & 0xff00ff), odd = warp_sum(of_guess[g] >> 8 & 0xff00ff);
      of_guess[g] = 0;
      if (threadIdx.x % 32 != 0) continue;
      const unsigned of_label[] = {even & 0xffff, odd & 0xffff, even >> 16, odd >> 16};
      for (int label = 0; label < few_classes; ++label) add_pair(add, g, label, of_label[label]);
    }
  }

 private:
  template <class Add>
  __device__ void add_pair(const Add& add, int guess, int label, unsigned count) {
    if (count == 0) return;
    voxels += count;
    if (guess == label) {
      add(3 * guess, count);
    } else {
      add(3 * guess + 1, count);
      add(3 * label + 2, count);
    }
  }
};

// Of masks of three or four classes in bytes: flags of four voxels at a time, a byte each, whose sums say how
// often each bit of the class index is set, both are, and prediction and label agree.
template <>
struct Counter<Classes::few_bytes> {
  static constexpr unsigned each = 0x01010101u;
  static constexpr int most_groups = 255 / (group_voxels / 4);
  unsigned counted = 0, guess[3] = {}, label[3] = {}, both[4] = {};
  unsigned voxels = 0;
  int groups = 0;

  __device__ __forceinline__ void see_bytes(unsigned guesses, unsigned labels, const ConfusionView& view) {
    const unsigned g0 = guesses & each, g1 = guesses >> 1 & each, g3 = g0 & g1;
    const unsigned l0 = labels & each, l1 = labels >> 1 & each, l3 = l0 & l1;
    const unsigned others = (guesses | labels) & 0xfc * each;  // not 0 in bytes that hold another class
    unsigned left_out = (((others & 0x7f * each) + 0x7f * each) | others) >> 7;
    if (view.num_classes == 3) left_out |= g3 | l3;
    if (view.ignored >= 0) {
      left_out |= (view.ignored & 1 ? l0 : ~l0) & (view.ignored & 2 ? l1 : ~l1);
    }
    const unsigned counts = each & ~left_out, equal = counts & ~((guesses ^ labels) | (g1 ^ l1));
    counted += counts;
    guess[0] += counts & g0;
    guess[1] += counts & g1;
    guess[2] += counts & g3;
    label[0] += counts & l0;
    label[1] += counts & l1;
    label[2] += counts & l3;
    both[0] += equal & g0;
    both[1] += equal & g1;
    both[2] += equal & g3;
    both[3] += equal;
  }
  template <class Add>
  __device__ __forceinline__ void end_of_group(const Add& add) {
    if (++groups == most_groups) finish(add);
  }
  template <class Add>
  __device__ void finish(const Add& add) {
    groups = 0;
    const auto total = [](unsigned& flags) {  // two sums in one: a warp's are below 2^16
      const unsigned sum = warp_sum((flags & 0xff00ff) + (flags >> 8 & 0xff00ff));
      flags = 0;
      return (sum & 0xffff) + (sum >> 16);
    };
    const unsigned n = total(counted);
    unsigned g[4], l[4], b[4];
    by_class(total, guess, n, g);
    by_class(total, label, n, l);
    by_class(total, both, total(both[3]), b);
    if (threadIdx.x % 32 != 0) return;
    voxels += n;
    for (int c = 0; c < few_classes; ++c) {
      if (b[c] != 0) add(3 * c, b[c]);
      if (g[c] != b[c]) add(3 * c + 1, g[c] - b[c]);
      if (l[c] != b[c]) add(3 * c + 2, l[c] - b[c]);
    }
  }

 private:
  template <class Total, int size>
  __device__ static void by_class(const Total& total, unsigned (&flags)[size], unsigned all,
                                  unsigned (&of)[4]) {
    const unsigned low = total(flags[0]), high = total(flags[1]);
    of[3] = total(flags[2]);
    of[1] = low - of[3];
    of[2] = high - of[3];
    of[0] = all - low - of[2];
  }
};

// A run of equal pairs at a time.
template <>
struct Counter<Classes::any> {
  int guess = not_counted, label = not_counted;
  unsigned count = 0, voxels = 0;

  template <class Add>
  __device__ __forceinline__ void see(int new_guess, int new_label, const Add& add) {
    if (new_guess != guess || new_label != label) {
      finish(add);
      guess = new_guess;
      label = new_label;
      count = 0;
    }
    ++count;
    voxels += (new_guess | new_label) >= 0;
  }
  template <class Add>
  __device__ void end_of_group(const Add&) {}
  template <class Add>
  __device__ void finish(const Add& add) const {
    if ((guess | label) < 0) return;
    if (guess == label) {
      add(3 * guess, count);
    } else {
      add(3 * guess + 1, count);
      add(3 * label + 2, count);
    }
  }
};

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
