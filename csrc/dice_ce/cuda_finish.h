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

// Sum over the block, in every thread; each thread must call it.
__device__ inline double block_sum(double value) {
  __shared__ double of_warp[finish_threads / 32];
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < finish_threads / 32; ++warp) total += of_warp[warp];
  return total;
}

// One block. `sums` has room for images * width numbers; weight may be null.
template <class A>
__global__ void __launch_bounds__(finish_threads)
    finish_loss(Partial<A> partial, const A* __restrict__ weight, bool class_indices, bool binary,
                LossOptions options, double* __restrict__ sums, A* __restrict__ loss,
                A* __restrict__ slopes) {
  const int64_t images = partial.images, classes = partial.classes, width = partial.width();
  for (int64_t output = threadIdx.x / 32; output < images * width; output += finish_threads / 32) {
    const double total = partial.total(output);
    if (threadIdx.x % 32 == 0) sums[output] = total;
  }
  __syncthreads();

  const auto sum = [&](int64_t row, int64_t image, int64_t c) {
    return sums[image * width + row * classes + c];
  };
  const auto voxels = [&](int64_t image) { return sums[image * width + width - 1]; };
  const auto slope = [&](int64_t row, int64_t image, int64_t c) -> A& {
    return slopes[(row * images + image) * classes + c];
  };
  const auto weight_of = [&](int64_t c) { return weight == nullptr ? 1.0 : static_cast<double>(weight[c]); };

  const int64_t first = first_dice_class(classes, options);
  const int64_t groups = options.batch ? (images > 0 ? 1 : 0) : images,
                images_a_group = options.batch ? images : 1;
  const int64_t counted = classes - first;
  double dice = 0;
  for (int64_t i = threadIdx.x; i < groups * classes; i += finish_threads) {
    const int64_t group = i / classes, c = i % classes;
    double intersection = 0, total = 0;
    for (int64_t b = group; b < group + images_a_group; ++b) {
      intersection += sum(row_intersection, b, c);
      total += sum(row_prediction, b, c) + sum(row_label, b, c);
    }
    const DiceTerm term = dice_term(intersection, total, options);
    const double terms = options.mean ? static_cast<double>(groups * counted) : 1.0;
    const double scale = c < first ? 0.0 : options.lambda_dice * (counted > 1 ? weight_of(c) : 1.0) / terms;
    dice += scale * term.loss;
    for (int64_t b = group; b < group + images_a_group; ++b) {
      slope(row_intersection, b, c) = static_cast<A>(scale * term.intersection);
      slope(row_prediction, b, c) = static_cast<A>(scale * term.prediction);
      slope(row_label, b, c) = slope(row_voxels, b, c) = A(0);
    }
  }
  dice = block_sum(dice);

  double entropy = 0, divisor = 0;
  for (int64_t i = threadIdx.x; i < images * classes; i += finish_threads) {
    const int64_t b = i / classes, c = i % classes;
    const EntropyWeights w = entropy_weights(weight_of(c), classes, binary, options);
    entropy += w.label * sum(row_cross_entropy, b, c) + w.rest * sum(row_rest, b, c);
    divisor += entropy_divisor(weight_of(c), sum(row_label, b, c), voxels(b), c, binary, class_indices);
  }
  entropy = block_sum(entropy);
  divisor = block_sum(divisor);
  if (!options.mean || divisor == 0) divisor = 1;
  for (int64_t i = threadIdx.x; i < images * classes; i += finish_threads) {
    const int64_t b = i / classes, c = i % classes;
    const EntropyWeights w = entropy_weights(weight_of(c), classes, binary, options);
    slope(row_cross_entropy, b, c) = static_cast<A>(options.lambda_ce * w.label / divisor);
    slope(row_rest, b, c) = static_cast<A>(options.lambda_ce * w.rest / divisor);
  }
  if (threadIdx.x == 0) *loss = static_cast<A>(dice + options.lambda_ce * entropy / divisor);
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
