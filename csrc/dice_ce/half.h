// fp16 and bf16 to float and back, many at a time. Included by kernel_cpu.cpp alone, as vector.h is.
#pragma once

#include "vector.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

inline float from_bfloat16(uint16_t x) {
  return bits<float>(static_cast<uint32_t>(x) << 16);
}

// To nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline float from_half(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
  // Scaling by 2^112 moves the exponent's bias from fp16's to fp32's and makes subnormals normal.
  const float scaled = bits<float>(magnitude) * 0x1p112f;
  const float value = magnitude >= 0x0f800000 ? bits<float>(magnitude | 0x7f800000) : scaled;  // inf, NaN
  return bits<float>(bits<uint32_t>(value) | sign);
}

inline uint16_t to_half(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t magnitude = u & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  // Below 2^-14 fp16 is subnormal: adding 0.5 leaves the rounded 10-bit fraction in the low bits.
  const uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;  // NaN, or too large: inf
  return sign | static_cast<uint16_t>(magnitude >= 0x477ff000 ? large : finite);
}

inline void from_bfloat16_array(const uint16_t* from, int n, float* to) {
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] = from_bfloat16(from[i]);
}

inline void to_bfloat16_array(const float* from, int n, uint16_t* to) {
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] = to_bfloat16(from[i]);
}

inline void from_half_array(const uint16_t* from, int n, float* to) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(h));
  }
#endif
  for (; i < n; ++i) to[i] = from_half(from[i]);
}

inline void to_half_array(const float* from, int n, uint16_t* to) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), h);
  }
#endif
  for (; i < n; ++i) to[i] = to_half(from[i]);
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
