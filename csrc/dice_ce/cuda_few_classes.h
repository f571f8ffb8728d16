// CUDA kernels for two to four classes under a softmax with class indices, the usual case: 16-byte accesses,
// every class of a voxel in registers, one read forward and one read and write backward.
#pragma once

#include "cuda_voxels.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

constexpr int few_threads = 256;
constexpr int most_few_classes = 4;

// Blocks that a multiprocessor should hold, which bounds the registers of a thread.
template <class T, int C>
constexpr int few_blocks = sizeof(T) == 8 ? 1
                           : C == 4       ? 2
                                          : 3;

// Voxels of one 16-byte access, and how many accesses a thread adds up before the sums move on to double.
template <class T>
constexpr int pack_voxels = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int packs_in_a_row = 32 / pack_voxels<T>;

// Width of the sums of a chunk: class_rows for each class, then the voxels. The sums of an image are
// partial[(image * width + k) * chunks + chunk].
LUNGKIT_HD int64_t partial_width(int64_t classes) {
  return class_rows * classes + 1;
}

// Sums of one thread over a few voxels that count. `values` of them move on; `row` makes a row of the
// statistics from their totals. Without `rest` there is no row_rest.
template <class A, int C, bool rest>
struct FewTerms {
  static constexpr int values = class_rows * C;
  A terms[class_rows][C] = {};

  __device__ __forceinline__ void count(int) {}  // the labels are counted one by one

  __device__ __forceinline__ void add(const A (&z)[C], int code) {
    A largest = z[0];
#pragma unroll
    for (int c = 1; c < C; ++c) largest = larger(largest, z[c]);
    A p[C], sum = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) sum += p[c] = exp_nonpositive(z[c] - largest);
    const A scale = reciprocal(sum), lse = largest + log_positive(sum);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      p[c] *= scale;
      terms[row_prediction][c] += p[c];
      if constexpr (rest) terms[row_rest][c] += lse - z[c];
      if (code == c) {
        terms[row_intersection][c] += p[c];
        terms[row_label][c] += A(1);
        terms[row_cross_entropy][c] += lse - z[c];
      }
    }
  }
  template <class Move>
  __device__ __forceinline__ void move(const Move& move) {
#pragma unroll
    for (int k = 0; k < (rest ? values : values - C); ++k) move(k, terms[k / C][k % C]);
    *this = {};
  }
  __device__ static double row(int row, int c, const double* totals) { return totals[row * C + c]; }
};

// Two classes need one exponential.
template <class A, bool rest>
struct FewTerms<A, 2, rest> {
  static constexpr int sums = rest ? 5 : 4;  // that LabelTerms move on
  static constexpr int values = 2 * sums + 2;
  LabelTerms<A, false, rest> zeros, ones;
  int voxels = 0, of_one = 0;

  __device__ __forceinline__ void count(int n) { voxels += n; }

  __device__ __forceinline__ void add(const A (&z)[2], int code) {
    const A difference = z[1] - z[0], e = exp_nonpositive(-absolute(difference));
    const TwoProbabilities<A> p(difference, e, reciprocal(e + A(1)));
    zeros.template add<0>(code == 0, p);
    ones.template add<1>(code == 1, p);
    of_one += code;
  }
  template <class Move>
  __device__ __forceinline__ void move(const Move& move) {
    zeros.move([&](int k, A value) { move(k, value); });
    ones.move([&](int k, A value) { move(sums + k, value); });
    move(2 * sums, static_cast<A>(voxels - of_one));
    move(2 * sums + 1, static_cast<A>(of_one));
    voxels = of_one = 0;
  }
  __device__ static double row(int row, int c, const double* totals) {
    return LabelTotals::row(row, of_label(c, totals), of_label(1 - c, totals), false);
  }

 private:
  __device__ static LabelTotals of_label(int label, const double* totals) {
    const double* t = totals + label * sums;
    return {t[0], t[1], t[2], t[3], rest ? t[sums - 1] : 0.0, 0.0, totals[2 * sums + label]};
  }
};

