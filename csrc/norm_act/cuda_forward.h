// Forward: the moments of chunks, their combination in order, and a pass that writes; or one launch where a
// block holds a channel.
#pragma once

#include "cuda_block.h"

namespace lungkit {
namespace {

constexpr int moment_vectors = 4;         // of a thread in flight
constexpr int small_forward_vectors = 8;  // of a thread, held in registers
constexpr int apply_vectors = 4;          // of a thread in flight, those of the residual included

// Of what a thread has read of its channels. Each batch is measured in two passes and merged by Chan's
// formula.
template <class P>
struct Moments {
  using Sum = typename P::Sum;
  static constexpr int sums = P::sums;

  template <int size>
  __device__ void add(const Batch<P, size>& batch, const P& place, int from) {
    int elements = 0;
    for (int k = 0; k < size; ++k) elements += batch.has(place, from, k) ? P::weight : 0;
    if (elements == 0) return;
    const Sum added = static_cast<Sum>(elements), inverse = Sum(1) / added;
    const Sum all = count + added, share = added / all;
    Sum of_batch[sums] = {};
    batch.for_each(place, from, [&](int e, Sum value) { of_batch[e] += value; });
#pragma unroll
    for (int e = 0; e < sums; ++e) of_batch[e] *= inverse;
    batch.for_each(place, from,
                   [&](int e, Sum value) { squares[e] += (value - of_batch[e]) * (value - of_batch[e]); });
#pragma unroll
    for (int e = 0; e < sums; ++e) {
      const Sum distance = of_batch[e] - mean[e];
      mean[e] += distance * share;
      squares[e] += distance * distance * (count * share);
    }
    count = all;
  }

