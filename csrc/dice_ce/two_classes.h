// Two classes, softmax, class indices: what most segmentations need, in one exponential a voxel. Included by
// kernel_cpu.cpp alone, as vector.h is.
#pragma once

#include "tile.h"

#include "maths.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

// Sums over the voxels of one label. A voxel is wrong where its label is the less probable class; u is the
// probability of the less probable class, so that nothing is lost where the other one is nearly 1. Of the
// cross-entropy log(1 + e), plus |d| where wrong, the logarithms are added as that of a product:
// (1 + e1)(1 + e2) = 1 + q, with q kept apart from the 1 so that small e survive.
template <class A>
struct LabelTerms {
  Vector<A> unlikely = {}, unlikely_wrong = {};  // u; of wrong voxels alone
  Vector<A> favour = {}, against = {};           // |d| of right voxels, of wrong ones
  Vector<A> product = {};                        // q

  void add(const LabelTerms& more) {
    unlikely += more.unlikely;
    unlikely_wrong += more.unlikely_wrong;
    favour += more.favour;
    against += more.against;
    product += more.product * (product + A(1));
  }
};

// The sums of one label over a chunk.
enum LabelSum : int { sum_unlikely, sum_unlikely_wrong, sum_favour, sum_against, sum_log, label_sums };

// Vectors whose steps are interleaved: the sums of voxels are padded to so many.
constexpr int interleaved = 4;
constexpr int groups_in_a_row = 4;  // of additions_in_a_row vectors: the product is below 2^64

template <class A>
class TwoClassSums {
 public:
  // Adds n voxels, a multiple of interleaved * lanes. Without `rest` the sums for row_rest stay behind.
  template <bool squared, bool rest>
  void add(const A* z0, const A* z1, const int32_t* codes, int n) {
    constexpr int group = lanes<A> * additions_in_a_row;
    for (int i = 0; i < n; i += group) {
      add_group<squared, rest>(z0 + i, z1 + i, codes + i, n - i < group ? n - i : group);
      if (++groups_ == groups_in_a_row) move_on();
    }
  }

  void write(const DiceCeOptions& options, double* sums) {
    move_on();
    double total[2][label_sums], right_voxels[2], wrong_voxels[2];
    for (int label = 0; label < 2; ++label) {
      for (int k = 0; k < label_sums; ++k) total[label][k] = of_label_[label][k].total();
      wrong_voxels[label] = count(wrong_[label]);
      right_voxels[label] = count(voxels_[label]) - wrong_voxels[label];
    }
    const bool entropy = options.cross_entropy != CrossEntropy::none;
    for (int c = 0; c < 2; ++c) {
      const double *own = total[c], *other = total[1 - c];
      // u of the right voxels of this label and of the other; voxels where this class is the more probable,
      // and u there
      const double right = own[sum_unlikely] - own[sum_unlikely_wrong];
      const double right_other = other[sum_unlikely] - other[sum_unlikely_wrong];
      const double likely = right_voxels[c] + wrong_voxels[1 - c];
      const double unlikely_there = right + other[sum_unlikely_wrong];
      const auto write_row = [&](Row row, double value) { sums[2 * row + c] = value; };
      write_row(row_intersection, right_voxels[c] - right + own[sum_unlikely_wrong]);
      write_row(row_prediction, options.squared
                                    ? likely - 2 * unlikely_there + square_.total()
                                    : likely - unlikely_there + own[sum_unlikely_wrong] + right_other);
      write_row(row_label, right_voxels[c] + wrong_voxels[c]);
      const double own_entropy = own[sum_against] + own[sum_log];
      write_row(row_cross_entropy, entropy ? own_entropy : 0);
      write_row(row_rest, entropy ? own_entropy + other[sum_favour] + other[sum_log] : 0);
      write_row(row_voxels, right_voxels[0] + wrong_voxels[0] + right_voxels[1] + wrong_voxels[1]);
    }
  }

