// The second launch: adds up the chunks in a fixed order and turns the sums into statistics, or into the loss
// and its slopes.
#pragma once

#include "cuda_few_classes.h"
#include "finish.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

constexpr int finish_threads = 1024;

// What the first launch left: the sums of image b are partial[(b * width + k) * chunks + chunk], k = row *
// classes + c and, for k = width - 1, the voxels.
template <class A>
struct Partial {
  const A* sums;
  int64_t images;
  int64_t classes;
  int64_t chunks;

  LUNGKIT_HD int64_t width() const { return partial_width(classes); }

  // One sum over all chunks, by a whole warp; valid in lane 0.
  __device__ double total(int64_t output) const {
    double sum = 0;
#pragma unroll 8
    for (int64_t chunk = threadIdx.x % 32; chunk < chunks; chunk += 32) {
      sum += static_cast<double>(sums[output * chunks + chunk]);
    }
    return warp_sum(sum);
  }
};

// Writes (statistic_rows, images, classes).
template <class A>
__global__ void __launch_bounds__(finish_threads)
    collect_statistics(Partial<A> partial, A* __restrict__ statistics) {
  const int64_t width = partial.width(), classes = partial.classes, warps = finish_threads / 32;
  const int64_t first = blockIdx.x * warps + threadIdx.x / 32;
  for (int64_t output = first; output < partial.images * width; output += gridDim.x * warps) {
    const double total = partial.total(output);
    if (threadIdx.x % 32 != 0) continue;
    const int64_t image = output / width, k = output % width;
    const auto at = [&](int64_t row, int64_t c) { return (row * partial.images + image) * classes + c; };
    if (k < width - 1) {
      statistics[at(k / classes, k % classes)] = static_cast<A>(total);
    } else {
      for (int64_t c = 0; c < classes; ++c) statistics[at(row_voxels, c)] = static_cast<A>(total);
    }
  }
}

// The threads of one block, for finish().
struct Block {
  __device__ int64_t rank() const { return threadIdx.x; }
  __device__ int64_t size() const { return finish_threads; }

  // Each thread must call it.
  __device__ double sum(double value) const {
    __shared__ double of_warp[finish_threads / 32];
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    double total = 0;
    for (int warp = 0; warp < finish_threads / 32; ++warp) total += of_warp[warp];
    return total;
  }
};

// One block. `sums` has room for images * width numbers; weight may be null.
template <class A>
__global__ void __launch_bounds__(finish_threads)
    finish_loss(Partial<A> partial, const A* __restrict__ weight, bool class_indices, DiceCeOptions options,
                double* __restrict__ sums, A* __restrict__ loss, A* __restrict__ slopes) {
  const int64_t images = partial.images, classes = partial.classes, width = partial.width();
  for (int64_t output = threadIdx.x / 32; output < images * width; output += finish_threads / 32) {
    const double total = partial.total(output);
    if (threadIdx.x % 32 == 0) sums[output] = total;
  }
  __syncthreads();
  const double value = finish(
      Block{}, images, classes, class_indices, options,
      [&](Row row, int64_t b, int64_t c) {
        return sums[b * width + (row == row_voxels ? width - 1 : row * classes + c)];
      },
      [&](int64_t c) { return weight == nullptr ? 1.0 : static_cast<double>(weight[c]); },
      [&](Row row, int64_t b, int64_t c, double slope) {
        slopes[(row * images + b) * classes + c] = static_cast<A>(slope);
      });
  if (threadIdx.x == 0) *loss = static_cast<A>(value);
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
