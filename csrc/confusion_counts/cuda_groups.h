// The voxels of a thread, eight at a time, and their class indices: by loads of up to 16 bytes where
// addresses allow it.
#pragma once

#include <type_traits>

#include "../support/dispatch.h"
#include "../support/layout.h"

namespace lungkit {
namespace {

constexpr int block_threads = 256;
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
}  // namespace
}  // namespace lungkit
