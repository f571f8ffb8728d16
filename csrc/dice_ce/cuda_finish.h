// The second launch: adds up the chunks in a fixed order and turns the sums into statistics, or into the loss
// and its slopes.
#pragma once

#include "cuda_few_classes.h"
#include "finish.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

constexpr int finish_threads = 1024;
constexpr int finish_warps = finish_threads / 32;
// Images times classes that one warp finishes: the usual loss has a handful, for which a block of warps would
// only wait.
constexpr int most_warp_terms = 64;
constexpr int most_shared_sums = 1024;  // that shared memory holds

// What the first launch left: the sums of image b are partial[(b * width + k) * chunks + chunk], k = row *
// classes + c and, for k = width - 1, the voxels.
template <class A>
struct Partial {
  const A* sums;
  int64_t images;
  int classes;
  int chunks;

  LUNGKIT_HD int width() const { return partial_width(classes); }

  // One sum over all chunks, by a whole warp; valid in lane 0. A chunk that is not there is 0, so that all
  // loads of a batch are on their way together: a loop over what is left would wait for each.
  __device__ double total(int64_t output) const {
    constexpr int batch = 16;
    const A* const of_output = sums + output * chunks;
    double sum = 0;
#pragma unroll 1
    for (int first = threadIdx.x % 32; first < chunks; first += 32 * batch) {
      A of_chunk[batch];
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        of_chunk[k] = first + 32 * k < chunks ? of_output[first + 32 * k] : A(0);
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) sum += static_cast<double>(of_chunk[k]);
    }
    return warp_sum(sum);
  }
};

// Writes (statistic_rows, images, classes).
template <class A>
__global__ void __launch_bounds__(finish_threads)
    collect_statistics(Partial<A> partial, A* __restrict__ statistics) {
  const int width = partial.width(), classes = partial.classes;
  const int64_t first = blockIdx.x * finish_warps + threadIdx.x / 32;
  for (int64_t output = first; output < partial.images * width; output += gridDim.x * finish_warps) {
    const double total = partial.total(output);
    if (threadIdx.x % 32 != 0) continue;
    const int64_t image = output / width;
    const int k = static_cast<int>(output - image * width);
    const auto at = [&](int row, int c) { return (row * partial.images + image) * classes + c; };
    if (k < width - 1) {
      statistics[at(k / classes, k % classes)] = static_cast<A>(total);
    } else {
      for (int c = 0; c < classes; ++c) statistics[at(row_voxels, c)] = static_cast<A>(total);
    }
  }
}

// The threads of one block, for finish(). Each must call add_up(), once.
struct Block {
  explicit Block(int64_t) {}
  __device__ int rank() const { return threadIdx.x; }
  __device__ static constexpr int size() { return finish_threads; }

  template <class... Number>
  __device__ void add_up(Number&... numbers) const {
    __shared__ double of_warp[sizeof...(numbers)][finish_warps];
    int k = 0;
    ((numbers = warp_sum(numbers)), ...);
    if (threadIdx.x % 32 == 0) ((of_warp[k++][threadIdx.x / 32] = numbers), ...);
    __syncthreads();
    k = 0;
    ((numbers = of_warp[k++][threadIdx.x % 32]), ...);
    ((numbers = __shfl_sync(0xffffffffu, warp_sum(numbers), 0)), ...);
  }
};

// Those of its first warp. The lanes from 2 first_distance on have nothing to add.
struct Warp {
  explicit Warp(int64_t terms) {
    while (2 * first_distance < std::min<int64_t>(terms, size()))
      first_distance = std::max(1, 2 * first_distance);
  }
  __device__ int rank() const { return threadIdx.x; }
  LUNGKIT_HD static constexpr int size() { return 32; }

  template <class... Number>
  __device__ void add_up(Number&... numbers) const {
#pragma unroll 1
    for (int distance = first_distance; distance > 0; distance /= 2) {
      ((numbers += __shfl_xor_sync(0xffffffffu, numbers, distance)), ...);
    }
  }

  int first_distance = 0;
};

// One block, of which a Team finishes. `memory` has room for images * width numbers, and may be null up to
// most_shared_sums of them; weight may be null.
template <class A, class Team>
__global__ void __launch_bounds__(finish_threads)
    finish_loss(Partial<A> partial, const A* __restrict__ weight, bool class_indices, DiceCeOptions options,
                LossFactors factors, Team team, double* __restrict__ memory, A* __restrict__ loss,
                A* __restrict__ slopes) {
  __shared__ double shared[most_shared_sums];
  const int images = static_cast<int>(partial.images), classes = partial.classes, width = partial.width();
  const int outputs = images * width, terms = images * classes;
  double* const sums = outputs <= most_shared_sums ? shared : memory;
  for (int output = threadIdx.x / 32; output < outputs; output += finish_warps) {
    const double total = partial.total(output);
    if (threadIdx.x % 32 == 0) sums[output] = total;
  }
  __syncthreads();
  if (threadIdx.x >= Team::size()) return;
  const double value = finish(
      team, images, classes, class_indices, options, factors,
      [&](Row row, int b, int c) {
        return sums[b * width + (row == row_voxels ? width - 1 : row * classes + c)];
      },
      [&](int c) { return weight == nullptr ? 1.0 : static_cast<double>(weight[c]); },
      [&](Row row, int b, int c, double slope) {
        slopes[row * terms + b * classes + c] = static_cast<A>(slope);
      });
  if (threadIdx.x == 0) *loss = static_cast<A>(value);
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