 private:
  template <bool squared, bool rest>
  void add_group(const A* z0, const A* z1, const int32_t* codes, int n) {
    const Mask<A> number_one = Mask<A>{} + 1;
    const Vector<A> zero = {};
    LabelTerms<A> zeros, ones;
    Vector<A> squares = {};
    for (int first = 0; first < n; first += interleaved * lanes<A>) {
      Vector<A> d[interleaved], e[interleaved], u[interleaved];
      const auto at = [&](int k) { return first + k * lanes<A>; };
      for (int k = 0; k < interleaved; ++k) d[k] = load(z1 + at(k)) - load(z0 + at(k));
      for (int k = 0; k < interleaved; ++k) e[k] = -absolute(d[k]);
      replace_by_exp(e);
      for (int k = 0; k < interleaved; ++k) u[k] = e[k] * reciprocal(e[k] + A(1));
      for (int k = 0; k < interleaved; ++k) {
        const Mask<A> code = load_codes<A>(codes + at(k));
        if constexpr (squared) add_where(code >= 0, squares, u[k] * u[k]);
        const auto add_label = [&](LabelTerms<A>& t, Mask<A> is_label, Mask<A> is_wrong, int label) {
          add_where(is_label, t.unlikely, u[k]);
          add_where(is_label, is_wrong, t.unlikely_wrong, u[k]);
          add_where(is_label, is_wrong, t.against, absolute(d[k]));
          if constexpr (rest) add_where(is_label, t.favour, larger(label ? d[k] : -d[k], zero));
          add_where(is_label, t.product, e[k] * (t.product + A(1)));
          add_where(is_label, voxels_[label], number_one);
          add_where(is_label, is_wrong, wrong_[label], number_one);
        };
        add_label(zeros, code == 0, d[k] >= zero, 0);
        add_label(ones, code == 1, d[k] < zero, 1);
      }
    }
    terms_[0].add(zeros);
    terms_[1].add(ones);
    if constexpr (squared) squares_ += squares;
  }

  void move_on() {
    for (int label = 0; label < 2; ++label) {
      LabelTerms<A>& terms = terms_[label];
      of_label_[label][sum_unlikely].add(terms.unlikely);
      of_label_[label][sum_unlikely_wrong].add(terms.unlikely_wrong);
      of_label_[label][sum_favour].add(terms.favour);
      of_label_[label][sum_against].add(terms.against);
      of_label_[label][sum_log].add(log1p_nonnegative(terms.product));
      terms = {};
    }
    square_.add(squares_);
    squares_ = fill(A(0));
    groups_ = 0;
  }

  static double count(Mask<A> numbers) {
    int64_t total = 0;
    for (int i = 0; i < lanes<A>; ++i) total += numbers[i];
    return static_cast<double>(total);
  }

  LabelTerms<A> terms_[2];
  Vector<A> squares_ = {};
  int groups_ = 0;  // in these two
  WideSum<A> of_label_[2][label_sums], square_;
  Mask<A> voxels_[2] = {}, wrong_[2] = {};
};

// Writes the gradient of the first logit to g0 and of the second to g1; n is a multiple of interleaved *
// lanes. In the usual case, `plain`, it needs no more than the probability of the class that is not the
// label.
template <class A, bool plain>
void write_two_class_gradient(const A* z0, const A* z1, const int32_t* codes, int n,
                              const TwoClassSlopes<A>& slopes, A* g0, A* g1) {
  const Vector<A> zero = {};
  for (int first = 0; first < n; first += interleaved * lanes<A>) {
    Vector<A> d[interleaved], e[interleaved], likely[interleaved];
    const auto at = [&](int k) { return first + k * lanes<A>; };
    for (int k = 0; k < interleaved; ++k) d[k] = load(z1 + at(k)) - load(z0 + at(k));
    for (int k = 0; k < interleaved; ++k) e[k] = -absolute(d[k]);
    replace_by_exp(e);
    for (int k = 0; k < interleaved; ++k) likely[k] = reciprocal(e[k] + A(1));
    for (int k = 0; k < interleaved; ++k) {
      const Mask<A> code = load_codes<A>(codes + at(k)), one = code == 1;
      const Vector<A> unlikely = e[k] * likely[k];
      Vector<A> g;
      if constexpr (plain) {
        const Vector<A> p_other = select(select(one, d[k], -d[k]) < zero, likely[k], unlikely);
        g = likely[k] * unlikely * select(one, zero + slopes.dp[1], zero + slopes.dp[0]) +
            p_other * select(one, zero - slopes.n[1], zero + slopes.n[0]);
      } else {
        g = slopes.gradient(TwoProbabilities<A>(d[k], e[k], likely[k], unlikely), one);
      }
      g = select(code >= 0, g, zero);
      store<A>(g0 + at(k), -g);
      store<A>(g1 + at(k), g);
    }
  }
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
