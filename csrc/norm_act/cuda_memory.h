// Where blocks and threads of the norm's kernels find their elements, and how they read and write them: in
// packs of up to 16 bytes. What its channels are scaled by.
#pragma once

#include <cstdint>
#include <cstring>

#include "../support/dispatch.h"
#include "../support/layout.h"

namespace lungkit {
namespace {

constexpr int block_threads = 256;

template <class Stored>
constexpr int widest = 16 / sizeof(Stored);

template <class Word>
__device__ void store(Word* to, const Word& word) {
  *to = word;
}
#ifndef LUNGKIT_EMULATE
// nvcc may split the plain store.
__device__ inline void store(uint4* to, const uint4& word) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y), "r"(word.z),
               "r"(word.w)
               : "memory");
}
#endif

// Elements that lie side by side, moved as one word, which nvcc does not do for a struct of half numbers.
// Those stay in pairs in 32 bits until they are used, half the registers of as many numbers.
template <class Stored, int vec>
struct Pack {
  using Sum = accumulate_t<Stored>;
  static constexpr int bytes = sizeof(Stored) * vec;
  static constexpr bool pairs = sizeof(Stored) == 2 && vec > 1;
  using Word = std::conditional_t<
      bytes == 16, uint4,
      std::conditional_t<bytes == 8, uint2, std::conditional_t<bytes == 4, unsigned, unsigned short>>>;
  static_assert(sizeof(Word) == bytes);

  __device__ static Pack read(const Stored* from) {
    const Word word = *reinterpret_cast<const Word*>(from);
    Pack pack;
    memcpy(pack.parts, &word, bytes);
    return pack;
  }
  __device__ void write(Stored* to) const {
    Word word;
    memcpy(&word, parts, bytes);
    store(reinterpret_cast<Word*>(to), word);
  }
  __device__ Sum at(int i) const {
    if constexpr (!pairs) {
      return static_cast<Sum>(parts[i]);
    } else if constexpr (std::is_same_v<Stored, BFloat16>) {
      return __uint_as_float(i % 2 == 0 ? parts[i / 2] << 16 : parts[i / 2] & 0xffff0000u);
    } else {
      return static_cast<Sum>(
          Stored(static_cast<uint16_t>(parts[i / 2] >> (i % 2 * 16)), Stored::from_bits()));
    }
  }
  // In the order of i.
  __device__ void set(int i, Sum value) {
    const Stored rounded = static_cast<Stored>(value);
    if constexpr (!pairs) {
      parts[i] = rounded;
    } else if (i % 2 == 0) {
      parts[i / 2] = rounded.x;
    } else {
      parts[i / 2] |= uint32_t{rounded.x} << 16;
    }
  }

  std::conditional_t<pairs, uint32_t, Stored> parts[pairs ? vec / 2 : vec];
};

// Channels-first: a line is a channel of an image, blocks take chunks of it, and a row is a vector.
// Channels-last: a line is an image, blocks take chunks of its voxels and a tile of its channels, a row is a
// voxel, and a thread stays with the channels of its vector. Either way a thread takes every `rows`-th row of
// its block's chunk.
struct Shape {
  VoxelLayout layout;  // of x; the others lie in the same order of memory, with strides of their own
  int groups;
  int group_channels;
  int chunks;
  int chunk_rows;
  int tile;   // vectors of a row: 1 channels-first
  int rows;   // that a block reads at a time
  int parts;  // of the rows, whose sums are added up last
};

template <class Stored>
struct Input {
  const Stored* data;
  int64_t batch_stride, channel_stride;
};
template <class Stored>
struct Output {
  Stored* data;
  int64_t batch_stride, channel_stride;
};

enum class Order { forward, backward };

template <class Stored_, int vec_, bool by_voxel_>
struct Place {
  using Stored = Stored_;
  using Sum = accumulate_t<Stored>;
  static constexpr int vec = vec_;
  static constexpr bool by_voxel = by_voxel_;
  static constexpr int sums = by_voxel ? vec : 1;    // channels of a thread
  static constexpr int weight = by_voxel ? 1 : vec;  // elements of a channel in a vector

