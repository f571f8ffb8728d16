// LUNGKIT_HD marks the maths that the CPU loop and the CUDA kernel share.
#pragma once

#if defined(__CUDACC__)
#define LUNGKIT_HD __host__ __device__ __forceinline__
#else
#define LUNGKIT_HD inline __attribute__((always_inline))
#endif
