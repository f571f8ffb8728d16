// Any number of classes, activation and kind of label. A tile holds every class of some voxels; each step
// below is a loop over classes of a loop over voxels. Included by kernel_cpu.cpp alone, as simd_maths.h is.
#pragma once

#include "tile.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

// Elements of one of the tile's (classes, voxels) arrays, where classes are many.
constexpr int64_t tile_elements = 24576;

// Rows of the tile's arrays are longer than its voxels, so that the classes of a voxel fall into different
// cache sets.
constexpr int row_padding = 16;

// Voxels of a tile: fewer where classes are many, so that the tile stays in the second-level cache.
inline int tile_voxels(int64_t classes) {
  const int64_t fitting = tile_elements / classes / 16 * 16;
  return static_cast<int>(fitting > most_tile_voxels ? most_tile_voxels : fitting < 16 ? 16 : fitting);
}

// Three arrays of the tile, and room for slopes of the statistics.
inline size_t scratch_elements(int64_t classes) {
  return static_cast<size_t>(classes * (3 * (tile_voxels(classes) + row_padding) + statistic_rows));
}

// y is 0 or 1: no product, so that an infinite v counts only where it should.
template <class A>
struct IndexLabel {
  Mask<A> is;

  Vec<A> times(Vec<A> v) const { return select(is, v, Vec<A>{}); }
  Vec<A> rest_times(Vec<A> v) const { return select(is, Vec<A>{}, v); }
  void add(Vec<A>& sum, Vec<A> v) const { add_where(is, sum, v); }
  Vec<A> value() const { return broadcast(A(1)); }  // where it is added
};

template <class A>
struct VectorLabel {
  Vec<A> y;
  Mask<A> counts;

  Vec<A> times(Vec<A> v) const { return y * v; }
  Vec<A> rest_times(Vec<A> v) const { return (A(1) - y) * v; }
  void add(Vec<A>& sum, Vec<A> v) const { add_where(counts, sum, Vec<A>(y * v)); }
  Vec<A> value() const { return y; }
};

template <class A, bool indices>
class Tile {
 public:
  explicit Tile(const DiceCeChunk& chunk)
      : chunk_(chunk),
        options_(chunk.options),
        squared_(options_.squared),
        minimum_(options_.minimum),
        gamma_(static_cast<A>(options_.gamma)) {
    stride_ = tile_voxels(chunk.classes) + row_padding;
    z_ = static_cast<A*>(chunk.scratch);
    e_ = z_ + chunk.classes * stride_;
    y_ = e_ + chunk.classes * stride_;
  }

  // Reads n voxels; false where a class index is out of range.
  bool read(int64_t first, int n) {
    voxels_ = n;
    padded_ = (n + lanes<A> - 1) / lanes<A> * lanes<A>;
    const bool valid = load_codes(chunk_, first, n, padded_, codes_);
    for (int64_t c = 0; c < chunk_.classes; ++c) {
      load_logits(chunk_, c, first, n, padded_, z_ + c * stride_);
      if constexpr (!indices) {
        A* y = y_ + c * stride_;
        const int64_t offset = c * chunk_.labels_channel_stride + first * chunk_.labels_voxel_stride;
        load_elements(chunk_.labels, chunk_.labels_type, offset, chunk_.labels_voxel_stride, n, y);
        for (int i = n; i < padded_; ++i) y[i] = A(0);
      }
    }
    activate();
    return valid;
  }

  void add_sums(double* sums) const {
    int voxels = 0;
    for (int i = 0; i < voxels_; ++i) voxels += codes_[i] != left_out;
    for (int64_t c = 0; c < chunk_.classes; ++c) sums[row_voxels * chunk_.classes + c] += voxels;
    switch (options_.cross_entropy) {
      case CrossEntropy::softmax: return add_sums_with<CrossEntropy::softmax>(sums);
      case CrossEntropy::binary: return add_sums_with<CrossEntropy::binary>(sums);
      case CrossEntropy::none: return add_sums_with<CrossEntropy::none>(sums);
    }
  }