  // A kernel that reads again what another has just read begins at the end: the cache holds that.
  __device__ explicit Place(const Shape& shape, Order order = Order::forward) {
    const bool back = order == Order::backward;
    chunk = static_cast<int>(back ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    const int line = static_cast<int>(back ? gridDim.y - 1 - blockIdx.y : blockIdx.y);
    const int channels = static_cast<int>(shape.layout.channels);
    const int thread = static_cast<int>(threadIdx.x);
    rows = shape.rows;
    bool active = true;
    if constexpr (by_voxel) {
      const int vectors = channels / vec;
      const int tiles = (vectors + shape.tile - 1) / shape.tile;
      image = line / tiles;
      first_channel = line % tiles * shape.tile * vec;
      row = thread / shape.tile;
      column = thread % shape.tile;
      channel = first_channel + column * vec;
      active = channel < channels && row < rows;
      step = channels;
    } else {
      image = line / channels;
      first_channel = channel = line % channels;
      row = thread;
      column = 0;
      step = vec;
    }
    first = int64_t{chunk} * shape.chunk_rows;
    const int64_t all = by_voxel ? shape.layout.voxels : shape.layout.voxels / vec;
    here = static_cast<int>(min(int64_t{shape.chunk_rows}, all - first));
    if (!active) {
      row = here;
      channel = 0;
    }
  }
  // Of a channel in the block's chunk.
  __device__ double elements() const { return static_cast<double>(here) * weight; }
  // Where the block's first row is, in this thread's channels.
  template <class Memory>
  __device__ auto* begin(const Memory& memory) const {
    const int64_t line = by_voxel ? channel : channel * memory.channel_stride;
    return memory.data + (image * memory.batch_stride + line + first * step);
  }
  __device__ int64_t offset(int of_row) const { return int64_t{of_row} * step; }

  int64_t first;
  int chunk, image, first_channel, channel, row, rows, column, here, step;
};

// Vectors of a thread that are read one after the other before any of them is used: rows from, from + rows,
// ...
template <class P, int count>
struct Batch {
  using Sum = typename P::Sum;

  __device__ static bool has(const P& place, int from, int k) { return from + k * place.rows < place.here; }
  __device__ void read(const typename P::Stored* begin, const P& place, int from) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      if (has(place, from, k)) {
        packs[k] = Pack<typename P::Stored, P::vec>::read(begin + place.offset(from + k * place.rows));
      }
    }
  }
  // body(channel of the thread, value)
  template <class Body>
  __device__ void for_each(const P& place, int from, const Body& body) const {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      if (!has(place, from, k)) continue;
#pragma unroll
      for (int e = 0; e < P::vec; ++e) body(P::by_voxel ? e : 0, packs[k].at(e));
    }
  }

  Pack<typename P::Stored, P::vec> packs[count];
};

template <class Stored>
struct Parameters {
  using Sum = accumulate_t<Stored>;
  const Sum* weight;  // null: 1
  const Sum* bias;    // null: 0
  Sum eps;
  Sum slope;
};

// body(channel of the thread, channel of the image, group of the image)
template <class P, class Body>
__device__ void for_each_channel(const Shape& shape, const P& place, const Body& body) {
  int group = place.channel, within = 0;
  if (shape.group_channels > 1) {
    group = place.channel / shape.group_channels;
    within = place.channel % shape.group_channels;
  }
#pragma unroll
  for (int e = 0; e < P::sums; ++e) {
    body(e, place.channel + e, place.image * shape.groups + group);
    if (++within == shape.group_channels) {
      within = 0;
      ++group;
    }
  }
}

// Of a thread's channels: normalised = (x - mean) scale + shift.
template <class P>
struct Affine {
  using Sum = typename P::Sum;

  __device__ void read(const Shape& shape, const P& place, const Sum* means, const Sum* rstds,
                       const Parameters<typename P::Stored>& parameters) {
    for_each_channel(shape, place, [&](int e, int channel, int64_t row) {
      mean[e] = means[row];
      scale[e] = rstds[row] * (parameters.weight == nullptr ? Sum(1) : parameters.weight[channel]);
      shift[e] = parameters.bias == nullptr ? Sum(0) : parameters.bias[channel];
    });
  }

  Sum mean[P::sums], scale[P::sums], shift[P::sums];
};

}  // namespace
}  // namespace lungkit
