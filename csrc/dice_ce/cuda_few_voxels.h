// How the kernels for few classes read voxels and write gradients, channels-first or channels-last: 16 bytes
// a thread at a time where sizes and addresses allow it, else single elements, neighbours in neighbouring
// threads.
#pragma once

#include "cuda_voxels.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

constexpr int few_threads = 128;
constexpr int most_few_classes = 4;

// Voxels of a thread at a time: one 16-byte access a class.
template <class T>
constexpr int group_voxels = 16 / static_cast<int>(sizeof(T));

enum class Access {
  planes,  // one class after the other, in aligned Packs
  plane_elements,
  interleaved,  // the classes of a voxel side by side, in aligned Packs
  interleaved_elements
};

LUNGKIT_HD constexpr bool is_packed(Access access) {
  return access == Access::planes || access == Access::interleaved;
}
LUNGKIT_HD constexpr bool is_interleaved(Access access) {
  return access == Access::interleaved || access == Access::interleaved_elements;
}

// Codes of a group of uint8 labels all of which count, four to a word.
template <int C, int n>
struct ByteCodes {
  uint32_t words[n / 4];

  __device__ __forceinline__ bool is(int k, int c) const {
    const int shift = 8 * (k % 4);
    if (C > 2) return static_cast<int>(words[k / 4] >> shift & 255) == c;
    const bool one = (words[k / 4] & 1u << shift) != 0;
    return c == 1 ? one : !one;
  }
  __device__ __forceinline__ bool counts(int) const { return true; }
  // Not 0 where a label is C or more.
  __device__ __forceinline__ unsigned faults() const {
    unsigned found = 0;
#pragma unroll
    for (uint32_t word : words) {
      found |= word & (C == 2 ? 0xfefefefeu : 0xfcfcfcfcu);
      if (C == 3) found |= word & word >> 1 & 0x01010101u;
    }
    return found;
  }
  // Adds its voxels of each label.
  __device__ __forceinline__ void count(int (&labels)[C]) const {
    if constexpr (C == 2) {
      int ones = 0;
#pragma unroll
      for (uint32_t word : words) ones += __popc(word & 0x01010101u);
      labels[0] += n - ones;
      labels[1] += ones;
    } else {
#pragma unroll
      for (int k = 0; k < n; ++k) {
#pragma unroll
        for (int c = 0; c < C; ++c) labels[c] += is(k, c);
      }
    }
  }
};

// Codes of any labels: class, left_out or, where a label is none, any other number.
template <int C, int n>
struct AnyCodes {
  int of[n];

  __device__ __forceinline__ bool is(int k, int c) const { return of[k] == c; }
  __device__ __forceinline__ bool counts(int k) const { return of[k] >= 0; }
  __device__ __forceinline__ unsigned faults() const {
    unsigned highest = 0;
#pragma unroll
    for (int code : of) highest = max(highest, static_cast<unsigned>(code) + 1u);
    return highest > C;
  }
  __device__ __forceinline__ void count(int (&labels)[C]) const {
#pragma unroll
    for (int k = 0; k < n; ++k) {
#pragma unroll
      for (int c = 0; c < C; ++c) labels[c] += is(k, c);
    }
  }
};

// The chunk of a block. A thread's groups start at first(), first() + step and so on, below count.
// `plain`: the labels are uint8, and all of them count. Labels and mask have no gaps.
template <class T, int C, Access access, bool plain>
struct FewReader {
  static constexpr int voxels = group_voxels<T>, step = few_threads * voxels;
  static constexpr int between = is_packed(access) ? 1 : 32;  // two voxels of a group
  static constexpr bool interleaved = is_interleaved(access);
  using Codes = std::conditional_t<plain, ByteCodes<C, voxels>, AnyCodes<C, voxels>>;

  const View& view;
  const T* logits;
  int64_t first_label;
  const uint8_t* mask;
  int count;

  __device__ explicit FewReader(const View& view) : view(view) {
    const int64_t image = view.image(), first = view.first_voxel();
    logits = static_cast<const T*>(view.logits) + image * view.logits_layout.batch_stride +
             first * (interleaved ? C : 1);
    first_label = image * view.labels_layout.batch_stride + first;
    mask = view.mask == nullptr ? nullptr : view.mask + image * view.mask_layout.batch_stride + first;
    count = static_cast<int>(view.last_voxel() - first);
  }
  __device__ static int first() {
    const int thread = static_cast<int>(threadIdx.x);
    return is_packed(access) ? thread * voxels : thread / 32 * (32 * voxels) + thread % 32;
  }