  Sum count = 0;
  Sum mean[sums] = {}, squares[sums] = {};
};

// The moments of a block's channels from those of its threads: means in `first`, squares in `second`.
template <class P>
__device__ void combine_moments(const Shape& shape, const Moments<P>& mine,
                                Columns<typename P::Sum, P::sums>& columns) {
  using Sum = typename P::Sum;
  __shared__ Sum counts[2 * block_threads];  // of the threads, then of the parts
  counts[threadIdx.x] = mine.count;
  columns.put(mine.mean, mine.squares);
  columns.reduce(shape, [&](int level, int e, int slot, int step, int end) {
    const Sum* const count = counts + level * block_threads;
    Sum* const means = columns.first + e * columns.stride;
    Sum* const squares = columns.second + e * columns.stride;
    const Sum pivot = means[slot];
    Sum elements = 0, shift = 0;
    for (int i = slot; i < end; i += step) {
      elements += count[i];
      shift += count[i] * (means[i] - pivot);
    }
    const Sum mean = elements > 0 ? pivot + shift / elements : pivot;
    Sum total = 0;
    for (int i = slot; i < end; i += step) {
      total += squares[i] + count[i] * ((means[i] - mean) * (means[i] - mean));
    }
    means[slot] = mean;
    squares[slot] = total;
    if (level == 0 && e == 0) counts[block_threads + slot] = elements;
  });
}

template <class P>
__global__ void __launch_bounds__(block_threads, 4)
    norm_moments_kernel(Shape shape, Input<typename P::Stored> x, Partials<typename P::Sum> partials) {
  __shared__ Columns<typename P::Sum, P::sums> columns;
  const P place(shape);
  const auto* const begin = place.begin(x);
  Moments<P> moments;
#pragma unroll 1
  for (int from = place.row; from < place.here; from += moment_vectors * place.rows) {
    Batch<P, moment_vectors> batch;
    batch.read(begin, place, from);
    moments.add(batch, place, from);
  }
  combine_moments(shape, moments, columns);
  partials.write(shape, place, columns);
}

// One block a group of an image.
template <class Sum>
__global__ void __launch_bounds__(block_threads)
    norm_combine_kernel(Shape shape, int chunk_elements, Partials<Sum> partials, Sum eps, Sum* mean,
                        Sum* rstd) {
  const int64_t count = int64_t{shape.group_channels} * shape.chunks, first = blockIdx.x * count;
  const double whole = chunk_elements;
  const double last = static_cast<double>(shape.layout.voxels) - whole * (shape.chunks - 1);
  const double all = static_cast<double>(shape.group_channels) * static_cast<double>(shape.layout.voxels);
  // body(partial, elements of its chunk)
  const auto for_each = [&](const auto& body) {
    int chunk = static_cast<int>(threadIdx.x) % shape.chunks;
    const int step = block_threads % shape.chunks;
    for (int64_t i = threadIdx.x; i < count; i += block_threads) {
      body(first + i, chunk == shape.chunks - 1 ? last : whole);
      chunk += step;
      if (chunk >= shape.chunks) chunk -= shape.chunks;
    }
  };
  double sum = 0;
  for_each([&](int64_t i, double elements) { sum += partials.first[i] * elements; });
  const double centre = block_sum(sum) / all;
  double squares = 0;
  for_each([&](int64_t i, double elements) {
    const double distance = partials.first[i] - centre;
    squares += partials.second[i] + distance * distance * elements;
  });
  squares = block_sum(squares);
  if (threadIdx.x != 0) return;
  mean[blockIdx.x] = static_cast<Sum>(centre);
  rstd[blockIdx.x] = static_cast<Sum>(1 / sqrt(squares / all + static_cast<double>(eps)));
}

// leaky((x - mean) scale + shift + residual) of a batch
template <class P, int size, bool with_residual>
__device__ void write_activated(const Batch<P, size>& batch, const P& place, int from,
                                const Affine<P>& affine, const typename P::Stored* residual,
                                typename P::Stored* y, typename P::Sum slope) {
  using Sum = typename P::Sum;
  Batch<P, size> others;
  if constexpr (with_residual) others.read(residual, place, from);
#pragma unroll
  for (int k = 0; k < size; ++k) {
    if (!batch.has(place, from, k)) continue;
    Pack<typename P::Stored, P::vec> out;
#pragma unroll
    for (int e = 0; e < P::vec; ++e) {
      const int c = P::by_voxel ? e : 0;
      Sum value = (batch.packs[k].at(e) - affine.mean[c]) * affine.scale[c] + affine.shift[c];
      if constexpr (with_residual) value += others.packs[k].at(e);
      out.set(e, value > Sum(0) ? value : value * slope);
    }
    out.write(y + place.offset(from + k * place.rows));
  }
}

template <class P>
__global__ void __launch_bounds__(block_threads, 4)
    norm_apply_kernel(Shape shape, Input<typename P::Stored> x, Input<typename P::Stored> residual,
                      Output<typename P::Stored> y, const typename P::Sum* __restrict__ mean,
                      const typename P::Sum* __restrict__ rstd, Parameters<typename P::Stored> parameters) {
  const P place(shape, Order::backward);
  Affine<P> affine;
  affine.read(shape, place, mean, rstd, parameters);
  const auto* const begin = place.begin(x);
  auto* const to = place.begin(y);
  const auto write = [&]<bool with_residual>(const typename P::Stored* other) {
    constexpr int size = with_residual ? apply_vectors / 2 : apply_vectors;
#pragma unroll 1
    for (int from = place.row; from < place.here; from += size * place.rows) {
      Batch<P, size> batch;
      batch.read(begin, place, from);
      write_activated<P, size, with_residual>(batch, place, from, affine, other, to, parameters.slope);
    }
  };
  if (residual.data == nullptr) {
    write.template operator()<false>(nullptr);
  } else {
    write.template operator()<true>(place.begin(residual));
  }
}

// Channels that one block holds, each a group of its own: read once.
template <class P>
__global__ void __launch_bounds__(block_threads, 1)
    norm_small_kernel(Shape shape, Input<typename P::Stored> x, Input<typename P::Stored> residual,
                      Output<typename P::Stored> y, typename P::Sum* mean, typename P::Sum* rstd,
                      Parameters<typename P::Stored> parameters) {
  using Sum = typename P::Sum;
  constexpr int size = small_forward_vectors;
  __shared__ Columns<Sum, P::sums> columns;
  const P place(shape);
  Batch<P, size> batch;
  batch.read(place.begin(x), place, place.row);
  Moments<P> moments;
  moments.add(batch, place, place.row);
  combine_moments(shape, moments, columns);
  columns.for_each_channel(shape, place, [&](int channel, int entry) {
    const double variance = static_cast<double>(columns.second[entry]) / place.elements();
    const Sum inverse = static_cast<Sum>(1 / sqrt(variance + static_cast<double>(parameters.eps)));
    mean[place.image * shape.layout.channels + channel] = columns.first[entry];
    rstd[place.image * shape.layout.channels + channel] = inverse;
    columns.second[entry] = inverse * (parameters.weight == nullptr ? Sum(1) : parameters.weight[channel]);
  });
  __syncthreads();
  Affine<P> affine;
#pragma unroll
  for (int e = 0; e < P::sums; ++e) {
    affine.mean[e] = columns.first[e * columns.stride + place.column];
    affine.scale[e] = columns.second[e * columns.stride + place.column];
    affine.shift[e] = parameters.bias == nullptr ? Sum(0) : parameters.bias[place.channel + e];
  }
  auto* const to = place.begin(y);
  if (residual.data == nullptr) {
    write_activated<P, size, false>(batch, place, place.row, affine, nullptr, to, parameters.slope);
  } else {
    write_activated<P, size, true>(batch, place, place.row, affine, place.begin(residual), to,
                                   parameters.slope);
  }
}

}  // namespace
}  // namespace lungkit
