// The maths of a voxel, written once for the CPU, where Number<A> is a vector of A and Truth<A> its mask, and
// for CUDA, where they are A and bool. Include it after support/simd_maths.h or support/cuda_maths.h.
#pragma once

#include "../support/host_device.h"
#include "options.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

// ---- two classes under a softmax

// With d = z1 - z0 and e = exp(-|d|), the probabilities are 1 / (1 + e) and e / (1 + e).
template <class A>
struct TwoProbabilities {
  Number<A> difference;  // d
  Number<A> e;
  Number<A> likely;    // of the more probable class
  Number<A> unlikely;  // of the other

  // `likely` is reciprocal(e + 1).
  LUNGKIT_HD TwoProbabilities(Number<A> difference, Number<A> e, Number<A> likely)
      : difference(difference), e(e), likely(likely), unlikely(e * likely) {}

  template <int c>
  LUNGKIT_HD Number<A> of() const {
    return select(difference >= A(0), c == 1 ? likely : unlikely, c == 1 ? unlikely : likely);
  }
};

// Sums over the voxels of one label. The cross-entropy of a voxel is log(1 + e), plus |d| where its label is
// the less probable class. The logarithms are added as that of a product: (1 + e1)(1 + e2) = 1 + q, with q
// kept apart from the 1 so that small e survive.
template <class A, bool squared, bool rest>
struct LabelTerms {
  Number<A> own = {}, other = {};       // p of the label, and p or p^2 of the other class
  Number<A> own_square = {};            // p^2 of the label, if `squared`
  Number<A> against = {}, favour = {};  // |d| where the label is the less probable class; the more, if `rest`
  Number<A> product = {};               // q

  // Adds the voxels whose label it is.
  template <int label>
  LUNGKIT_HD void add(Truth<A> is_label, const TwoProbabilities<A>& p) {
    const Number<A> zero = {}, p_own = p.template of<label>(), p_other = p.template of<1 - label>();
    add_where(is_label, own, p_own);
    add_where(is_label, other, squared ? p_other * p_other : p_other);
    if constexpr (squared) add_where(is_label, own_square, p_own * p_own);
    add_where(is_label, against, larger(label == 1 ? -p.difference : p.difference, zero));
    if constexpr (rest) add_where(is_label, favour, larger(label == 1 ? p.difference : -p.difference, zero));
    add_where(is_label, product, p.e * (product + A(1)));
  }

  LUNGKIT_HD void add(const LabelTerms& more) {
    own += more.own;
    other += more.other;
    if constexpr (squared) own_square += more.own_square;
    against += more.against;
    if constexpr (rest) favour += more.favour;
    product += more.product * (product + A(1));
  }

  // Calls move(k, sum) for every sum that is kept; the k-th is that of LabelTotals.
  template <class Move>
  LUNGKIT_HD void move(const Move& move) {
    move(0, own);
    move(1, other);
    move(2, against);
    move(3, log1p_nonnegative(product));
    if constexpr (rest) move(4, favour);
    if constexpr (squared) move(5, own_square);
    *this = {};
  }
};

constexpr int label_sums = 6;

// What LabelTerms have added up to, and how the rows of the statistics follow.
struct LabelTotals {
  double own, other, against, log, favour, own_square, voxels;

  // Of the class that is the label of `of_own`.
  LUNGKIT_HD static double row(int row, const LabelTotals& of_own, const LabelTotals& of_other,
                               bool squared) {
    switch (row) {
      case row_intersection: return of_own.own;
      case row_prediction: return (squared ? of_own.own_square : of_own.own) + of_other.other;
      case row_label: return of_own.voxels;
      case row_cross_entropy: return of_own.against + of_own.log;
      default: return of_own.against + of_own.log + of_other.favour + of_other.log;
    }
  }
};

// The gradient of the logits of two classes is -g and g, with
//   g = p1 p0 (dp1 - dp0) + n (p1 - y) + p1 (r0 + r1) - r1
// where dp are the slopes of the probabilities, n that of the label's cross-entropy and r those of row_rest.
template <class A>
struct TwoClassSlopes {
  A dp[2];  // by label: what of dp1 - dp0 does not depend on p
  A n[2];
  A square[2];
  A rest, rest1;