  // Leaves the gradient of the logits where the logits were; `slopes` is (statistic_rows, classes).
  void differentiate(const A* slopes) {
    switch (options_.activation) {
      case Activation::softmax: return differentiate_with<Activation::softmax>(slopes);
      case Activation::sigmoid: return differentiate_with<Activation::sigmoid>(slopes);
      case Activation::none: return differentiate_with<Activation::none>(slopes);
    }
  }

  const A* gradient(int64_t c) const { return z_ + c * stride_; }

  A* unused_scratch() const { return y_ + chunk_.classes * stride_; }

 private:
  // Fills e_ and scale_ so that p = e scale, 0 for a voxel that does not count, and lse_ = log sum exp z.
  void activate() {
    const bool soft_act = options_.activation == Activation::softmax;
    for (int i = 0; i < padded_; i += lanes<A>) store<A>(scale_ + i, counted(i, broadcast(A(1))));
    if (soft_act || options_.cross_entropy == CrossEntropy::softmax) add_exponentials();
    if (soft_act) return;
    for (int64_t c = 0; c < chunk_.classes; ++c) {
      for (int i = 0; i < padded_; i += lanes<A>) {
        const Vec<A> z = load(z_ + c * stride_ + i);
        const Vec<A> p = options_.activation == Activation::sigmoid ? BinaryLogit<A>(z).p : z;
        store<A>(e_ + c * stride_ + i, counted(i, p));
      }
    }
  }

  void add_exponentials() {
    const bool keep = options_.activation == Activation::softmax;
    for (int i = 0; i < padded_; i += lanes<A>) {
      Vec<A> largest = load(z_ + i);
      for (int64_t c = 1; c < chunk_.classes; ++c) largest = larger(load(z_ + c * stride_ + i), largest);
      Vec<A> sum = {};
      for (int64_t c = 0; c < chunk_.classes; ++c) {
        const Vec<A> e = exp_nonpositive(load(z_ + c * stride_ + i) - largest);
        if (keep) store<A>(e_ + c * stride_ + i, counted(i, e));
        sum += e;
      }
      store<A>(lse_ + i, largest + log_positive(sum));
      if (keep) store<A>(scale_ + i, counted(i, A(1) / sum));
    }
  }

  template <CrossEntropy entropy>
  void add_sums_with(double* sums) const {
    for (int64_t c = 0; c < chunk_.classes; ++c) {
      WideSum<A> wide[class_rows];
      constexpr int step = additions_in_a_row * lanes<A>;
      for (int first = 0; first < padded_; first += step) {
        Vec<A> sum[class_rows] = {};
        const int last = first + step < padded_ ? first + step : padded_;
        for (int i = first; i < last; i += lanes<A>) voxels_at(c, i).add_to(sum, entropy, is_counted(i));
        for (int row = 0; row < class_rows; ++row) wide[row].add(sum[row]);
      }
      for (int row = 0; row < class_rows; ++row) sums[row * chunk_.classes + c] += wide[row].total();
    }
  }

  template <Activation activation>
  void differentiate_with(const A* slopes) {
    switch (options_.cross_entropy) {
      case CrossEntropy::softmax: return differentiate_with<activation, CrossEntropy::softmax>(slopes);
      case CrossEntropy::binary: return differentiate_with<activation, CrossEntropy::binary>(slopes);
      case CrossEntropy::none: return differentiate_with<activation, CrossEntropy::none>(slopes);
    }
  }

