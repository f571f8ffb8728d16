// Two classes, softmax, class indices: what most segmentations need, in one exponential a voxel. Included by
// kernel_cpu.cpp alone, as vector.h is.
#pragma once

#include "tile.h"

#include "maths.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

// Sums over the voxels of one label, for a few voxels at a time. Of the cross-entropy log(1 + e), plus |d|
// where the label is the less probable class, the logarithms are added as that of a product: (1 + e1)(1 + e2)
// = 1 + q, with q kept apart from the 1 so that small e survive.
template <class A>
struct LabelTerms {
  Number<A> own = {}, other = {}, own_squared = {},
            other_squared = {};  // p of the label's class, of the other, squares
  Number<A> count = {}, favour = {}, against = {},
            product = {};  // voxels; |d| where the label is more, less probable; q

  // Adds a voxel where `mask`; the margin is +d for label 1 and -d for label 0.
  template <bool squared>
  void add(Truth<A> mask, Number<A> p_own, Number<A> p_other, Number<A> margin, Number<A> e) {
    const Number<A> zero = {};
    add_where(mask, own, p_own);
    add_where(mask, other, p_other);
    if constexpr (squared) {
      add_where(mask, own_squared, p_own * p_own);
      add_where(mask, other_squared, p_other * p_other);
    }
    add_where(mask, count, zero + A(1));
    add_where(mask, favour, larger(margin, zero));
    add_where(mask, against, larger(-margin, zero));
    add_where(mask, product, e * (product + A(1)));
  }
};

// The sums of one label over all its voxels, in the order of the table below.
enum LabelSum : int {
  sum_own,
  sum_other,
  sum_count,
  sum_favour,
  sum_against,
  sum_log,
  label_sums,
  squared_label_sums = 8
};

// Calls move(k, value) for each sum of `terms`, then empties them.
template <class A, bool squared, class Move>
void move_terms(LabelTerms<A>& terms, const Move& move) {
  move(sum_own, terms.own);
  move(sum_other, terms.other);
  move(sum_count, terms.count);
  move(sum_favour, terms.favour);
  move(sum_against, terms.against);
  move(sum_log, log1p_nonnegative(terms.product));
  if constexpr (squared) {
    move(label_sums, terms.own_squared);
    move(label_sums + 1, terms.other_squared);
  }
  terms = {};
}

// Row of the statistics for class c of two, from at(label, k), the sums of both labels; not for row_voxels.
template <class At>
double two_class_sum(int row, int c, bool squared, const At& at) {
  const int other = 1 - c;
  switch (row) {
    case row_intersection: return at(c, sum_own);
    case row_prediction:
      return squared ? at(c, label_sums) + at(other, label_sums + 1) : at(c, sum_own) + at(other, sum_other);
    case row_label: return at(c, sum_count);
    case row_cross_entropy: return at(c, sum_against) + at(c, sum_log);
    default: return at(c, sum_against) + at(c, sum_log) + at(other, sum_favour) + at(other, sum_log);
  }
}

template <class A>
struct TwoClassSums {
  WideSum<A> of_label[2][squared_label_sums];

  // Adds n voxels, a multiple of the lanes.
  template <bool squared>
  void add(const A* z0, const A* z1, const int32_t* codes, int n) {
    constexpr int step = lanes<A> * additions_in_a_row;
    LabelTerms<A> zeros, ones;
    for (int first = 0; first < n; first += step) {
      const int last = first + step < n ? first + step : n;
      for (int i = first; i < last; i += lanes<A>) {
        const TwoProbabilities<A> p(load(z0 + i), load(z1 + i));
        const Mask<A> code = load_codes<A>(codes + i);
        zeros.template add<squared>(code == 0, p.p0, p.p1, -p.difference, p.e);
        ones.template add<squared>(code == 1, p.p1, p.p0, p.difference, p.e);
      }
      move_terms<A, squared>(zeros, [&](int k, Vector<A> v) { of_label[0][k].add(v); });
      move_terms<A, squared>(ones, [&](int k, Vector<A> v) { of_label[1][k].add(v); });
    }
  }

  void write(const DiceCeOptions& options, double* sums) const {
    const auto at = [&](int label, int k) { return of_label[label][k].total(); };
    const bool entropy = options.cross_entropy != CrossEntropy::none;
    for (int c = 0; c < 2; ++c) {
      for (int row = 0; row < row_voxels; ++row) {
        sums[2 * row + c] =
            row < row_cross_entropy || entropy ? two_class_sum(row, c, options.squared, at) : 0;
      }
      sums[2 * row_voxels + c] = at(0, sum_count) + at(1, sum_count);
    }
  }
};

// Writes the gradient of the first logit to g0 and of the second to g1; n is a multiple of the lanes.
template <class A>
void write_two_class_gradient(const A* z0, const A* z1, const int32_t* codes, int n,
                              const TwoClassSlopes<A>& slopes, A* g0, A* g1) {
  const Vector<A> zero = {};
  for (int i = 0; i < n; i += lanes<A>) {
    const TwoProbabilities<A> p(load(z0 + i), load(z1 + i));
    const Mask<A> code = load_codes<A>(codes + i);
    const Vector<A> g = select(code >= 0, slopes.gradient(p, code == 1), zero);
    store<A>(g0 + i, -g);
    store<A>(g1 + i, g);
  }
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
