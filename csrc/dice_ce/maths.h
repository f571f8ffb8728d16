// The maths of a voxel, written once for the CPU, where Number<A> is a vector of A and Truth<A> its mask, and
// for CUDA, where they are A and bool. Include it after vector.h or cuda_scalar.h, which bring Number, Truth,
// select, add_where, larger, absolute, exp_nonpositive and log1p_nonnegative.
#pragma once

#include "../support/host_device.h"
#include "options.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

// ---- two classes under a softmax, from one exponential
// ----------------------------------------------------------

// With d = z1 - z0 and e = exp(-|d|), the probabilities are 1 / (1 + e) and e / (1 + e).
template <class A>
struct TwoProbabilities {
  Number<A> difference;  // d
  Number<A> e;
  Number<A> likely;    // of the more probable class
  Number<A> unlikely;  // of the other
  Number<A> p0, p1;

  LUNGKIT_HD TwoProbabilities(Number<A> z0, Number<A> z1) {
    difference = z1 - z0;
    e = exp_nonpositive(-absolute(difference));
    likely = reciprocal(e + A(1));
    unlikely = e * likely;
    assign();
  }
  LUNGKIT_HD TwoProbabilities(Number<A> difference, Number<A> e, Number<A> likely, Number<A> unlikely)
      : difference(difference), e(e), likely(likely), unlikely(unlikely) {
    assign();
  }

 private:
  LUNGKIT_HD void assign() {
    const Truth<A> one_is_likely = difference >= A(0);
    p1 = select(one_is_likely, likely, unlikely);
    p0 = select(one_is_likely, unlikely, likely);
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

  // g of a voxel that counts.
  LUNGKIT_HD Number<A> gradient(const TwoProbabilities<A>& p, Truth<A> is_one) const {
    const Number<A> zero = {};
    const Number<A> difference =
        select(is_one, zero + dp[1], zero + dp[0]) + p.p1 * square[1] - p.p0 * square[0];
    const Number<A> pull = select(is_one, p.p0 * -n[1], p.p1 * n[0]) + p.p1 * rest - rest1;
    return p.likely * p.unlikely * difference + pull;
  }
};

// ---- any activation and cross-entropy
// ----------------------------------------------------------------------------

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

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