// Voxels of chunk and channel are a multiple of the pack, and every pack is aligned.
template <class T, int C, bool rest>
__global__ void __launch_bounds__(few_threads, few_blocks<T, C>)
    few_class_sums(View view, accumulate_t<T>* __restrict__ partial) {
  using A = accumulate_t<T>;
  using Terms = FewTerms<A, C, rest>;
  constexpr int voxels = pack_voxels<T>, warps = few_threads / 32;
  __shared__ double of_warp[warps][Terms::values], totals[Terms::values];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t image = view.image(), last = view.last_voxel();
  const int64_t base = image * view.logits_layout.batch_stride;

  Terms terms;
  int lowest_code = 0, packs = 0;
  if (lane < Terms::values) of_warp[warp][lane] = 0;
  __syncwarp();
  const auto move = [&](int k, A value) {
    value = warp_sum(value);
    if (lane == 0) of_warp[warp][k] += static_cast<double>(value);
  };
  for (int64_t first = view.first_voxel() + warp * 32 * voxels; first < last; first += few_threads * voxels) {
    const int64_t v = first + lane * voxels;
    if (v < last) {
      Pack<T, voxels> z[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        z[c] = load_pack<T, voxels>(view.logits, base + c * view.logits_layout.channel_stride + v);
      }
      int codes[voxels], lowest = 0;
      load_codes(view, image, v, codes);
#pragma unroll
      for (int k = 0; k < voxels; ++k) lowest = min(lowest, codes[k]);
      lowest_code = min(lowest_code, lowest);
      const auto add = [&](int k) {
        A of_voxel[C];
#pragma unroll
        for (int c = 0; c < C; ++c) of_voxel[c] = static_cast<A>(z[c].of[k]);
        terms.add(of_voxel, codes[k]);
      };
      if (lowest == 0) {
        terms.count(voxels);
#pragma unroll
        for (int k = 0; k < voxels; ++k) add(k);
      } else {
#pragma unroll
        for (int k = 0; k < voxels; ++k) {
          if (codes[k] < 0) continue;
          terms.count(1);
          add(k);
        }
      }
    }
    if (++packs == packs_in_a_row<T>) {
      terms.move(move);
      packs = 0;
    }
  }
  if (packs > 0) terms.move(move);

  const bool all_valid = __syncthreads_and(lowest_code > invalid);
  if (threadIdx.x < Terms::values) {
    double total = 0;
    for (int w = 0; w < warps; ++w) total += of_warp[w][threadIdx.x];
    totals[threadIdx.x] = total;
  }
  __syncthreads();
  constexpr int width = class_rows * C + 1;
  if (threadIdx.x >= width) return;
  const int row = threadIdx.x / C;
  double total = 0;
  if (row == class_rows) {
    for (int c = 0; c < C; ++c) total += Terms::row(row_label, c, totals);
  } else if (row < row_cross_entropy || view.options.cross_entropy != CrossEntropy::none) {
    total = Terms::row(row, threadIdx.x % C, totals);
  }
  partial[(image * width + threadIdx.x) * view.chunks + blockIdx.x % view.chunks] =
      static_cast<A>(all_valid ? total : NAN);
}

// Gradient of the logits of one voxel from the slopes of its image.
template <class A, int C>
struct FewSlopes {
  A overlap[C], total[C], entropy[C], rest[C], all_rest;

  template <class At>
  __device__ FewSlopes(const At& at, bool has_entropy) {
    all_rest = 0;
    for (int c = 0; c < C; ++c) {
      overlap[c] = at(row_intersection, c);
      total[c] = at(row_prediction, c);
      entropy[c] = has_entropy ? at(row_cross_entropy, c) : A(0);
      rest[c] = has_entropy ? at(row_rest, c) : A(0);
      all_rest += rest[c];
    }
  }
  __device__ __forceinline__ void differentiate(A (&z)[C], int code) const {
    A largest = z[0], sum = 0, mean = 0, pull = all_rest;
#pragma unroll
    for (int c = 1; c < C; ++c) largest = larger(largest, z[c]);
#pragma unroll
    for (int c = 0; c < C; ++c) sum += z[c] = exp_nonpositive(z[c] - largest);
    const A scale = reciprocal(sum);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      z[c] *= scale;
      mean += z[c] * (total[c] + select(code == c, overlap[c], A(0)));
      add_where(code == c, pull, entropy[c]);
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const A dp = total[c] + select(code == c, overlap[c], A(0));
      const A g = z[c] * (dp - mean + pull) - select(code == c, entropy[c], A(0)) - rest[c];
      z[c] = code >= 0 ? g : A(0);
    }
  }
};

template <class A>
struct FewSlopes<A, 2> {
  TwoClassSlopes<A> slopes;

  template <class At>
  __device__ FewSlopes(const At& at, bool has_entropy) : slopes(at, false, has_entropy) {}
  __device__ __forceinline__ void differentiate(A (&z)[2], int code) const {
    const A difference = z[1] - z[0], e = exp_nonpositive(-absolute(difference));
    const A g = slopes.gradient(TwoProbabilities<A>(difference, e, reciprocal(e + A(1))), code == 1);
    z[1] = code >= 0 ? g : A(0);
    z[0] = -z[1];
  }
};

// `gradient` is contiguous (B, C, V).
template <class T, int C>
__global__ void __launch_bounds__(few_threads, few_blocks<T, C>)
    few_class_gradient(View view, const accumulate_t<T>* __restrict__ slopes,
                       const accumulate_t<T>* __restrict__ scale, T* __restrict__ gradient) {
  using A = accumulate_t<T>;
  constexpr int voxels = pack_voxels<T>;
  const int64_t image = view.image(), last = view.last_voxel(), images = view.logits_layout.batch;
  const int64_t base = image * view.logits_layout.batch_stride;
  const A factor = scale == nullptr ? A(1) : *scale;
  const auto at = [&](int row, int c) { return factor * slopes[(row * images + image) * C + c]; };
  const FewSlopes<A, C> of_image(at, view.options.cross_entropy != CrossEntropy::none);
  for (int64_t v = view.first_voxel() + threadIdx.x * voxels; v < last; v += few_threads * voxels) {
    Pack<T, voxels> z[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      z[c] = load_pack<T, voxels>(view.logits, base + c * view.logits_layout.channel_stride + v);
    }
    int codes[voxels];
    load_codes(view, image, v, codes);
#pragma unroll
    for (int k = 0; k < voxels; ++k) {
      A of_voxel[C];
#pragma unroll
      for (int c = 0; c < C; ++c) of_voxel[c] = static_cast<A>(z[c].of[k]);
      of_image.differentiate(of_voxel, codes[k]);
#pragma unroll
      for (int c = 0; c < C; ++c) z[c].of[k] = static_cast<T>(of_voxel[c]);
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      store_pack(gradient + (image * C + c) * view.logits_layout.voxels + v, z[c]);
    }
  }
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
