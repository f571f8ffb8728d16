// CUDA kernels for two to four classes under a softmax with class indices, the usual case, in fp32 and half
// types: every class of a voxel in registers, one read forward and one read and write backward.
#pragma once

#include "cuda_approximations.h"
#include "cuda_few_voxels.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

// Voxels whose terms a thread adds up in a row before they move on, and how often they may: fp32 carries 32
// and 8 additions.
constexpr int run_voxels = 32;
constexpr int most_runs = 8;

// Blocks that a multiprocessor should hold, which bounds the registers of a thread. Compute capability 7.5
// needs some more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int spared_blocks = 1;
#else
constexpr int spared_blocks = 0;
#endif
template <int C, Access access, bool plain>
constexpr int few_blocks = (C == 2 ? 6 : 8 - C) + (is_packed(access) ? (C == 2) + plain : 0) - spared_blocks;

// Width of the sums of a chunk: class_rows for each class, then the voxels. The sums of an image are
// partial[(image * width + k) * chunks + chunk].
LUNGKIT_HD int partial_width(int64_t classes) {
  return static_cast<int>(class_rows * classes + 1);
}

// What a thread adds up over a run of voxels. rows(add) hands each number on as add(row, class, number);
// row_label is counted elsewhere, and there is no row_rest without `rest`.
template <int C, bool rest>
struct FewTerms {
  float intersection[C] = {}, prediction[C] = {};
  float against[C] = {};  // largest logit minus that of the label
  float others[C] = {};   // the same for every class
  float product[C];       // of the sums of exponentials, by label

  __device__ FewTerms() {
#pragma unroll
    for (int c = 0; c < C; ++c) product[c] = 1;
  }

  // is(c) says whether c is the label, counts whether there is one.
  template <class Is>
  __device__ __forceinline__ void add(const float (&z)[C], const Is& is, bool counts) {
    float largest = z[0], below[C], p[C], sum = 0;
#pragma unroll
    for (int c = 1; c < C; ++c) largest = fmaxf(largest, z[c]);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      below[c] = z[c] - largest;
      sum += p[c] = fast_exp_nonpositive(below[c]);
    }
    const float scale = rcp_approx_ftz(sum);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      p[c] *= scale;
      add_where(counts, prediction[c], p[c]);
      if constexpr (rest) add_where(counts, others[c], -below[c]);
      add_where(is(c), intersection[c], p[c]);
      add_where(is(c), against[c], -below[c]);
      product[c] = is(c) ? product[c] * sum : product[c];
    }
  }

  template <class Add>
  __device__ __forceinline__ void rows(const Add& add) const {
    float log[C], logs = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) logs += log[c] = logf(product[c]);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      add(row_intersection, c, intersection[c]);
      add(row_prediction, c, prediction[c]);
      add(row_cross_entropy, c, against[c] + log[c]);
      if constexpr (rest) add(row_rest, c, others[c] + logs);
    }
  }
};

// Two classes need one exponential, and small ones keep their digits: see LabelTerms.
template <bool rest>
struct FewTerms<2, rest> {
  LabelTerms<float, false, rest> of_label[2];

  template <class Is>
  __device__ __forceinline__ void add(const float (&z)[2], const Is& is, bool) {
    const float difference = z[1] - z[0], e = fast_exp_nonpositive(-fabsf(difference));
    const TwoProbabilities<float> p(difference, e, rcp_approx_ftz(e + 1.0f));
    of_label[0].template add<0>(is(0), p);
    of_label[1].template add<1>(is(1), p);
  }

  template <class Add>
  __device__ __forceinline__ void rows(const Add& add) const {
    float log[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) log[c] = log1pf(of_label[c].product);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const auto &own = of_label[c], &other = of_label[1 - c];
      add(row_intersection, c, own.own);
      add(row_prediction, c, own.own + other.other);
      add(row_cross_entropy, c, own.against + log[c]);
      if constexpr (rest) add(row_rest, c, own.against + log[c] + other.favour + log[1 - c]);
    }
  }
};

