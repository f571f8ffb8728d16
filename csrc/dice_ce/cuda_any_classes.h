// CUDA kernels for any number of classes, activation, kind of label and layout. Logits are read twice forward
// and three times backward, a tile at a time, so that all reads but the first come from the cache.
#pragma once

#include "cuda_few_classes.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

constexpr int thread_voxels = 4;  // of a thread in one tile
constexpr int warp_voxels = 32 * thread_voxels;
constexpr int most_warps = 8;
constexpr int64_t granted_shared_bytes = 48 * 1024;  // what every device grants without asking

// Blocks that a multiprocessor should hold, which bounds the registers of a thread.
template <class T>
constexpr int any_blocks = sizeof(T) == 8 ? 1 : 3;

// Bytes of shared memory of a warp: its sums in double. A block takes no other, so what fits is granted.
inline int64_t warp_bytes(int64_t classes) {
  return partial_width(classes) * static_cast<int64_t>(sizeof(double));
}

// Warps of a block; 0 where not even one fits.
inline int warps_for(int64_t classes) {
  const int64_t fitting = granted_shared_bytes / warp_bytes(classes);
  return static_cast<int>(fitting < most_warps ? fitting : most_warps);
}

// log sum exp of a voxel's logits, as the largest one and the sum relative to it.
template <class A>
struct Exponentials {
  A largest = 0, sum = 0;

  __device__ __forceinline__ void add(A z, bool first) {
    if (first) {
      largest = z;
      sum = 1;
      return;
    }
    const A e = exp_nonpositive(-absolute(z - largest));
    sum = z > largest ? sum * e + A(1) : sum + e;
    largest = larger(z, largest);
  }
  __device__ __forceinline__ A lse() const { return largest + log_positive(sum); }
  __device__ __forceinline__ A softmax(A z) const { return exp_nonpositive(z - largest) * reciprocal(sum); }
};

template <class T>
__device__ __forceinline__ accumulate_t<T> load_logit(const View& view, int64_t image, int64_t c, int64_t v) {
  const VoxelLayout& l = view.logits_layout;
  const int64_t offset = image * l.batch_stride + c * l.channel_stride + v * l.voxel_stride;
  return static_cast<accumulate_t<T>>(static_cast<const T*>(view.logits)[offset]);
}

// A label vector's element, or 1 or 0; where it is 0 an infinite v does not count.
template <class A>
struct NumberLabel {
  A y;

  __device__ __forceinline__ A times(A v) const { return y == A(0) ? A(0) : y * v; }
  __device__ __forceinline__ A rest_times(A v) const { return y == A(1) ? A(0) : (A(1) - y) * v; }
  __device__ __forceinline__ void add(A& sum, A v) const { add_where(y != A(0), sum, y * v); }
  __device__ __forceinline__ A value() const { return y; }
};

template <class T, class A = accumulate_t<T>>
__device__ __forceinline__ ClassOfVoxel<A, NumberLabel<A>> load_class(const View& view,
                                                                      const Exponentials<A>& exponentials,
                                                                      int64_t image, int64_t c, int64_t v,
                                                                      int code) {
  const A z = load_logit<T>(view, image, c, v);
  A p = z;
  if (view.options.activation == Activation::softmax) p = exponentials.softmax(z);
  if (view.options.activation == Activation::sigmoid) p = BinaryLogit<A>(z).p;
  const int64_t index = view.logits_layout.channels == 1 ? 1 : c;  // one channel is that of class 1
  const A y = view.class_indices ? (code == index ? A(1) : A(0)) : load_label<A>(view, image, c, v);
  const A lse = view.options.cross_entropy == CrossEntropy::softmax ? exponentials.lse() : A(0);
  const DiceCeOptions& o = view.options;
  return {o.squared, o.minimum, static_cast<A>(o.gamma), z, p, lse, {y}};
}

