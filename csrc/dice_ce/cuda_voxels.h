// How the CUDA kernels see their tensors: a view that travels as a kernel argument, labels as codes, and sums
// over a block in a fixed order.
#pragma once

#include <cstdint>
#include <type_traits>

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../support/cuda_store.h"
#include "../support/layout.h"
#include "arguments.h"
#include "maths.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

constexpr int left_out = -1;  // code of a voxel that does not count
constexpr int invalid = -2;   // and of one whose class index is out of range

// A block owns one chunk of one image: block b has image b / chunks.
struct View {
  const void* logits;
  const void* labels;
  const uint8_t* mask;  // null where all voxels count
  VoxelLayout logits_layout;
  VoxelLayout labels_layout;
  VoxelLayout mask_layout;
  ScalarType labels_type;
  bool class_indices;
  DiceCeOptions options;
  int64_t chunk_voxels;
  unsigned chunks;

  __device__ int64_t image() const { return blockIdx.x / chunks; }
  __device__ unsigned chunk() const { return blockIdx.x % chunks; }
  __device__ int64_t first_voxel() const { return chunk() * chunk_voxels; }
  __device__ int64_t last_voxel() const {
    const int64_t last = first_voxel() + chunk_voxels;
    return last < logits_layout.voxels ? last : logits_layout.voxels;
  }
  __device__ bool is_masked(int64_t image, int64_t v) const {
    return mask != nullptr && mask[image * mask_layout.batch_stride + v * mask_layout.voxel_stride] == 0;
  }
};

// What a class index becomes: itself, left_out or invalid.
template <bool has_ignored, class Label>
__device__ __forceinline__ int encode(const View& view, Label label) {
  using Wide = std::conditional_t<sizeof(Label) < 8, int, int64_t>;
  const Wide value = static_cast<Wide>(label), ignored = static_cast<Wide>(view.options.ignore_index);
  const int classes = static_cast<int>(view.logits_layout.channels == 1 ? 2 : view.logits_layout.channels);
  const int code = value >= 0 && value < classes ? static_cast<int>(value) : invalid;
  if constexpr (!has_ignored) return code;
  return value == ignored && ignored == view.options.ignore_index ? left_out : code;
}

// count elements as one access of up to 16 bytes.
template <class T, int count>
struct alignas(sizeof(T) * count < 16 ? sizeof(T) * count : 16) Pack {
  T of[count];
};

template <class T, int count>
__device__ __forceinline__ Pack<T, count> load_pack(const void* data, int64_t offset) {
  return *reinterpret_cast<const Pack<T, count>*>(static_cast<const T*>(data) + offset);
}

template <class Body>
__device__ __forceinline__ void with_label_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Short: return body(int16_t{});
    case ScalarType::Int: return body(int32_t{});
    case ScalarType::Long: return body(int64_t{});
    default: return body(uint8_t{});
  }
}

// Element of a label vector, or a class index, of any dtype.
template <class A>
__device__ __forceinline__ A load_label(const View& view, int64_t image, int64_t c, int64_t v) {
  const VoxelLayout& l = view.labels_layout;
  const int64_t offset = image * l.batch_stride + c * l.channel_stride + v * l.voxel_stride;
  switch (view.labels_type) {
    case ScalarType::Float: return static_cast<A>(static_cast<const float*>(view.labels)[offset]);
    case ScalarType::Double: return static_cast<A>(static_cast<const double*>(view.labels)[offset]);
    case ScalarType::Half:
      return static_cast<A>(static_cast<float>(static_cast<const Half*>(view.labels)[offset]));
    case ScalarType::BFloat16:
      return static_cast<A>(static_cast<float>(static_cast<const BFloat16*>(view.labels)[offset]));
    default: break;
  }
  A value = 0;
  with_label_type(view.labels_type, [&](auto zero) {
    value = static_cast<A>(static_cast<const decltype(zero)*>(view.labels)[offset]);
  });
  return value;
}

// Code of one voxel anywhere; beside label vectors it only says whether the voxel counts.
__device__ __forceinline__ int load_code(const View& view, int64_t image, int64_t v) {
  if (view.is_masked(image, v)) return left_out;
  if (!view.class_indices) return 0;
  if (is_floating(view.labels_type)) {
    const float label = load_label<float>(view, image, 0, v), whole = rintf(label);
    if (!(fabsf(label - whole) <= static_cast<float>(index_tolerance))) return invalid;
    if (view.options.has_ignore_index && whole == static_cast<float>(view.options.ignore_index))
      return left_out;
    return whole >= 0 && whole < static_cast<float>(view.logits_layout.channels) ? static_cast<int>(whole)
                                                                                 : invalid;
  }
  int code = left_out;
  with_label_type(view.labels_type, [&](auto zero) {
    const auto* labels = static_cast<const decltype(zero)*>(view.labels);
    const int64_t offset = image * view.labels_layout.batch_stride + v * view.labels_layout.voxel_stride;
    code = view.options.has_ignore_index ? encode<true>(view, labels[offset])
                                         : encode<false>(view, labels[offset]);
  });
  return code;
}

// Sum over the lanes of a warp, in lane 0; the order of additions is fixed.
template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_down_sync(0xffffffffu, value, distance);
  return value;
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
