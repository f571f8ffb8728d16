// Two classes, softmax, class indices: what most segmentations need, in one exponential a voxel. Included by
// kernel_cpu.cpp alone, as vector.h is.
#pragma once

#include "tile.h"

#include "maths.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

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