template <class T>
__global__ void __launch_bounds__(most_warps * 32, any_blocks<T>)
    any_class_sums(View view, accumulate_t<T>* __restrict__ partial) {
  using A = accumulate_t<T>;
  LUNGKIT_DYNAMIC_SHARED(double, of_block);  // (warps, partial_width)
  const int64_t image = view.image(), classes = view.logits_layout.channels, width = partial_width(classes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t last = view.last_voxel();
  const bool exponential =
      view.options.activation == Activation::softmax || view.options.cross_entropy == CrossEntropy::softmax;
  double* const of_warp = of_block + warp * width;
  for (int64_t k = lane; k < width; k += 32) of_warp[k] = 0;
  __syncwarp();

  int count = 0;
  bool valid = true;
  for (int64_t tile = view.first_voxel() + warp * warp_voxels; tile < last; tile += warps * warp_voxels) {
    int codes[thread_voxels];
    Exponentials<A> exponentials[thread_voxels];
#pragma unroll
    for (int k = 0; k < thread_voxels; ++k) {
      const int64_t v = tile + k * 32 + lane;
      codes[k] = v < last ? load_code(view, image, v) : left_out;
      count += codes[k] >= 0;
      valid &= codes[k] != invalid;
    }
    for (int64_t c = 0; c < classes && exponential; ++c) {
#pragma unroll
      for (int k = 0; k < thread_voxels; ++k) {
        if (codes[k] >= 0) exponentials[k].add(load_logit<T>(view, image, c, tile + k * 32 + lane), c == 0);
      }
    }
    for (int64_t c = 0; c < classes; ++c) {
      A sums[class_rows] = {};
#pragma unroll
      for (int k = 0; k < thread_voxels; ++k) {
        if (codes[k] < 0) continue;
        load_class<T>(view, exponentials[k], image, c, tile + k * 32 + lane, codes[k])
            .add_to(sums, view.options.cross_entropy, true);
      }
#pragma unroll
      for (int row = 0; row < class_rows; ++row) {
        const A sum = warp_sum(sums[row]);
        if (lane == 0) of_warp[row * classes + c] += static_cast<double>(sum);
      }
    }
  }
  const int of_lanes = warp_sum(count);
  if (lane == 0) of_warp[width - 1] = of_lanes;
  const bool all_valid = __syncthreads_and(valid);
  for (int64_t k = threadIdx.x; k < width; k += blockDim.x) {
    double total = 0;
    for (int w = 0; w < warps; ++w) total += of_block[w * width + k];
    partial[(image * width + k) * view.chunks + view.chunk()] = static_cast<A>(all_valid ? total : NAN);
  }
}

// `gradient` is laid out as `out` says.
template <class T>
__global__ void __launch_bounds__(most_warps * 32, any_blocks<T>)
    any_class_gradient(View view, const accumulate_t<T>* __restrict__ slopes,
                       const accumulate_t<T>* __restrict__ scale, VoxelLayout out, T* __restrict__ gradient) {
  using A = accumulate_t<T>;
  const int64_t image = view.image(), last = view.last_voxel();
  const int64_t classes = view.logits_layout.channels, images = view.logits_layout.batch;
  const DiceCeOptions& options = view.options;
  const bool soft_activation = options.activation == Activation::softmax;
  const bool soft_entropy = options.cross_entropy == CrossEntropy::softmax;
  const A factor = scale == nullptr ? A(1) : *scale;
  const auto at = [&](int row, int64_t c) { return factor * slopes[(row * images + image) * classes + c]; };

  for (int64_t v = view.first_voxel() + threadIdx.x; v < last; v += blockDim.x) {
    const int code = load_code(view, image, v);
    T* const to = gradient + image * out.batch_stride + v * out.voxel_stride;
    if (code < 0) {
      for (int64_t c = 0; c < classes; ++c) to[c * out.channel_stride] = static_cast<T>(A(0));
      continue;
    }
    Exponentials<A> exponentials;
    A mean = 0, pull = 0;
    if (soft_activation || soft_entropy) {
      for (int64_t c = 0; c < classes; ++c) exponentials.add(load_logit<T>(view, image, c, v), c == 0);
      for (int64_t c = 0; c < classes; ++c) {
        const auto voxel = load_class<T>(view, exponentials, image, c, v, code);
        mean += voxel.p * voxel.slope_of_prediction(at(row_intersection, c), at(row_prediction, c));
        if (soft_entropy) pull += voxel.slope_of_surprise(at(row_cross_entropy, c), at(row_rest, c));
      }
    }
    for (int64_t c = 0; c < classes; ++c) {
      const auto voxel = load_class<T>(view, exponentials, image, c, v, code);
      const A soft = soft_activation || !soft_entropy ? voxel.p : exponentials.softmax(voxel.z);
      const A g = voxel.gradient(
          options.activation, options.cross_entropy, [&](Row row) { return at(row, c); }, mean, pull, soft);
      to[c * out.channel_stride] = static_cast<T>(g);
    }
  }
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