  // at(row, c) is the slope of a statistic.
  template <class At>
  LUNGKIT_HD TwoClassSlopes(const At& at, bool squared, bool entropy) {
    const A linear = squared ? A(0) : at(row_prediction, 1) - at(row_prediction, 0);
    dp[0] = linear - at(row_intersection, 0);
    dp[1] = linear + at(row_intersection, 1);
    for (int c = 0; c < 2; ++c) {
      n[c] = entropy ? at(row_cross_entropy, c) : A(0);
      square[c] = squared ? 2 * at(row_prediction, c) : A(0);
    }
    rest = entropy ? at(row_rest, 0) + at(row_rest, 1) : A(0);
    rest1 = entropy ? at(row_rest, 1) : A(0);
  }

  // Whether neither squares nor row_rest take part, so that plain_gradient() applies.
  LUNGKIT_HD bool is_plain() const { return square[0] == 0 && square[1] == 0 && rest == 0 && rest1 == 0; }

  // g of a voxel that counts.
  LUNGKIT_HD Number<A> gradient(const TwoProbabilities<A>& p, Truth<A> is_one) const {
    const Number<A> p0 = p.template of<0>(), p1 = p.template of<1>();
    const Number<A> difference = by_label(is_one, dp[0], dp[1]) + p1 * square[1] - p0 * square[0];
    const Number<A> pull = select(is_one, p0 * -n[1], p1 * n[0]) + p1 * rest - rest1;
    return p.likely * p.unlikely * difference + pull;
  }

  // It needs no more than the probability of the class that is not the label.
  LUNGKIT_HD Number<A> plain_gradient(const TwoProbabilities<A>& p, Truth<A> is_one) const {
    const Number<A> zero = {};
    const Truth<A> is_wrong = select(is_one, p.difference, -p.difference) < zero;
    return p.likely * p.unlikely * by_label(is_one, dp[0], dp[1]) +
           select(is_wrong, p.likely, p.unlikely) * by_label(is_one, n[0], -n[1]);
  }

 private:
  LUNGKIT_HD static Number<A> by_label(Truth<A> is_one, A of_zero, A of_one) {
    const Number<A> zero = {};
    return select(is_one, zero + of_one, zero + of_zero);
  }
};

// ---- any activation and cross-entropy

// (1 - p)^gamma
template <class A>
LUNGKIT_HD Number<A> focal_factor(Number<A> one_minus_p, A gamma) {
  if (gamma == A(2)) return one_minus_p * one_minus_p;
  const Number<A> zero = {}, base = larger(one_minus_p, zero + A(1e-30));
  return exp_nonpositive(log_positive(select(base < A(1), base, zero + A(1))) * gamma);
}

// f = (1 - p)^gamma s of the surprise s = -log p; gamma = 0 is the plain cross-entropy.
template <class A>
struct Focal {
  Number<A> value;  // f
  Number<A> pull;   // -df/dz = pull (1 - p), z being the logit of p

  LUNGKIT_HD Focal(Number<A> surprise, Number<A> p, Number<A> one_minus_p, A gamma) {
    const Number<A> zero = {};
    value = surprise;
    pull = zero + A(1);
    if (gamma == A(0)) return;
    const Number<A> factor = focal_factor(one_minus_p, gamma);
    value = factor * surprise;
    pull = factor * (A(1) + p * surprise * gamma * reciprocal(larger(one_minus_p, zero + A(1e-30))));
  }

  LUNGKIT_HD static Focal of(Number<A> surprise, A gamma) {
    const Number<A> p = gamma == A(0) ? surprise : exp_nonpositive(-surprise);
    return Focal(surprise, p, A(1) - p, gamma);
  }
};

// Both sides of the binary cross-entropy of one logit.
template <class A>
struct BinaryLogit {
  Number<A> p, q;                    // sigmoid(z) and sigmoid(-z)
  Number<A> surprise, surprise_not;  // -log p and -log q