// `plain`: as for FewReader, and nobody asks for row_rest.
template <class T, int C, Access access, bool plain>
__global__ void __launch_bounds__(few_threads, few_blocks<C, access, plain>)
    few_class_sums(View view, float* __restrict__ partial) {
  using Reader = FewReader<T, C, access, plain>;
  constexpr bool rest = !plain;
  constexpr int values = (rest ? 5 : 4) * C, warps = few_threads / 32;
  constexpr int groups = run_voxels / Reader::voxels;  // of a run
  __shared__ float of_warp[warps][values];
  const Reader reader(view);

  float sums[values] = {};
  int labels[C] = {};
  unsigned faults = 0;
  for (int v = Reader::first(); v < reader.count;) {
    FewTerms<C, rest> terms;
    for (int group = 0; group < groups && v < reader.count; ++group, v += Reader::step) {
      float z[Reader::voxels][C];
      reader.load(v, z);
      const auto codes = reader.codes(v);
      faults |= codes.faults();
      codes.count(labels);
#pragma unroll
      for (int k = 0; k < Reader::voxels; ++k) {
        terms.add(z[k], [&](int c) { return codes.is(k, c); }, codes.counts(k));
      }
    }
    terms.rows([&](Row row, int c, float value) { sums[row * C + c] += value; });
  }
#pragma unroll
  for (int c = 0; c < C; ++c) sums[row_label * C + c] = static_cast<float>(labels[c]);
#pragma unroll
  for (int k = 0; k < values; ++k) {
    const float sum = warp_sum(sums[k]);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32][k] = sum;
  }
  const bool all_valid = __syncthreads_and(faults == 0);

  constexpr int width = class_rows * C + 1;
  if (threadIdx.x >= width) return;
  const int row = threadIdx.x / C;
  const auto total = [&](int k) {
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += static_cast<double>(of_warp[w][k]);
    return sum;
  };
  double value = 0;
  if (row == class_rows) {
    for (int c = 0; c < C; ++c) value += total(row_label * C + c);
  } else if (row < row_cross_entropy ||
             (row * C < values && view.options.cross_entropy != CrossEntropy::none)) {
    value = total(threadIdx.x);
  }
  partial[(view.image() * width + threadIdx.x) * view.chunks + view.chunk()] =
      all_valid ? static_cast<float>(value) : NAN;
}

// Gradient of the logits of one voxel from the slopes of its image.
template <int C>
struct FewSlopes {
  float overlap[C], total[C], entropy[C], rest[C], all_rest;

  template <class At>
  __device__ FewSlopes(const At& at, bool has_entropy) {
    all_rest = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      overlap[c] = at(row_intersection, c);
      total[c] = at(row_prediction, c);
      entropy[c] = has_entropy ? at(row_cross_entropy, c) : 0.0f;
      rest[c] = has_entropy ? at(row_rest, c) : 0.0f;
      all_rest += rest[c];
    }
  }
  template <class Is>
  __device__ __forceinline__ void differentiate(float (&z)[C], const Is& is, bool counts) const {
    float largest = z[0], sum = 0, mean = 0, pull = all_rest;
#pragma unroll
    for (int c = 1; c < C; ++c) largest = fmaxf(largest, z[c]);
#pragma unroll
    for (int c = 0; c < C; ++c) sum += z[c] = fast_exp_nonpositive(z[c] - largest);
    const float scale = rcp_approx_ftz(sum);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      z[c] *= scale;
      mean += z[c] * (total[c] + select(is(c), overlap[c], 0.0f));
      add_where(is(c), pull, entropy[c]);
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float dp = total[c] + select(is(c), overlap[c], 0.0f);
      const float g = z[c] * (dp - mean + pull) - select(is(c), entropy[c], 0.0f) - rest[c];
      z[c] = counts ? g : 0.0f;
    }
  }
};

template <>
struct FewSlopes<2> {
  TwoClassSlopes<float> slopes;

  template <class At>
  __device__ FewSlopes(const At& at, bool has_entropy) : slopes(at, false, has_entropy) {}
  template <class Is>
  __device__ __forceinline__ void differentiate(float (&z)[2], const Is& is, bool counts) const {
    const float difference = z[1] - z[0], e = fast_exp_nonpositive(-fabsf(difference));
    const float g = slopes.gradient(TwoProbabilities<float>(difference, e, rcp_approx_ftz(e + 1.0f)), is(1));
    z[1] = counts ? g : 0.0f;
    z[0] = -z[1];
  }
};

// `gradient` is laid out as `out` says.
template <class T, int C, Access access, bool plain>
__global__ void __launch_bounds__(few_threads, few_blocks<C, access, plain>)
    few_class_gradient(View view, const float* __restrict__ slopes, const float* __restrict__ scale,
                       VoxelLayout out, T* __restrict__ gradient) {
  using Reader = FewReader<T, C, access, plain>;
  const Reader reader(view);
  const int64_t image = view.image(), images = view.logits_layout.batch;
  const float factor = scale == nullptr ? 1.0f : *scale;
  const auto at = [&](int row, int c) { return factor * slopes[(row * images + image) * C + c]; };
  const FewSlopes<C> of_image(at, view.options.cross_entropy != CrossEntropy::none);
  T* const to = gradient + image * out.batch_stride + view.first_voxel() * out.voxel_stride;
  for (int v = Reader::first(); v < reader.count; v += Reader::step) {
    float z[Reader::voxels][C];
    reader.load(v, z);
    const auto codes = reader.codes(v);
#pragma unroll
    for (int k = 0; k < Reader::voxels; ++k) {
      of_image.differentiate(z[k], [&](int c) { return codes.is(k, c); }, codes.counts(k));
    }
    reader.store(v, z, to, out.channel_stride);
  }
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