  __device__ __forceinline__ void load(int v, float (&z)[voxels][C]) const {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const T* const from = logits + place(v, c, view.logits_layout.channel_stride);
      if constexpr (is_packed(access)) {
        float numbers[voxels];
        unpack(load_pack<T, voxels>(from, 0), numbers);
#pragma unroll
        for (int k = 0; k < voxels; ++k) element(z, c, k) = numbers[k];
      } else {
#pragma unroll
        for (int k = 0; k < voxels; ++k) {
          z[k][c] = exists(v, k) ? static_cast<float>(from[k * between * (interleaved ? C : 1)]) : 0.0f;
        }
      }
    }
  }

  // `to` is where the chunk starts.
  __device__ __forceinline__ void store(int v, const float (&z)[voxels][C], T* to,
                                        int64_t channel_stride) const {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      T* const at = to + place(v, c, channel_stride);
      if constexpr (is_packed(access)) {
        Pack<T, voxels> pack;
#pragma unroll
        for (int k = 0; k < voxels; ++k) pack.of[k] = static_cast<T>(element(z, c, k));
        store_whole(at, pack);
      } else {
#pragma unroll
        for (int k = 0; k < voxels; ++k) {
          if (exists(v, k)) at[k * between * (interleaved ? C : 1)] = static_cast<T>(z[k][c]);
        }
      }
    }
  }

  __device__ __forceinline__ Codes codes(int v) const {
    Codes found;
    if constexpr (plain) {
      const auto pack =
          load_pack<uint32_t, voxels / 4>(static_cast<const uint8_t*>(view.labels) + first_label + v, 0);
#pragma unroll
      for (int i = 0; i < voxels / 4; ++i) found.words[i] = pack.of[i];
    } else {
      with_label_type(view.labels_type, [&](auto zero) {
        using Label = decltype(zero);
        Label labels[voxels];
        load_elements(static_cast<const Label*>(view.labels) + first_label + v, v, labels);
#pragma unroll
        for (int k = 0; k < voxels; ++k) found.of[k] = code_of(labels[k]);
      });
      if (mask != nullptr) {
        uint8_t counts[voxels];
        load_elements(mask + v, v, counts);
#pragma unroll
        for (int k = 0; k < voxels; ++k) found.of[k] = counts[k] == 0 ? left_out : found.of[k];
      }
      if constexpr (!is_packed(access)) {
#pragma unroll
        for (int k = 0; k < voxels; ++k) found.of[k] = exists(v, k) ? found.of[k] : left_out;
      }
    }
    return found;
  }

 private:
  __device__ __forceinline__ bool exists(int v, int k) const {
    return is_packed(access) || v + k * between < count;
  }

  // Offset of the c-th Pack of the group at voxel v or, without Packs, of its class c.
  __device__ __forceinline__ static int64_t place(int v, int c, int64_t channel_stride) {
    if (!interleaved) return c * channel_stride + v;
    return v * C + (is_packed(access) ? c * voxels : c);
  }

  // Element k of the c-th Pack of the group.
  template <class Z>
  __device__ __forceinline__ static auto& element(Z& z, int c, int k) {
    return interleaved ? z[(c * voxels + k) / C][(c * voxels + k) % C] : z[k][c];
  }

  // Two bfloat16 of a word become numbers by one instruction each.
  __device__ __forceinline__ static void unpack(const Pack<T, voxels>& pack, float (&numbers)[voxels]) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      uint4 whole;
      memcpy(&whole, &pack, sizeof whole);
      const uint32_t words[] = {whole.x, whole.y, whole.z, whole.w};
#pragma unroll
      for (int k = 0; k < voxels; ++k) {
        const uint32_t bits = k % 2 == 0 ? words[k / 2] << 16 : words[k / 2] & 0xffff0000u;
        memcpy(&numbers[k], &bits, sizeof bits);
      }
    } else {
#pragma unroll
      for (int k = 0; k < voxels; ++k) numbers[k] = static_cast<float>(pack.of[k]);
    }
  }

  // Those of the group; 0 beyond the last voxel.
  template <class Label>
  __device__ __forceinline__ void load_elements(const Label* from, int v, Label (&elements)[voxels]) const {
    if constexpr (is_packed(access)) {
      const auto pack = load_pack<Label, voxels>(from, 0);
#pragma unroll
      for (int k = 0; k < voxels; ++k) elements[k] = pack.of[k];
    } else {
#pragma unroll
      for (int k = 0; k < voxels; ++k) elements[k] = exists(v, k) ? from[k * between] : Label{0};
    }
  }

  template <class Label>
  __device__ __forceinline__ int code_of(Label label) const {
    using Wide = std::conditional_t<sizeof(Label) < 8, int, int64_t>;
    const bool has_ignored = view.options.has_ignore_index;
    const Wide value = label,
               ignored = has_ignored ? static_cast<Wide>(view.options.ignore_index) : Wide{left_out};
    const int code = static_cast<int>(value);
    if (value == ignored) return has_ignored ? left_out : invalid;
    return value == code ? code : invalid;
  }
};

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