  template <Activation activation, CrossEntropy entropy>
  void differentiate_with(const A* slopes) {
    constexpr bool soft_act = activation == Activation::softmax,
                   soft_entropy = entropy == CrossEntropy::softmax;
    const int64_t classes = chunk_.classes;
    for (int i = 0; i < padded_; i += lanes<A>) {
      Vec<A> mean = {}, pull = {};
      for (int64_t c = 0; c < classes && (soft_act || soft_entropy); ++c) {
        const auto slope = [&](Row row) { return broadcast(slopes[row * classes + c]); };
        const auto voxels = voxels_at(c, i);
        if constexpr (soft_act) {
          mean += voxels.p * voxels.slope_of_prediction(slope(row_intersection), slope(row_prediction));
        }
        if constexpr (soft_entropy) {
          pull += voxels.slope_of_surprise(slope(row_cross_entropy), slope(row_rest));
        }
      }
      for (int64_t c = 0; c < classes; ++c) {
        const auto slope = [&](Row row) { return broadcast(slopes[row * classes + c]); };
        const auto voxels = voxels_at(c, i);
        Vec<A> soft = voxels.p;
        if constexpr (soft_entropy && !soft_act) soft = exp_nonpositive(voxels.z - voxels.lse);
        const Vec<A> g = voxels.gradient(activation, entropy, slope, mean, pull, soft);
        store<A>(z_ + c * stride_ + i, counted(i, g));
      }
    }
  }

  auto voxels_at(int64_t c, int i) const {
    using Label = std::conditional_t<indices, IndexLabel<A>, VectorLabel<A>>;
    const int64_t at = c * stride_ + i;
    const Vec<A> z = load(z_ + at), p = load(e_ + at) * load(scale_ + i), lse = load(lse_ + i);
    return ClassOfVoxel<A, Label>{squared_, minimum_, gamma_, z, p, lse, label_at(c, i)};
  }

  auto label_at(int64_t c, int i) const {
    if constexpr (indices) {
      const auto code = chunk_.classes == 1 ? 1 : c;  // one channel is the probability of class 1
      return IndexLabel<A>{codes_at<A>(codes_ + i) == static_cast<int32_t>(code)};
    } else {
      return VectorLabel<A>{load(y_ + c * stride_ + i), is_counted(i)};
    }
  }

  Mask<A> is_counted(int i) const { return codes_at<A>(codes_ + i) >= 0; }

  Vec<A> counted(int i, Vec<A> v) const { return select(is_counted(i), v, Vec<A>{}); }

  const DiceCeChunk& chunk_;
  const DiceCeOptions& options_;
  const bool squared_, minimum_;
  const A gamma_;
  A *z_, *e_, *y_;  // (classes, stride_): logits, exponentials or predictions, label vectors
  int64_t stride_;
  int voxels_ = 0, padded_ = 0;
  alignas(64) int32_t codes_[most_tile_voxels];
  alignas(64) A scale_[most_tile_voxels], lse_[most_tile_voxels];
};

template <class A, bool indices>
bool any_class_sums(const DiceCeChunk& chunk, double* sums) {
  Tile<A, indices> tile(chunk);
  const int width = tile_voxels(chunk.classes);
  bool valid = true;
  for (int64_t i = 0; i < statistic_rows * chunk.classes; ++i) sums[i] = 0;
  for (int64_t first = 0; first < chunk.voxels; first += width) {
    valid &= tile.read(first, static_cast<int>(chunk.voxels - first < width ? chunk.voxels - first : width));
    tile.add_sums(sums);
  }
  return valid;
}

template <class A, bool indices>
void any_class_gradient(const DiceCeChunk& chunk, const double* slopes, void* gradient,
                        int64_t channel_stride, int64_t voxel_stride) {
  Tile<A, indices> tile(chunk);
  const int width = tile_voxels(chunk.classes);
  A* const narrow_slopes = tile.unused_scratch();
  for (int64_t i = 0; i < statistic_rows * chunk.classes; ++i) narrow_slopes[i] = static_cast<A>(slopes[i]);
  for (int64_t first = 0; first < chunk.voxels; first += width) {
    const int n = static_cast<int>(chunk.voxels - first < width ? chunk.voxels - first : width);
    tile.read(first, n);
    tile.differentiate(narrow_slopes);
    for (int64_t c = 0; c < chunk.classes; ++c) {
      store_elements(tile.gradient(c), n, gradient, chunk.logits_type,
                     c * channel_stride + first * voxel_stride, voxel_stride);
    }
  }
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
