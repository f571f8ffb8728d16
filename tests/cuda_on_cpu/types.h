// CUDA's keywords, dim3, and the built-in vector types.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))

// `__shared__ float tile[32];` is one array for the block, as one block runs at a time. Plain builds keep it
// in thread-local storage, which has known bounds: shared_memory.h fills it with 0xFF before every block.
// ASan leaves thread-local variables alone, so under ASan it is an ordinary static with red zones, and is not
// filled.
#if defined(__SANITIZE_ADDRESS__)
#define LUNGKIT_EMULATOR_ASAN 1
#define __shared__ static
#else
#define LUNGKIT_EMULATOR_ASAN 0
#define __shared__ static thread_local
#endif

// T1 .. T4 and make_T1 .. make_T4 with the alignment that CUDA gives them (vectors of 3 have that of one
// element).
#define LUNGKIT_EMULATOR_VECTORS(name, T, align2, align4) \
  struct name##1 {                                        \
    T x;                                                  \
  };                                                      \
  struct alignas(align2) name##2 {                        \
    T x, y;                                               \
  };                                                      \
  struct name##3 {                                        \
    T x, y, z;                                            \
  };                                                      \
  struct alignas(align4) name##4 {                        \
    T x, y, z, w;                                         \
  };                                                      \
  constexpr name##1 make_##name##1(T x) {                 \
    return {x};                                           \
  }                                                       \
  constexpr name##2 make_##name##2(T x, T y) {            \
    return {x, y};                                        \
  }                                                       \
  constexpr name##3 make_##name##3(T x, T y, T z) {       \
    return {x, y, z};                                     \
  }                                                       \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) {  \
    return {x, y, z, w};                                  \
  }

LUNGKIT_EMULATOR_VECTORS(char, signed char, 2, 4)
LUNGKIT_EMULATOR_VECTORS(uchar, unsigned char, 2, 4)
LUNGKIT_EMULATOR_VECTORS(short, short, 4, 8)
LUNGKIT_EMULATOR_VECTORS(ushort, unsigned short, 4, 8)
LUNGKIT_EMULATOR_VECTORS(int, int, 8, 16)
LUNGKIT_EMULATOR_VECTORS(uint, unsigned, 8, 16)
LUNGKIT_EMULATOR_VECTORS(long, long, 16, 16)
LUNGKIT_EMULATOR_VECTORS(ulong, unsigned long, 16, 16)
LUNGKIT_EMULATOR_VECTORS(longlong, long long, 16, 16)
LUNGKIT_EMULATOR_VECTORS(ulonglong, unsigned long long, 16, 16)
LUNGKIT_EMULATOR_VECTORS(float, float, 8, 16)
LUNGKIT_EMULATOR_VECTORS(double, double, 16, 16)

#undef LUNGKIT_EMULATOR_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 size) : x(size.x), y(size.y), z(size.z) {}
};

// Where the running thread stands; the scheduler sets threadIdx whenever it resumes a thread.
inline uint3 threadIdx;
inline uint3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;
inline constexpr int warpSize = 32;
