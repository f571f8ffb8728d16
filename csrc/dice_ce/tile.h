// A tile: some hundred voxels of a chunk, brought from whatever dtype and stride they have to contiguous
// numbers. Included by kernel_cpu.cpp alone, as vector.h is.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "half.h"
#include "kernel.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

using torch::headeronly::ScalarType;

constexpr int32_t left_out = -1;  // code of a voxel that does not count

template <class From, class To>
inline void convert(const From* from, int64_t stride, int n, To* to) {
  if (stride == 1) {
#pragma omp simd
    for (int i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
  } else {
    for (int i = 0; i < n; ++i) to[i] = static_cast<To>(from[i * stride]);
  }
}

// Half types are raw 16-bit patterns. What is strided, or does not become float, goes through a short buffer.
constexpr int buffer_elements = 64;

template <class To>
inline void convert_16bit(const uint16_t* from, int64_t stride, int n, To* to,
                          void (*to_floats)(const uint16_t*, int, float*)) {
  if constexpr (std::is_same_v<To, float>) {
    if (stride == 1) return to_floats(from, n, to);
  }
  uint16_t raw[buffer_elements];
  float floats[buffer_elements];
  for (int first = 0; first < n; first += buffer_elements) {
    const int count = n - first < buffer_elements ? n - first : buffer_elements;
    for (int i = 0; i < count; ++i) raw[i] = from[(first + i) * stride];
    to_floats(raw, count, floats);
    for (int i = 0; i < count; ++i) to[first + i] = static_cast<To>(floats[i]);
  }
}

inline void convert_to_16bit(const float* from, int n, uint16_t* to, int64_t stride,
                             void (*from_floats)(const float*, int, uint16_t*)) {
  if (stride == 1) return from_floats(from, n, to);
  uint16_t raw[buffer_elements];
  for (int first = 0; first < n; first += buffer_elements) {
    const int count = n - first < buffer_elements ? n - first : buffer_elements;
    from_floats(from + first, count, raw);
    for (int i = 0; i < count; ++i) to[(first + i) * stride] = raw[i];
  }
}

// n elements of a tensor from element `offset` on, as numbers of type A.
template <class A>
void load_elements(const void* data, ScalarType type, int64_t offset, int64_t stride, int n, A* to) {
  const auto from = [&](auto zero) { return static_cast<const decltype(zero)*>(data) + offset; };
  switch (type) {
    case ScalarType::Float: return convert(from(float{}), stride, n, to);
    case ScalarType::Double: return convert(from(double{}), stride, n, to);
    case ScalarType::Half: return convert_16bit<A>(from(uint16_t{}), stride, n, to, from_half_array);
    case ScalarType::BFloat16: return convert_16bit<A>(from(uint16_t{}), stride, n, to, from_bfloat16_array);
    case ScalarType::Short: return convert(from(int16_t{}), stride, n, to);
    case ScalarType::Int: return convert(from(int32_t{}), stride, n, to);
    case ScalarType::Long: return convert(from(int64_t{}), stride, n, to);
    default:
      return convert(from(uint8_t{}), stride, n, to);  // uint8 and bool; cpu.cpp has refused all others
  }
}

// The way back, for the gradient: to the dtype of the logits.
template <class A>
void store_elements(const A* from, int n, void* data, ScalarType type, int64_t offset, int64_t stride) {
  if constexpr (std::is_same_v<A, double>) {
    double* to = static_cast<double*>(data) + offset;
    for (int i = 0; i < n; ++i) to[i * stride] = from[i];
  } else if (type == ScalarType::Float) {
    float* to = static_cast<float*>(data) + offset;
    if (stride == 1) {
      std::memcpy(to, from, n * sizeof(float));
    } else {
      for (int i = 0; i < n; ++i) to[i * stride] = from[i];
    }
  } else {
    uint16_t* to = static_cast<uint16_t*>(data) + offset;
    convert_to_16bit(from, n, to, stride, type == ScalarType::Half ? to_half_array : to_bfloat16_array);
  }
}

// Class indices to codes: the index, or left_out. False where an index that counts is outside 0 .. values
// - 1; its code is of no use then.
template <class Label>
bool encode(const Label* labels, int64_t stride, const uint8_t* mask, int64_t mask_stride, int n,
            int64_t values, const DiceCeOptions& options, int32_t* codes) {
  using Wide = std::conditional_t<sizeof(Label) < 8, int32_t, int64_t>;
  constexpr int64_t largest = sizeof(Label) < 4 ? 0xffff : 0x7fffffff;
  using Unsigned = std::make_unsigned_t<Wide>;  // in which a negative index is too large
  const Wide end = static_cast<Wide>(values < largest ? values : largest);
  const bool has_ignore =
      options.has_ignore_index && static_cast<Label>(options.ignore_index) == options.ignore_index;
  if (mask == nullptr && !has_ignore && stride == 1) {
    Unsigned most = 0;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < n; ++i) {
      const Wide label = static_cast<Wide>(labels[i]);
      codes[i] = static_cast<int32_t>(label);
      most = most < static_cast<Unsigned>(label) ? static_cast<Unsigned>(label) : most;
    }
    return n == 0 || most < static_cast<Unsigned>(end);
  }
  const Wide ignored = has_ignore ? static_cast<Wide>(options.ignore_index) : Wide(-1);
  int32_t invalid = 0;
  const auto encode_all = [&](auto label_of, auto counts) {
#pragma omp simd reduction(| : invalid)
    for (int i = 0; i < n; ++i) {
      const Wide label = label_of(i);
      const bool out = (has_ignore & (label == ignored)) | !counts(i);
      const bool in_range = (label >= 0) & (label < end);
      codes[i] = out | !in_range ? left_out : static_cast<int32_t>(label);
      invalid |= !(out | in_range);
    }
  };
  const auto contiguous = [&](int i) { return static_cast<Wide>(labels[i]); };
  const auto strided = [&](int i) { return static_cast<Wide>(labels[i * stride]); };
  const auto masked = [&](int i) { return mask[i * mask_stride] != 0; };
  if (mask != nullptr) {
    encode_all(strided, masked);
  } else if (stride == 1) {
    encode_all(contiguous, [](int) { return true; });
  } else {
    encode_all(strided, [](int) { return true; });
  }
  return invalid == 0;
}

