// Two classes, softmax, class indices: what most segmentations need, in one exponential a voxel. Included by
// kernel_cpu.cpp alone, as simd_maths.h is.
#pragma once

#include "tile.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

inline bool is_two_classes(const DiceCeChunk& chunk) {
  return chunk.classes == 2 && chunk.class_indices && chunk.options.activation == Activation::softmax &&
         chunk.options.cross_entropy != CrossEntropy::binary && chunk.options.gamma == 0;
}

constexpr int two_class_voxels = 256;  // of a tile
// Vectors whose steps are interleaved: the voxels of a tile are padded to so many.
constexpr int interleaved = 4;
constexpr int groups_in_a_row = 4;  // of additions_in_a_row vectors: the product is below 2^64

template <class A>
struct TwoClassTile {
  alignas(64) int32_t codes[two_class_voxels];
  alignas(64) A buffer[2][two_class_voxels];
  const A* z[2];
  int voxels, padded;
  bool valid, in_place;

  // Logits already of type A are read where they lie, but for the last tile of a chunk, which may need
  // padding.
  TwoClassTile(const DiceCeChunk& chunk, int64_t first) {
    constexpr int step = interleaved * lanes<A>;
    const int64_t left = chunk.voxels - first;
    voxels = static_cast<int>(left < two_class_voxels ? left : two_class_voxels);
    padded = (voxels + step - 1) / step * step;
    valid = load_codes(chunk, first, voxels, padded, codes);
    in_place =
        chunk.logits_type == (sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float) && voxels == padded;
    for (int c = 0; c < 2; ++c) {
      const bool as_it_lies = in_place && chunk.logits_voxel_stride == 1;
      z[c] = as_it_lies ? static_cast<const A*>(chunk.logits) + c * chunk.logits_channel_stride + first
                        : buffer[c];
      if (!as_it_lies) load_logits(chunk, c, first, voxels, padded, buffer[c]);
    }
  }

  // Calls body(p, code, k) for the four vectors k from voxel `first` on.
  template <class Body>
  void for_vectors(int first, const Body& body) const {
    Vec<A> d[interleaved], e[interleaved], likely[interleaved];
    const auto at = [&](int k) { return first + k * lanes<A>; };
    for (int k = 0; k < interleaved; ++k) d[k] = load(z[1] + at(k)) - load(z[0] + at(k));
    for (int k = 0; k < interleaved; ++k) e[k] = -absolute(d[k]);
    replace_by_exp(e);
    for (int k = 0; k < interleaved; ++k) likely[k] = reciprocal(e[k] + A(1));
    for (int k = 0; k < interleaved; ++k) {
      body(TwoProbabilities<A>(d[k], e[k], likely[k]), codes_at<A>(codes + at(k)), at(k));
    }
  }
};

template <class A, bool squared, bool rest>
class TwoClassSums {
 public:
  void add(const TwoClassTile<A>& tile) {
    constexpr int group = lanes<A> * additions_in_a_row;
    const Mask<A> number_one = Mask<A>{} + 1;
    for (int begin = 0; begin < tile.padded; begin += group) {
      LabelTerms<A, squared, rest> zeros, ones;
      const int end = begin + group < tile.padded ? begin + group : tile.padded;
      for (int i = begin; i < end; i += interleaved * lanes<A>) {
        tile.for_vectors(i, [&](const TwoProbabilities<A>& p, Mask<A> code, int) {
          zeros.template add<0>(code == 0, p);
          ones.template add<1>(code == 1, p);
          add_where(code == 0, voxels_[0], number_one);
          add_where(code == 1, voxels_[1], number_one);
        });
      }
      terms_[0].add(zeros);
      terms_[1].add(ones);
      if (++groups_ == groups_in_a_row) move_on();
    }
  }

