// Any number of classes, activation and kind of label. A tile holds every class of some voxels; each step
// below is a loop over classes of a loop over voxels. Included by kernel_cpu.cpp alone, as vector.h is.
#pragma once

#include "tile.h"

#include "maths.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

constexpr int most_tile_voxels = 512;
constexpr int64_t tile_elements =
    24576;  // of one of the tile's (classes, voxels) arrays, where classes are many

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

template <class A, bool indices>
class Tile {
 public:
  Tile(const DiceCeChunk& chunk)
      : chunk_(chunk), options_(chunk.options), gamma_(static_cast<A>(options_.gamma)) {
    stride_ = tile_voxels(chunk.classes) + row_padding;
    z_ = static_cast<A*>(chunk.scratch);
    e_ = z_ + chunk.classes * stride_;
    y_ = e_ + chunk.classes * stride_;
  }

  // Reads n voxels; false where a class index is out of range.
  bool read(int64_t first, int n) {
    first_ = first;
    voxels_ = n;
    padded_ = (n + lanes<A> - 1) / lanes<A> * lanes<A>;
    const bool valid = load_codes(chunk_, first, n, padded_, codes_);
    for (int64_t c = 0; c < chunk_.classes; ++c) load_logits(chunk_, c, first, n, padded_, z_ + c * stride_);
    if constexpr (!indices) {
      for (int64_t c = 0; c < chunk_.classes; ++c) {
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
    for (int i = 0; i < padded_; i += lanes<A>) store<A>(scale_ + i, counted(i, fill(A(1))));
    if (soft_act || options_.cross_entropy == CrossEntropy::softmax) add_exponentials();
    if (soft_act) return;
    for (int64_t c = 0; c < chunk_.classes; ++c) {
      for (int i = 0; i < padded_; i += lanes<A>) {
        const Vector<A> z = load(z_ + c * stride_ + i);
        const Vector<A> p = options_.activation == Activation::sigmoid ? BinaryLogit<A>(z).p : z;
        store<A>(e_ + c * stride_ + i, counted(i, p));
      }
    }
  }

  void add_exponentials() {
    const bool keep = options_.activation == Activation::softmax;
    for (int i = 0; i < padded_; i += lanes<A>) {
      Vector<A> largest = load(z_ + i);
      for (int64_t c = 1; c < chunk_.classes; ++c) largest = larger(load(z_ + c * stride_ + i), largest);
      Vector<A> sum = {};
      for (int64_t c = 0; c < chunk_.classes; ++c) {
        const Vector<A> e = exp_nonpositive(load(z_ + c * stride_ + i) - largest);
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
      WideSum<A> wide[row_voxels];
      constexpr int step = additions_in_a_row * lanes<A>;
      for (int first = 0; first < padded_; first += step) {
        Vector<A> sum[row_voxels] = {};
        const int last = first + step < padded_ ? first + step : padded_;
        for (int i = first; i < last; i += lanes<A>) add_vector<entropy>(c, i, sum);
        for (int row = 0; row < row_voxels; ++row) wide[row].add(sum[row]);
      }
      for (int row = 0; row < row_voxels; ++row) sums[row * chunk_.classes + c] += wide[row].total();
    }
  }

  template <CrossEntropy entropy>
  void add_vector(int64_t c, int i, Vector<A> (&sum)[row_voxels]) const {
    const Vector<A> p = prediction(c, i), z = load(z_ + c * stride_ + i);
    add_labelled(c, i, sum[row_intersection], p);
    sum[row_prediction] += options_.squared ? p * p : p;
    add_labelled(c, i, sum[row_label],
                 options_.squared && !indices ? load(y_ + c * stride_ + i) : fill(A(1)));
    if constexpr (entropy == CrossEntropy::softmax) {
      const Vector<A> surprise = load(lse_ + i) - z;
      add_labelled(c, i, sum[row_cross_entropy], focal(surprise).value);
      add_where(is_counted(i), sum[row_rest], surprise);
    } else if constexpr (entropy == CrossEntropy::binary) {
      const BinaryLogit<A> b(z);
      add_labelled(c, i, sum[row_cross_entropy], Focal<A>(b.surprise, b.p, b.q, gamma_).value);
      const Focal<A> is_not(b.surprise_not, b.q, b.p, gamma_);
      add_where(is_counted(i), sum[row_rest], not_labelled(c, i, is_not.value));
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
    const auto slope = [&](Row row, int64_t c) { return fill(slopes[row * classes + c]); };
    for (int i = 0; i < padded_; i += lanes<A>) {
      // A softmax couples the classes of a voxel, through the mean of dL/dp under p and the sum of dL/d(-log
      // p).
      Vector<A> mean = {}, pull = {};
      for (int64_t c = 0; c < classes && (soft_act || soft_entropy); ++c) {
        if constexpr (soft_act) {
          const Vector<A> p = prediction(c, i);
          mean += p * slope_of_p(c, i, p, slope(row_intersection, c), slope(row_prediction, c));
        }
        if constexpr (soft_entropy) {
          pull += slope_of_surprise(c, i, slope(row_cross_entropy, c), slope(row_rest, c));
        }
      }
      for (int64_t c = 0; c < classes; ++c) {
        const Vector<A> p = prediction(c, i);
        Vector<A> g = slope_of_p(c, i, p, slope(row_intersection, c), slope(row_prediction, c));
        if constexpr (soft_act) g = p * (g - mean);
        if constexpr (activation == Activation::sigmoid) g *= p * (A(1) - p);
        const Vector<A> label = slope(row_cross_entropy, c), rest = slope(row_rest, c);
        if constexpr (soft_entropy) {
          const Vector<A> q = soft_act ? p : exp_nonpositive(load(z_ + c * stride_ + i) - load(lse_ + i));
          g += q * pull - slope_of_surprise(c, i, label, rest);
        } else if constexpr (entropy == CrossEntropy::binary) {
          const BinaryLogit<A> b(load(z_ + c * stride_ + i));
          const Focal<A> is(b.surprise, b.p, b.q, gamma_), is_not(b.surprise_not, b.q, b.p, gamma_);
          g += not_labelled(c, i, rest * is_not.pull * b.p) - labelled(c, i, label * is.pull * b.q);
        }
        store<A>(z_ + c * stride_ + i, counted(i, g));
      }
    }
  }

  Focal<A> focal(Vector<A> surprise) const {
    const Vector<A> p = gamma_ == A(0) ? surprise : exp_nonpositive(-surprise);
    return Focal<A>(surprise, p, A(1) - p, gamma_);
  }

  Vector<A> prediction(int64_t c, int i) const { return load(e_ + c * stride_ + i) * load(scale_ + i); }

  // dL/dp
  Vector<A> slope_of_p(int64_t c, int i, Vector<A> p, Vector<A> overlap, Vector<A> total) const {
    return labelled(c, i, overlap) + (options_.squared ? A(2) * p * total : total);
  }

  // dL/d(-log p)
  Vector<A> slope_of_surprise(int64_t c, int i, Vector<A> entropy, Vector<A> rest) const {
    if (gamma_ != A(0)) entropy *= focal(load(lse_ + i) - load(z_ + c * stride_ + i)).pull;
    return labelled(c, i, entropy) + rest;
  }

  Mask<A> is_counted(int i) const { return ::lungkit::LUNGKIT_ISA::load_codes<A>(codes_ + i) >= 0; }

  Mask<A> is_class(int64_t c, int i) const {
    const IntOf<A> code = static_cast<IntOf<A>>(chunk_.classes == 1 ? 1 : c);
    return ::lungkit::LUNGKIT_ISA::load_codes<A>(codes_ + i) == code;
  }

  Vector<A> counted(int i, Vector<A> v) const {
    const Vector<A> zero = {};
    return select(is_counted(i), v, zero);
  }

  // y v, without a product where y is 0 or 1, so that an infinite v counts only where it should.
  Vector<A> labelled(int64_t c, int i, Vector<A> v) const {
    if constexpr (indices) {
      const Vector<A> zero = {};
      return select(is_class(c, i), v, zero);
    } else {
      return load(y_ + c * stride_ + i) * v;
    }
  }

  void add_labelled(int64_t c, int i, Vector<A>& sum, Vector<A> v) const {
    if constexpr (indices) {
      add_where(is_class(c, i), sum, v);
    } else {
      add_where(is_counted(i), sum, labelled(c, i, v));
    }
  }

  // (1 - y) v
  Vector<A> not_labelled(int64_t c, int i, Vector<A> v) const {
    if constexpr (indices) {
      const Vector<A> zero = {};
      return select(is_class(c, i), zero, v);
    } else {
      return (A(1) - load(y_ + c * stride_ + i)) * v;
    }
  }

  const DiceCeChunk& chunk_;
  const DiceCeOptions& options_;
  A gamma_;
  A *z_, *e_, *y_;  // (classes, stride_): logits, exponentials or predictions, label vectors
  int64_t stride_;
  int64_t first_ = 0;
  int voxels_ = 0, padded_ = 0;
  alignas(64) int32_t codes_[most_tile_voxels];
  alignas(64) A scale_[most_tile_voxels], lse_[most_tile_voxels];
};

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
