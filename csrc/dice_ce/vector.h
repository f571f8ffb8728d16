// Vectors of the instruction set this file is compiled for, and exp and log on them. Included by
// kernel_cpu.cpp alone, inside its unnamed namespace (support/isa.h says why).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../support/isa.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class A>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(A));

template <class A>
using IntOf = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(vector_bytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;  // of numbers
template <class A>
using Mask = typename VectorOf<IntOf<A>>::type;  // comparison of two Vector<A>: each lane 0 or -1

template <class A>
using Number = Vector<A>;  // maths.h
template <class A>
using Truth = Mask<A>;

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class A>
inline Vector<A> load(const A* from) {
  Vector<A> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class A>
inline void store(A* to, Vector<A> v) {
  std::memcpy(to, &v, sizeof v);
}

template <class A>
inline Vector<A> fill(A value) {
  return Vector<A>{} + value;
}

// Codes are 32-bit for every A; a lane of the mask is as wide as A.
template <class A>
inline Mask<A> load_codes(const int32_t* codes) {
  typedef int32_t Narrow __attribute__((vector_size(lanes<A> * 4)));
  Narrow narrow;
  std::memcpy(&narrow, codes, sizeof narrow);
  return __builtin_convertvector(narrow, Mask<A>);
}

template <class V, class M>
inline V select(M mask, V yes, V no) {
  return mask ? yes : no;
}

// Adds v to the lanes of sum where mask is set; written so that AVX-512 needs one instruction.
template <class V, class M>
inline void add_where(M mask, V& sum, V v) {
  sum = mask ? sum + v : sum;
}

// Adds v where both masks are set.
template <class V, class M>
inline void add_where(M first, M second, V& sum, V v) {
  sum = first ? (second ? sum + v : sum) : sum;
}

// The larger one; b where either is NaN.
inline Vector<float> larger(Vector<float> a, Vector<float> b) {
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
inline Vector<double> larger(Vector<double> a, Vector<double> b) {
  return a > b ? a : b;
}

inline Vector<float> absolute(Vector<float> x) {
  return bits<Vector<float>>(bits<Mask<float>>(x) & 0x7fffffff);
}
inline Vector<double> absolute(Vector<double> x) {
  return bits<Vector<double>>(bits<Mask<double>>(x) & 0x7fffffffffffffff);
}

// 1 / x for normal x whose reciprocal is normal, to about one unit in the last place.
inline Vector<float> reciprocal(Vector<float> x) {
#if defined(__AVX512F__)
  const Vector<float> r =
      _mm512_maskz_rcp14_ps(0xffff, x);  // one Newton step from 14 bits is cheaper than a division
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}
inline Vector<double> reciprocal(Vector<double> x) {
  return 1.0 / x;
}

// exp(x) for x <= 0, to about one unit in the last place; NaN stays NaN, and 0 is never reached (exp(-87) is
// the least in float). Of n vectors at a time, step by step, so that one need not wait for its own last step.
template <int n>
inline void replace_by_exp(Vector<float> (&x)[n]) {
  // x = k ln 2 + r, |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  Vector<float> shifted[n], p[n];
  for (int i = 0; i < n; ++i) x[i] = larger(fill(-87.0f), x[i]);
  for (int i = 0; i < n; ++i) shifted[i] = x[i] * 1.44269504088896341f + 12582912.0f;
  for (int i = 0; i < n; ++i) {
    const Vector<float> k = shifted[i] - 12582912.0f;
    x[i] = (x[i] - k * 0.693359375f) - k * -2.12194440e-4f;
  }
  for (int i = 0; i < n; ++i) p[i] = x[i] * 1.381454058e-3f + 8.368745446e-3f;
  for (const float c : {4.166838899e-2f, 1.666652113e-1f, 4.999999404e-1f, 1.0f, 1.0f}) {
    for (int i = 0; i < n; ++i) p[i] = p[i] * x[i] + c;
  }
  for (int i = 0; i < n; ++i) {
    const Mask<float> scale = (bits<Mask<float>>(shifted[i]) << 23) + 0x3f800000;
    x[i] = p[i] * bits<Vector<float>>(scale);
  }
}

template <int n>
inline void replace_by_exp(Vector<double> (&x)[n]) {
  for (int k = 0; k < n; ++k) {
    Vector<double> v = x[k];
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
inline Vector<float> log_positive(Vector<float> x) {
  // x = m 2^k with m in [sqrt(1/2), sqrt(2))
  const Mask<float> raw = bits<Mask<float>>(x) - 0x3f3504f3;
  const Vector<float> k = __builtin_convertvector(raw >> 23, Vector<float>);
  const Vector<float> m = bits<Vector<float>>((raw & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const Vector<float> square = m * m;
  Vector<float> p = fill(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Vector<float> tail = p * m * square - 0.5f * square + k * -2.12194440e-4f;
  return m + tail + k * 0.693359375f;
}

inline Vector<double> log_positive(Vector<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

// log(1 + x) for x >= 0, exact to rounding for small x too: the second term is what 1 + x lost.
template <class V>
inline V log1p_nonnegative(V x) {
  const V sum = 1 + x;
  return log_positive(sum) + (x - (sum - 1)) / sum;
}

// How many vectors are added in A before the sum moves on to a WideSum: more would lose digits.
constexpr int additions_in_a_row = 16;

// A sum carried in double, lane by lane. Narrower lanes are added in two halves.
template <class A>
struct WideSum {
  static constexpr int parts = sizeof(double) / sizeof(A);
  Vector<double> value[parts] = {};

  void add(Vector<A> v) {
    typedef A Part __attribute__((vector_size(lanes<double> * sizeof(A))));
    Part part[parts];
    std::memcpy(part, &v, sizeof v);
    for (int i = 0; i < parts; ++i) value[i] += __builtin_convertvector(part[i], Vector<double>);
  }
  double total() const {
    double sum = 0;
    for (const Vector<double>& part : value) {
      for (int i = 0; i < lanes<double>; ++i) sum += part[i];
    }
    return sum;
  }
};

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
