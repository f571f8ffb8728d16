// A tile: some hundred voxels of a chunk, brought from whatever dtype and stride they have to contiguous
// numbers. Included by kernel_cpu.cpp alone, as simd_maths.h is.
#pragma once

#include "../support/simd_maths.h"
#include "kernel.h"
#include "maths.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

using torch::headeronly::ScalarType;

constexpr int32_t left_out = -1;         // code of a voxel that does not count
constexpr int32_t no_class = INT32_MIN;  // and, before it is one, of a floating label that is not whole
constexpr int most_tile_voxels = 512;

// How many vectors are added in A before the sum moves on to a WideSum: more would lose digits.
constexpr int additions_in_a_row = 16;

// A sum carried in double, lane by lane. Narrower lanes are added in two halves.
template <class A>
struct WideSum {
  static constexpr int parts = sizeof(double) / sizeof(A);
  Vec<double> value[parts] = {};

  void add(Vec<A> v) {
    typename VectorOf<A, lanes<double>* static_cast<int>(sizeof(A))>::type part[parts];
    std::memcpy(part, &v, sizeof v);
    for (int i = 0; i < parts; ++i) value[i] += __builtin_convertvector(part[i], Vec<double>);
  }
  double total() const {
    double sum = 0;
    for (const Vec<double>& part : value) {
      for (int i = 0; i < lanes<double>; ++i) sum += part[i];
    }
    return sum;
  }
};

// Codes are 32-bit for every A; a lane of the mask is as wide as A.
template <class A>
Mask<A> codes_at(const int32_t* codes) {
  typename VectorOf<int32_t, lanes<A> * 4>::type narrow;
  std::memcpy(&narrow, codes, sizeof narrow);
  return __builtin_convertvector(narrow, Mask<A>);
}

template <class From, class To>
void convert(const From* from, int64_t stride, int n, To* to) {
  if (stride == 1) {
#pragma omp simd
    for (int i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
  } else {
    for (int i = 0; i < n; ++i) to[i] = static_cast<To>(from[i * stride]);
  }
}

// From a half type, a vector at a time.
template <class Half, class To>
void convert_half(const Half* from, int64_t stride, int n, To* to) {
  constexpr int step = lanes<float>;
  int i = 0;
  if constexpr (std::is_same_v<To, float>) {
    for (; stride == 1 && i + step <= n; i += step) store(to + i, load(from + i));
  }
  for (; i < n; i += step) {
    const int count = n - i < step ? n - i : step;
    Half packed[step] = {};
    float numbers[step];
    for (int k = 0; k < count; ++k) packed[k] = from[(i + k) * stride];
    store(numbers, load(packed));
    for (int k = 0; k < count; ++k) to[i + k] = static_cast<To>(numbers[k]);
  }
}

// n elements of a tensor from element `offset` on, as numbers of type A.
template <class A>
void load_elements(const void* data, ScalarType type, int64_t offset, int64_t stride, int n, A* to) {
  const auto from = [&](auto zero) { return static_cast<const decltype(zero)*>(data) + offset; };
  switch (type) {
    case ScalarType::Float: return convert(from(float{}), stride, n, to);
    case ScalarType::Double: return convert(from(double{}), stride, n, to);
    case ScalarType::Half: return convert_half(from(Float16{}), stride, n, to);
    case ScalarType::BFloat16: return convert_half(from(BFloat16{}), stride, n, to);
    case ScalarType::Short: return convert(from(int16_t{}), stride, n, to);
    case ScalarType::Int: return convert(from(int32_t{}), stride, n, to);
    case ScalarType::Long: return convert(from(int64_t{}), stride, n, to);
    default: return convert(from(uint8_t{}), stride, n, to);  // and bool; arguments.h has refused all others
  }
}

// The way back: n numbers of a tile, whose arrays are padded to whole vectors.
template <class Stored, class A>
void store_as(const A* from, int n, Stored* to, int64_t stride) {
  constexpr int step = lanes<A>;
  int i = 0;
  for (; stride == 1 && i + step <= n; i += step) store(to + i, load(from + i));
  for (; i < n; i += step) {
    Stored packed[step];
    store(packed, load(from + i));
    for (int k = 0; k < step && i + k < n; ++k) to[(i + k) * stride] = packed[k];
  }
}

// To the dtype of the logits.
template <class A>
void store_elements(const A* from, int n, void* data, ScalarType type, int64_t offset, int64_t stride) {
  const auto to = [&](auto zero) { return static_cast<decltype(zero)*>(data) + offset; };
  if constexpr (std::is_same_v<A, float>) {
    if (type == ScalarType::Half) return store_as(from, n, to(Float16{}), stride);
    if (type == ScalarType::BFloat16) return store_as(from, n, to(BFloat16{}), stride);
  }
  store_as(from, n, to(A{}), stride);
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

// Floating class indices to the nearest whole number, or no_class.
inline void round_labels(const float* labels, int n, int32_t* indices) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const float label = labels[i];
    const bool fits = (label > -1e9f) & (label < 1e9f);  // false for NaN
    const float bounded = fits ? label : 0.5f;
    const int32_t whole = static_cast<int32_t>(bounded + (bounded < 0 ? -0.5f : 0.5f));
    const float error = bounded - static_cast<float>(whole);
    const float tolerance = static_cast<float>(index_tolerance);
    indices[i] = (error <= tolerance) & (error >= -tolerance) ? whole : no_class;
  }
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
  const int64_t stride = chunk.labels_voxel_stride;
  const auto encode_from = [&](const auto* labels, int64_t step) {
    return encode(labels, step, mask, chunk.mask_voxel_stride, n, values, chunk.options, codes);
  };
  const auto encode_as = [&](auto zero) {
    return encode_from(static_cast<const decltype(zero)*>(chunk.labels) + first * stride, stride);
  };
  switch (chunk.labels_type) {
    case ScalarType::Byte:
    case ScalarType::Bool: return encode_as(uint8_t{});
    case ScalarType::Short: return encode_as(int16_t{});
    case ScalarType::Int: return encode_as(int32_t{});
    case ScalarType::Long: return encode_as(int64_t{});
    default: break;
  }
  float labels[most_tile_voxels];
  int32_t indices[most_tile_voxels];
  load_elements(chunk.labels, chunk.labels_type, first * stride, stride, n, labels);
  round_labels(labels, n, indices);
  return encode_from(indices, 1);
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
