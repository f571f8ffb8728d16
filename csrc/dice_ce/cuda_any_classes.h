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

// Warps of a block, each with double sums (few_rows, classes) in shared memory; 0 where not even one fits.
inline int warps_for(int64_t classes) {
  const int64_t fitting = granted_shared_bytes / (few_rows * classes * static_cast<int64_t>(sizeof(double)));
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

// What one class of one voxel is: logit, prediction, label.
template <class A>
struct Voxel {
  A z, p, y;

  __device__ __forceinline__ Voxel(const View& view, A logit, const Exponentials<A>& exponentials,
                                   int64_t image, int64_t c, int64_t v, int code)
      : z(logit) {
    switch (view.options.activation) {
      case Activation::softmax: p = exponentials.softmax(z); break;
      case Activation::sigmoid: p = BinaryLogit<A>(z).p; break;
      default: p = z;
    }
    const int64_t index =
        view.logits_layout.channels == 1 ? 1 : c;  // one channel is the probability of class 1
    y = view.class_indices ? (code == index ? A(1) : A(0)) : load_label<A>(view, image, c, v);
  }
};

template <class A>
__device__ __forceinline__ Focal<A> focal_of(A surprise, A gamma) {
  const A p = gamma == A(0) ? A(1) : exp_nonpositive(-surprise);
  return Focal<A>(surprise, p, A(1) - p, gamma);
}

// Adds a voxel that counts to the sums of class c.
template <class A>
__device__ __forceinline__ void add_voxel(const View& view, const Voxel<A>& voxel,
                                          const Exponentials<A>& exponentials, A (&sums)[few_rows]) {
  const DiceCeOptions& options = view.options;
  const A gamma = static_cast<A>(options.gamma), y = voxel.y;
  sums[row_intersection] += voxel.p * y;
  sums[row_prediction] += options.squared ? voxel.p * voxel.p : voxel.p;
  sums[row_label] += options.squared ? y * y : y;
  if (options.cross_entropy == CrossEntropy::softmax) {
    const A surprise = exponentials.lse() - voxel.z;
    if (y != A(0)) sums[row_cross_entropy] += y * focal_of(surprise, gamma).value;
    sums[row_rest] += surprise;
  } else if (options.cross_entropy == CrossEntropy::binary) {
    const BinaryLogit<A> b(voxel.z);
    sums[row_cross_entropy] += y * Focal<A>(b.surprise, b.p, b.q, gamma).value;
    sums[row_rest] += (A(1) - y) * Focal<A>(b.surprise_not, b.q, b.p, gamma).value;
  }
}

template <class T>
__global__ void __launch_bounds__(most_warps * 32, any_blocks<T>)
    any_class_sums(View view, accumulate_t<T>* __restrict__ partial) {
  using A = accumulate_t<T>;
  LUNGKIT_DYNAMIC_SHARED(double, of_block);  // (warps, few_rows, classes)
  __shared__ double voxels_of_warp[most_warps];
  const int64_t image = view.image(), classes = view.logits_layout.channels, width = few_rows * classes;
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
      A sums[few_rows] = {};
#pragma unroll
      for (int k = 0; k < thread_voxels; ++k) {
        if (codes[k] < 0) continue;
        const int64_t v = tile + k * 32 + lane;
        const Voxel<A> voxel(view, load_logit<T>(view, image, c, v), exponentials[k], image, c, v, codes[k]);
        add_voxel(view, voxel, exponentials[k], sums);
      }
#pragma unroll
      for (int row = 0; row < few_rows; ++row) {
        const A sum = warp_sum(sums[row]);
        if (lane == 0) of_warp[row * classes + c] += static_cast<double>(sum);
      }
    }
  }
  const int of_lanes = warp_sum(count);
  if (lane == 0) voxels_of_warp[warp] = of_lanes;
  const bool all_valid = __syncthreads_and(valid);
  for (int64_t k = threadIdx.x; k <= width; k += blockDim.x) {
    double total = 0;
    for (int w = 0; w < warps; ++w) total += k < width ? of_block[w * width + k] : voxels_of_warp[w];
    partial[(image * (width + 1) + k) * view.chunks + blockIdx.x % view.chunks] =
        static_cast<A>(all_valid ? total : NAN);
  }
}

// dL/dp, and dL/d(-log p) without row_rest, of one class of one voxel.
template <class A>
struct VoxelSlopes {
  A prediction, surprise;

  __device__ __forceinline__ VoxelSlopes(const View& view, const Voxel<A>& voxel,
                                         const Exponentials<A>& exponentials, A overlap, A total, A entropy) {
    prediction = voxel.y * overlap + (view.options.squared ? A(2) * voxel.p * total : total);
    surprise = 0;
    if (view.options.cross_entropy == CrossEntropy::softmax && voxel.y != A(0)) {
      const A gamma = static_cast<A>(view.options.gamma);
      surprise =
          voxel.y * entropy * (gamma == A(0) ? A(1) : focal_of(exponentials.lse() - voxel.z, gamma).pull);
    }
  }
};

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
  const A factor = scale == nullptr ? A(1) : *scale, gamma = static_cast<A>(options.gamma);
  const auto at = [&](int row, int64_t c) { return factor * slopes[(row * images + image) * classes + c]; };

  for (int64_t v = view.first_voxel() + threadIdx.x; v < last; v += blockDim.x) {
    const int code = load_code(view, image, v);
    T* const to = gradient + image * out.batch_stride + v * out.voxel_stride;
    if (code < 0) {
      for (int64_t c = 0; c < classes; ++c) to[c * out.channel_stride] = static_cast<T>(A(0));
      continue;
    }
    Exponentials<A> exponentials;
    // A softmax couples the classes, through the mean of dL/dp under p and the sum of dL/d(-log p).
    A mean = 0, pull = 0;
    if (soft_activation || soft_entropy) {
      for (int64_t c = 0; c < classes; ++c) exponentials.add(load_logit<T>(view, image, c, v), c == 0);
      for (int64_t c = 0; c < classes; ++c) {
        const Voxel<A> voxel(view, load_logit<T>(view, image, c, v), exponentials, image, c, v, code);
        const VoxelSlopes<A> slope(view, voxel, exponentials, at(row_intersection, c), at(row_prediction, c),
                                   at(row_cross_entropy, c));
        mean += voxel.p * slope.prediction;
        pull += slope.surprise + at(row_rest, c);
      }
    }
    for (int64_t c = 0; c < classes; ++c) {
      const Voxel<A> voxel(view, load_logit<T>(view, image, c, v), exponentials, image, c, v, code);
      const A entropy = at(row_cross_entropy, c), rest = at(row_rest, c);
      const VoxelSlopes<A> slope(view, voxel, exponentials, at(row_intersection, c), at(row_prediction, c),
                                 entropy);
      A g = slope.prediction;
      if (soft_activation) g = voxel.p * (g - mean);
      if (options.activation == Activation::sigmoid) g *= voxel.p * (A(1) - voxel.p);
      if (soft_entropy) {
        g += exponentials.softmax(voxel.z) * pull - slope.surprise - rest;
      } else if (options.cross_entropy == CrossEntropy::binary) {
        const BinaryLogit<A> b(voxel.z);
        const Focal<A> is(b.surprise, b.p, b.q, gamma), is_not(b.surprise_not, b.q, b.p, gamma);
        g += (A(1) - voxel.y) * rest * is_not.pull * b.p - voxel.y * entropy * is.pull * b.q;
      }
      to[c * out.channel_stride] = static_cast<T>(g);
    }
  }
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
