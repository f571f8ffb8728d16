// Sums over a block and over a warp, in an order that the shape decides.
#pragma once

#include "cuda_memory.h"

namespace lungkit {
namespace {

constexpr int warps = block_threads / 32;

template <class T>
__device__ T warp_sum(T value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <class T>
__device__ T block_sum(T value) {
  __shared__ T of_warp[warps];
  value = warp_sum(value);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  for (int w = 0; w < warps; ++w) total += of_warp[w];
  return total;
}

// Two numbers of each channel that each thread holds, number e of thread t at [e stride + t]. Threads that
// add up take (t, e) with e running fastest; the stride puts those of a warp into banks of their own.
template <class Sum, int sums>
struct Columns {
  static constexpr int stride = block_threads + 32 / sums;

  __device__ void put(const Sum (&one)[sums], const Sum (&other)[sums]) {
#pragma unroll
    for (int e = 0; e < sums; ++e) {
      first[e * stride + threadIdx.x] = one[e];
      second[e * stride + threadIdx.x] = other[e];
    }
  }
  // combine(level, e, slot, step, end) puts what the entries slot, slot + step, ... before `end` of number e
  // make together into entry `slot`: first what some of the rows hold, then what those sums do. The result of
  // column c is in entry c, for every thread to read.
  template <class Combine>
  __device__ void reduce(const Shape& shape, const Combine& combine) {
    int end = shape.rows * shape.tile, slots = shape.parts * shape.tile;
    for (int level = 0; level < 2; ++level) {
      __syncthreads();
      for (int j = threadIdx.x; j < slots * sums; j += block_threads) {
        combine(level, j % sums, j / sums, slots, end);
      }
      end = slots;
      slots = shape.tile;
    }
    __syncthreads();
  }
  // body(channel of the image, its entry) of every channel of the block, each by one thread.
  template <class P, class Body>
  __device__ static void for_each_channel(const Shape& shape, const P& place, const Body& body) {
    const int end = min(shape.tile * sums, static_cast<int>(shape.layout.channels) - place.first_channel);
    for (int j = threadIdx.x; j < end; j += block_threads) {
      body(place.first_channel + j, j % sums * stride + j / sums);
    }
  }

  Sum first[sums * stride];
  Sum second[sums * stride];
};

// Mean and sum of squared distances to it, or two sums, of every channel of every chunk, at
// [(image C + channel) chunks + chunk].
template <class Sum>
struct Partials {
  template <class P, int sums>
  __device__ void write(const Shape& shape, const P& place, const Columns<Sum, sums>& columns) const {
    columns.for_each_channel(shape, place, [&](int channel, int entry) {
      const int64_t i = (place.image * shape.layout.channels + channel) * shape.chunks + place.chunk;
      first[i] = columns.first[entry];
      second[i] = columns.second[entry];
    });
  }

  Sum* first;
  Sum* second;
};

}  // namespace
}  // namespace lungkit
