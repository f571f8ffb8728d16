// Device functions beyond the C library: memory fences, cached loads, atomics, intrinsics and bit operations.
// Only one thread runs at a time, so an atomic is a plain read and write.
#pragma once

#include <math.h>

#include <bit>
#include <concepts>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "machine.h"
#include "types.h"

// Fences: memory is always consistent here, so a missing fence goes unnoticed.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

[[noreturn]] inline void __trap() {
  lungkit_emulator::machine().set_error("called __trap");
  lungkit_emulator::machine().end_block();
}

// Loads and stores with a cache hint
#define LUNGKIT_EMULATOR_LOAD(name) \
  template <class T>                \
  inline T name(const T* address) { \
    return *address;                \
  }
#define LUNGKIT_EMULATOR_STORE(name)                            \
  template <class T>                                            \
  inline void name(T* address, std::type_identity_t<T> value) { \
    *address = value;                                           \
  }
LUNGKIT_EMULATOR_LOAD(__ldg)
LUNGKIT_EMULATOR_LOAD(__ldca)
LUNGKIT_EMULATOR_LOAD(__ldcg)
LUNGKIT_EMULATOR_LOAD(__ldcs)
LUNGKIT_EMULATOR_LOAD(__ldlu)
LUNGKIT_EMULATOR_LOAD(__ldcv)
LUNGKIT_EMULATOR_STORE(__stwb)
LUNGKIT_EMULATOR_STORE(__stcg)
LUNGKIT_EMULATOR_STORE(__stcs)
LUNGKIT_EMULATOR_STORE(__stwt)
#undef LUNGKIT_EMULATOR_LOAD
#undef LUNGKIT_EMULATOR_STORE

// Atomics, for the types that CUDA has them for
namespace lungkit_emulator {

template <class T, class... Allowed>
concept OneOf = (std::same_as<T, Allowed> || ...);

template <class T, class Update>
T exchange_atomically(T* address, const Update& update) {
  const T old = *address;
  *address = update(old);
  return old;
}

// Integer sums wrap around, as they do on the device.
template <class T>
T wrapping_add(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using Unsigned = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
  } else {
    return a + b;
  }
}

}  // namespace lungkit_emulator

template <class T>
  requires lungkit_emulator::OneOf<T, int, unsigned, unsigned long long, float, double>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return lungkit_emulator::exchange_atomically(
      address, [&](T old) { return lungkit_emulator::wrapping_add(old, value); });
}

template <class T>
  requires lungkit_emulator::OneOf<T, int, unsigned>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return lungkit_emulator::exchange_atomically(address, [&](T old) {
    return static_cast<T>(static_cast<unsigned>(old) - static_cast<unsigned>(value));
  });
}

template <class T>
  requires lungkit_emulator::OneOf<T, int, unsigned, long long, unsigned long long>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return lungkit_emulator::exchange_atomically(address, [&](T old) { return old > value ? old : value; });
}

template <class T>
  requires lungkit_emulator::OneOf<T, int, unsigned, long long, unsigned long long>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return lungkit_emulator::exchange_atomically(address, [&](T old) { return old < value ? old : value; });
}

template <class T>
  requires lungkit_emulator::OneOf<T, int, unsigned, unsigned long long>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return lungkit_emulator::exchange_atomically(address, [&](T old) { return old | value; });
}

template <class T>
  requires lungkit_emulator::OneOf<T, int, unsigned, unsigned long long>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return lungkit_emulator::exchange_atomically(address, [&](T old) { return old & value; });
}

template <class T>
  requires lungkit_emulator::OneOf<T, int, unsigned, unsigned long long>
T atomicXor(T* address, std::type_identity_t<T> value) {
  return lungkit_emulator::exchange_atomically(address, [&](T old) { return old ^ value; });
}

template <class T>
  requires lungkit_emulator::OneOf<T, int, unsigned, unsigned long long, float>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return lungkit_emulator::exchange_atomically(address, [&](T) { return value; });
}

template <class T>
  requires lungkit_emulator::OneOf<T, int, unsigned, unsigned short, unsigned long long>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return lungkit_emulator::exchange_atomically(address, [&](T old) { return old == compare ? value : old; });
}

// Minimum and maximum of two numbers; a NaN loses against a number, as in fminf.
template <class A, class B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return ::fmin(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
  }
}

template <class A, class B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return ::fmax(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
  }
}

// Intrinsics: exact here, where the device rounds or approximates more coarsely.
inline float __expf(float x) noexcept {
  return ::expf(x);
}
inline float __exp10f(float x) noexcept {
  return ::powf(10.0f, x);
}
inline float __logf(float x) noexcept {
  return ::logf(x);
}
inline float __log2f(float x) noexcept {
  return ::log2f(x);
}
inline float __log10f(float x) noexcept {
  return ::log10f(x);
}
inline float __powf(float x, float y) noexcept {
  return ::powf(x, y);
}
inline float __fdividef(float a, float b) noexcept {
  return a / b;
}
inline float __fdiv_rn(float a, float b) noexcept {
  return a / b;
}
inline float __fadd_rn(float a, float b) noexcept {
  return a + b;
}
inline float __fsub_rn(float a, float b) noexcept {
  return a - b;
}
inline float __fmul_rn(float a, float b) noexcept {
  return a * b;
}
inline float __fmaf_rn(float a, float b, float c) noexcept {
  return ::fmaf(a, b, c);
}
inline double __dadd_rn(double a, double b) noexcept {
  return a + b;
}
inline double __dmul_rn(double a, double b) noexcept {
  return a * b;
}
inline double __fma_rn(double a, double b, double c) noexcept {
  return ::fma(a, b, c);
}
inline float __frcp_rn(float x) noexcept {
  return 1.0f / x;
}
inline float __fsqrt_rn(float x) noexcept {
  return ::sqrtf(x);
}
inline float __frsqrt_rn(float x) noexcept {
  return 1.0f / ::sqrtf(x);
}
inline float rsqrtf(float x) noexcept {
  return 1.0f / ::sqrtf(x);
}
inline double rsqrt(double x) noexcept {
  return 1.0 / ::sqrt(x);
}
inline float __saturatef(float x) noexcept {
  return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;
}

// Bits
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __popcll(unsigned long long x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(static_cast<unsigned>(x));
}
inline int __clzll(long long x) {
  return std::countl_zero(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline long long __double_as_longlong(double x) {
  return std::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return std::bit_cast<double>(x);
}

// Conversions: __float2int_rz truncates, _rn rounds to nearest even; both saturate, and NaN becomes 0.
namespace lungkit_emulator {
inline int saturate_to_int(float x) {
  if (x != x) return 0;
  if (x >= 2147483648.0f) return std::numeric_limits<int>::max();
  if (x < -2147483648.0f) return std::numeric_limits<int>::min();
  return static_cast<int>(x);
}
}  // namespace lungkit_emulator
inline int __float2int_rz(float x) {
  return lungkit_emulator::saturate_to_int(x);
}
inline int __float2int_rn(float x) {
  return lungkit_emulator::saturate_to_int(::rintf(x));
}
inline int __float2int_rd(float x) {
  return lungkit_emulator::saturate_to_int(::floorf(x));
}
inline int __float2int_ru(float x) {
  return lungkit_emulator::saturate_to_int(::ceilf(x));
}