// Codes of voxels first .. first + n - 1 of the chunk, and left_out up to `padded`. Beside label vectors a
// code says only whether the voxel counts.
inline bool load_codes(const DiceCeChunk& chunk, int64_t first, int n, int padded, int32_t* codes) {
  for (int i = n; i < padded; ++i) codes[i] = left_out;
  const uint8_t* mask = chunk.mask == nullptr ? nullptr : chunk.mask + first * chunk.mask_voxel_stride;
  if (!chunk.class_indices) {
    for (int i = 0; i < n; ++i) {
      codes[i] = mask == nullptr || mask[i * chunk.mask_voxel_stride] != 0 ? 0 : left_out;
    }
    return true;
  }
  const int64_t values = chunk.classes == 1 ? 2 : chunk.classes;  // one channel is the probability of class 1
  const auto encode_as = [&](auto zero) {
    const int64_t stride = chunk.labels_voxel_stride;
    const auto* labels = static_cast<const decltype(zero)*>(chunk.labels) + first * stride;
    return encode(labels, stride, mask, chunk.mask_voxel_stride, n, values, chunk.options, codes);
  };
  switch (chunk.labels_type) {
    case ScalarType::Short: return encode_as(int16_t{});
    case ScalarType::Int: return encode_as(int32_t{});
    case ScalarType::Long: return encode_as(int64_t{});
    default: return encode_as(uint8_t{});
  }
}

// Logits of one class of the same voxels, and 0 up to `padded`.
template <class A>
void load_logits(const DiceCeChunk& chunk, int64_t c, int64_t first, int n, int padded, A* z) {
  const int64_t offset = c * chunk.logits_channel_stride + first * chunk.logits_voxel_stride;
  load_elements(chunk.logits, chunk.logits_type, offset, chunk.logits_voxel_stride, n, z);
  for (int i = n; i < padded; ++i) z[i] = A(0);
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