  LUNGKIT_HD explicit BinaryLogit(Number<A> z) {
    const Number<A> zero = {}, e = exp_nonpositive(-absolute(z));
    const Number<A> likely = reciprocal(e + A(1)), unlikely = e * likely, log = log1p_nonnegative(e);
    const Truth<A> positive = z >= A(0);
    p = select(positive, likely, unlikely);
    q = select(positive, unlikely, likely);
    surprise = log + larger(-z, zero);
    surprise_not = log + larger(z, zero);
  }
};

// What one class of one voxel is. A Label y has times(v) = y v, rest_times(v) = (1 - y) v, add(sum, v), which
// adds y v, and value(), which is y where it is added.
template <class A, class Label>
struct ClassOfVoxel {
  bool squared, minimum;  // of DiceCeOptions
  A gamma;
  Number<A> z, p;  // logit and prediction
  Number<A> lse;   // log sum exp of the voxel's logits, beside a softmax cross-entropy
  Label y;

  // Adds its part of the statistics; `counts` says whether the voxel does.
  LUNGKIT_HD void add_to(Number<A> (&sums)[class_rows], CrossEntropy entropy, Truth<A> counts) const {
    if (minimum) {
      add_where(counts, sums[row_intersection], select(p <= y.value(), p, y.value()));
    } else {
      y.add(sums[row_intersection], p);
    }
    sums[row_prediction] += squared ? p * p : p;
    y.add(sums[row_label], squared ? y.value() : Number<A>{} + A(1));
    if (entropy == CrossEntropy::softmax) {
      const Number<A> surprise = lse - z;
      y.add(sums[row_cross_entropy], Focal<A>::of(surprise, gamma).value);
      add_where(counts, sums[row_rest], surprise);
    } else if (entropy == CrossEntropy::binary) {
      const BinaryLogit<A> b(z);
      y.add(sums[row_cross_entropy], Focal<A>(b.surprise, b.p, b.q, gamma).value);
      add_where(counts, sums[row_rest], y.rest_times(Focal<A>(b.surprise_not, b.q, b.p, gamma).value));
    }
  }

  // dL/dp
  LUNGKIT_HD Number<A> slope_of_prediction(Number<A> intersection, Number<A> prediction) const {
    const Number<A> zero = {};
    const Number<A> overlap = minimum ? select(p <= y.value(), intersection, zero) : y.times(intersection);
    return overlap + (squared ? A(2) * p * prediction : prediction);
  }

  // dL/d(-log p) of the softmax cross-entropy
  LUNGKIT_HD Number<A> slope_of_surprise(Number<A> label, Number<A> rest) const {
    return y.times(gamma == A(0) ? label : label * Focal<A>::of(lse - z, gamma).pull) + rest;
  }

  // dL/dz. A softmax couples the classes of a voxel, through the mean of dL/dp under p and the sum `pull` of
  // dL/d(-log p). slope(row) is the slope of a statistic of the class, `soft` its probability in a softmax.
  template <class Slope>
  LUNGKIT_HD Number<A> gradient(Activation activation, CrossEntropy entropy, const Slope& slope,
                                Number<A> mean, Number<A> pull, Number<A> soft) const {
    Number<A> g = slope_of_prediction(slope(row_intersection), slope(row_prediction));
    if (activation == Activation::softmax) g = p * (g - mean);
    if (activation == Activation::sigmoid) g *= p * (A(1) - p);
    if (entropy == CrossEntropy::softmax) {
      g += soft * pull - slope_of_surprise(slope(row_cross_entropy), slope(row_rest));
    } else if (entropy == CrossEntropy::binary) {
      const BinaryLogit<A> b(z);
      const Focal<A> is(b.surprise, b.p, b.q, gamma), is_not(b.surprise_not, b.q, b.p, gamma);
      g += y.rest_times(slope(row_rest) * is_not.pull * b.p) -
           y.times(slope(row_cross_entropy) * is.pull * b.q);
    }
    return g;
  }
};

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
