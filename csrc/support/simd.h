// Vectors of the instruction set that this file is compiled for, written with the vector extensions of GCC
// and Clang. Included by kernel_cpu.cpp only, once for each instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace lungkit::LUNGKIT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int vector_registers = 32;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
constexpr int vector_registers = 16;
#else
constexpr int vector_bytes = 16;
constexpr int vector_registers = 16;
#endif

template <class T, int bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class T>
using Vec = typename VectorOf<T, vector_bytes>::type;
template <class T>
constexpr int lanes = vector_bytes / sizeof(T);

// Half types travel as their bits: a class of a library might bring functions that are shared between
// instruction sets.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

// What is computed with for each stored type.
template <class Stored>
using Real = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

using Bits16 = VectorOf<uint16_t, lanes<float> * 2>::type;
using Bits32 = Vec<uint32_t>;

// GCC takes three instructions for these conversions where the processor has one.
inline Bits32 widen(Bits16 bits) {
#if defined(__AVX512F__)
  return bit_cast<Bits32>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  return bit_cast<Bits32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, Bits32);
#endif
}
inline Bits16 narrow(Bits32 bits) {
#if defined(__AVX512F__)
  return bit_cast<Bits16>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(bits)));
#else
  return __builtin_convertvector(bits, Bits16);
#endif
}

// How a vector of each stored type lies in memory, and the way from there and back.
template <class Stored>
struct Format {
  using Packed = Vec<Stored>;
  static Vec<Stored> unpack(Packed v) { return v; }
  static Packed pack(Vec<Stored> v) { return v; }
};

template <>
struct Format<BFloat16> {
  using Packed = Bits16;

  static Vec<float> unpack(Packed bits) { return bit_cast<Vec<float>>(widen(bits) << 16); }

  // To the nearest, ties to even; NaN keeps its sign and becomes quiet.
  static Packed pack(Vec<float> v) {
    const Bits32 bits = bit_cast<Bits32>(v);
    const Bits32 rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return narrow((v != v ? bits | 0x400000 : rounded) >> 16);
  }
};

template <>
struct Format<Float16> {
  using Packed = Bits16;

#if defined(__AVX512F__)
  static Vec<float> unpack(Packed bits) { return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)); }
  static Packed pack(Vec<float> v) {
    return bit_cast<Packed>(_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  static Vec<float> unpack(Packed bits) { return _mm256_cvtph_ps(bit_cast<__m128i>(bits)); }
  static Packed pack(Vec<float> v) { return bit_cast<Packed>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#else
  static Vec<float> unpack(Packed bits) {
    const Bits32 half = widen(bits);
    const Bits32 magnitude = (half & 0x7fff) << 13;
    // The exponents' biases differ by 112: one multiplication moves them, subnormal numbers included.
    const Bits32 finite = bit_cast<Bits32>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
    const Bits32 value = (half & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000) : finite;
    return bit_cast<Vec<float>>(value | (half & 0x8000) << 16);
  }
  static Packed pack(Vec<float> v) {
    const Bits32 bits = bit_cast<Bits32>(v);
    const Bits32 sign = (bits >> 16) & 0x8000;
    const Bits32 magnitude = bits & 0x7fffffff;
    // Adding a number of the right exponent lets the float adder round what becomes a subnormal half.
    const Bits32 subnormal = bit_cast<Bits32>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;
    const Bits32 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const Bits32 finite = magnitude < 0x38800000 ? subnormal : normal;
    const Bits32 special = magnitude > 0x7f800000 ? Bits32{} + 0x7e00 : Bits32{} + 0x7c00;
    return narrow(sign | (magnitude >= 0x47800000 ? special : finite));
  }
#endif
};

template <class Stored>
Vec<Real<Stored>> load(const Stored* from) {
  typename Format<Stored>::Packed packed;
  std::memcpy(&packed, from, sizeof packed);
  return Format<Stored>::unpack(packed);
}

template <class Stored>
void store(Stored* to, Vec<Real<Stored>> v) {
  const auto packed = Format<Stored>::pack(v);
  std::memcpy(to, &packed, sizeof packed);
}

// Past the caches: for memory that is written once and read much later. `to` lies on a boundary of 64 bytes
// or a whole number of vectors after one. The thread calls fence() before others may read.
template <class Stored>
void stream(Stored* to, Vec<Real<Stored>> v) {
  const auto packed = Format<Stored>::pack(v);
#if defined(__AVX512F__)
  if constexpr (sizeof packed == 64)
    return _mm512_stream_ps(reinterpret_cast<float*>(to), bit_cast<__m512>(packed));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof packed == 32)
    return _mm256_stream_ps(reinterpret_cast<float*>(to), bit_cast<__m256>(packed));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof packed == 16)
    return _mm_stream_ps(reinterpret_cast<float*>(to), bit_cast<__m128>(packed));
#endif
  std::memcpy(to, &packed, sizeof packed);
}

inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class Stored>
Vec<Real<Stored>> load_first(const Stored* from, int64_t count) {
  Stored padded[lanes<Real<Stored>>] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
}

template <class Stored>
void store_first(Stored* to, Vec<Real<Stored>> v, int64_t count) {
  Stored padded[lanes<Real<Stored>>];
  store(padded, v);
  for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

// Lane l of the result is a[l] where bit `step` of l is 0, else b[l ^ step].
template <int step, class T, int... l>
Vec<T> low_halves(Vec<T> a, Vec<T> b, std::integer_sequence<int, l...>) {
  constexpr int n = lanes<T>;
#ifdef __clang__
  return __builtin_shufflevector(a, b, ((l & step) ? n + (l ^ step) : l)...);
#else
  using Index = Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>>;
  return __builtin_shuffle(a, b, Index{((l & step) ? n + (l ^ step) : l)...});
#endif
}

// Lane l of the result is a[l ^ step] where bit `step` of l is 0, else b[l].
template <int step, class T, int... l>
Vec<T> high_halves(Vec<T> a, Vec<T> b, std::integer_sequence<int, l...>) {
  constexpr int n = lanes<T>;
#ifdef __clang__
  return __builtin_shufflevector(a, b, ((l & step) ? n + l : (l ^ step))...);
#else
  using Index = Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>>;
  return __builtin_shuffle(a, b, Index{((l & step) ? n + l : (l ^ step))...});
#endif
}

// Transposes a square of `lanes` rows in place: a butterfly that exchanges one bit of the row index for the
// same bit of the lane index at a time.
template <class T, int step = 1>
void transpose(Vec<T> (&rows)[lanes<T>]) {
  if constexpr (step < lanes<T>) {
    constexpr auto indices = std::make_integer_sequence<int, lanes<T>>{};
#pragma GCC unroll 16
    for (int r = 0; r < lanes<T>; ++r) {
      if (r & step) continue;
      const Vec<T> a = rows[r], b = rows[r + step];
      rows[r] = low_halves<step, T>(a, b, indices);
      rows[r + step] = high_halves<step, T>(a, b, indices);
    }
    transpose<T, 2 * step>(rows);
  }
}

// Lane l of the result is the sum of the lanes of rows[l]; overwrites rows.
template <class T, int step = 1>
Vec<T> sum_of_rows(Vec<T> (&rows)[lanes<T>]) {
  if constexpr (step < lanes<T>) {
    constexpr auto indices = std::make_integer_sequence<int, lanes<T>>{};
#pragma GCC unroll 16
    for (int r = 0; r < lanes<T>; r += 2 * step) {
      rows[r] = low_halves<step, T>(rows[r], rows[r + step], indices) +
                high_halves<step, T>(rows[r], rows[r + step], indices);
    }
    return sum_of_rows<T, 2 * step>(rows);
  } else {
    return rows[0];
  }
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
