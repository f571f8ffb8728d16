// Maths on the vectors of simd.h: comparisons and what follows from them, exp, log. support/cuda_maths.h has
// the same names for one number of a CUDA thread, so that a formula can be written once for both. Included by
// kernel_cpu.cpp only, once for each instruction set.
#pragma once

#include "simd.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

template <class T>
using Mask = Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>>;  // of a comparison: each lane 0 or -1

template <class A>
using Number = Vec<A>;
template <class A>
using Truth = Mask<A>;

template <class V, class M>
inline V select(M mask, V yes, V no) {
  return mask ? yes : no;
}

// Adds v to the lanes of sum where mask is set; written so that AVX-512 needs one instruction.
template <class V, class M>
inline void add_where(M mask, V& sum, V v) {
  sum = mask ? sum + v : sum;
}

// The larger one; b where either is NaN.
inline Vec<float> larger(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);  // as _mm512_max_ps, which GCC 12 warns of
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline Vec<double> larger(Vec<double> a, Vec<double> b) {
  return a > b ? a : b;
}

inline Vec<float> absolute(Vec<float> x) {
  return bit_cast<Vec<float>>(bit_cast<Mask<float>>(x) & 0x7fffffff);
}
inline Vec<double> absolute(Vec<double> x) {
  return bit_cast<Vec<double>>(bit_cast<Mask<double>>(x) & 0x7fffffffffffffff);
}

// 1 / x for normal x whose reciprocal is normal, to about one unit in the last place.
inline Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  // One Newton step from 14 bits is cheaper than a division.
  const Vec<float> r = _mm512_maskz_rcp14_ps(0xffff, x);
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}
inline Vec<double> reciprocal(Vec<double> x) {
  return 1.0 / x;
}

// exp(x) for x <= 88, to about one unit in the last place; NaN stays NaN, and 0 is never reached (exp(-87) is
// the least in float). Of n vectors at a time, step by step, so that one need not wait for its own last step.
template <int n>
inline __attribute__((always_inline)) void replace_by_exp(Vec<float> (&x)[n]) {
  // x = k ln 2 + r, |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  Vec<float> shifted[n], p[n];
  for (int i = 0; i < n; ++i) x[i] = larger(broadcast(-87.0f), x[i]);
  for (int i = 0; i < n; ++i) shifted[i] = x[i] * 1.44269504088896341f + 12582912.0f;
  for (int i = 0; i < n; ++i) {
    const Vec<float> k = shifted[i] - 12582912.0f;
    x[i] = (x[i] - k * 0.693359375f) - k * -2.12194440e-4f;
  }
  for (int i = 0; i < n; ++i) p[i] = x[i] * 1.381454058e-3f + 8.368745446e-3f;
  for (const float c : {4.166838899e-2f, 1.666652113e-1f, 4.999999404e-1f, 1.0f, 1.0f}) {
    for (int i = 0; i < n; ++i) p[i] = p[i] * x[i] + c;
  }
  for (int i = 0; i < n; ++i) {
    const Mask<float> scale = (bit_cast<Mask<float>>(shifted[i]) << 23) + 0x3f800000;
    x[i] = p[i] * bit_cast<Vec<float>>(scale);
  }
}

template <int n>
inline __attribute__((always_inline)) void replace_by_exp(Vec<double> (&x)[n]) {
  for (int k = 0; k < n; ++k) {
    Vec<double> v = x[k];
    for (int i = 0; i < lanes<double>; ++i) v[i] = std::exp(v[i]);
    x[k] = v;
  }
}

template <class V>
inline V exp_nonpositive(V x) {
  V one[] = {x};
  replace_by_exp(one);
  return one[0];
}

// log(x) for positive, finite, normal x.
inline Vec<float> log_positive(Vec<float> x) {
  // x = m 2^k with m in [sqrt(1/2), sqrt(2))
  const Mask<float> raw = bit_cast<Mask<float>>(x) - 0x3f3504f3;
  const Vec<float> k = __builtin_convertvector(raw >> 23, Vec<float>);
  const Vec<float> m = bit_cast<Vec<float>>((raw & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const Vec<float> square = m * m;
  Vec<float> p = broadcast(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Vec<float> tail = p * m * square - 0.5f * square + k * -2.12194440e-4f;
  return m + tail + k * 0.693359375f;
}

inline Vec<double> log_positive(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

// log(1 + x) for x >= 0, exact to rounding for small x too: the second term is what 1 + x lost.
template <class V>
inline V log1p_nonnegative(V x) {
  const V sum = 1 + x;
  return log_positive(sum) + (x - (sum - 1)) / sum;
}

template <class V>
inline V sigmoid(V x) {
  const V limit = V{} + 88;
  return 1 / (1 + exp_nonpositive(-x > limit ? limit : -x));
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