  void write(const DiceCeOptions& options, double* sums) {
    move_on();
    LabelTotals totals[2];
    for (int c = 0; c < 2; ++c) {
      const auto& w = wide_[c];
      int64_t voxels = 0;
      for (int i = 0; i < lanes<A>; ++i) voxels += voxels_[c][i];
      totals[c] = {w[0].total(),
                   w[1].total(),
                   w[2].total(),
                   w[3].total(),
                   w[4].total(),
                   w[5].total(),
                   static_cast<double>(voxels)};
    }
    for (int row = 0; row < class_rows; ++row) {
      const bool left = options.cross_entropy == CrossEntropy::none && row >= row_cross_entropy;
      for (int c = 0; c < 2; ++c) {
        sums[2 * row + c] = left ? 0 : LabelTotals::row(row, totals[c], totals[1 - c], squared);
      }
    }
    sums[2 * row_voxels] = sums[2 * row_voxels + 1] = totals[0].voxels + totals[1].voxels;
  }

 private:
  void move_on() {
    for (int label = 0; label < 2; ++label) {
      terms_[label].move([&](int k, Vec<A> sum) { wide_[label][k].add(sum); });
    }
    groups_ = 0;
  }

  LabelTerms<A, squared, rest> terms_[2];
  int groups_ = 0;  // in these
  WideSum<A> wide_[2][label_sums];
  Mask<A> voxels_[2] = {};
};

template <class A, bool squared, bool rest>
bool two_class_sums(const DiceCeChunk& chunk, double* sums) {
  TwoClassSums<A, squared, rest> total;
  bool valid = true;
  for (int64_t first = 0; first < chunk.voxels; first += two_class_voxels) {
    const TwoClassTile<A> tile(chunk, first);
    valid &= tile.valid;
    total.add(tile);
  }
  total.write(chunk.options, sums);
  return valid;
}

template <class A>
bool two_class_sums(const DiceCeChunk& chunk, double* sums) {
  const bool rest = chunk.options.needs_rest;
  const auto run = chunk.options.squared
                       ? rest ? two_class_sums<A, true, true> : two_class_sums<A, true, false>
                   : rest ? two_class_sums<A, false, true>
                          : two_class_sums<A, false, false>;
  return run(chunk, sums);
}

template <class A>
void two_class_gradient(const DiceCeChunk& chunk, const double* slopes, void* gradient,
                        int64_t channel_stride, int64_t voxel_stride) {
  const auto slope = [&](Row row, int c) { return static_cast<A>(slopes[2 * row + c]); };
  const TwoClassSlopes<A> two(slope, chunk.options.squared,
                              chunk.options.cross_entropy != CrossEntropy::none);
  for (int64_t first = 0; first < chunk.voxels; first += two_class_voxels) {
    TwoClassTile<A> tile(chunk, first);
    const bool in_place = tile.in_place && voxel_stride == 1;
    A* to[2];
    for (int c = 0; c < 2; ++c) {
      to[c] = in_place ? static_cast<A*>(gradient) + c * channel_stride + first : tile.buffer[c];
    }
    const auto write = [&](const auto& of_voxels) {
      for (int i = 0; i < tile.padded; i += interleaved * lanes<A>) {
        tile.for_vectors(i, [&](const TwoProbabilities<A>& p, Mask<A> code, int at) {
          const Vec<A> zero = {}, g = select(code >= 0, of_voxels(p, code == 1), zero);
          store(to[0] + at, Vec<A>(-g));
          store(to[1] + at, g);
        });
      }
    };
    if (two.is_plain()) {
      write([&](const auto& p, Mask<A> is_one) { return two.plain_gradient(p, is_one); });
    } else {
      write([&](const auto& p, Mask<A> is_one) { return two.gradient(p, is_one); });
    }
    for (int c = 0; c < 2 && !in_place; ++c) {
      store_elements(to[c], tile.voxels, gradient, chunk.logits_type,
                     c * channel_stride + first * voxel_stride, voxel_stride);
    }
  }
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
