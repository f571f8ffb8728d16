// exp and reciprocal of the CUDA kernels for few classes: the hardware's approximations, at 2 to 4
// instructions where the library functions take 3 to 10, with errors that are known.
//
// Errors are relative; u = 2^-24 is half a unit in the last place. The PTX manual promises ex2.approx.ftz
// within 2 ulp of the rounded result (5 u of the exact one), rcp.approx.ftz within 1 (3 u).
//   exp       t = x log2 e, rounded; r = x - t ln 2 by one fused operation, which undoes the rounding of t
//   and
//             the error of log2 e; e = 2^t (1 + r), rounded. Left out are r^2 / 2 < 2^-33 and what the
//             constant ln 2 is off by, 2.8e-9: at most 6 u + 2.8e-9 |x|. Below -87.3 the result may be 0.
//   softmax   of two classes, e = exp(-d), d = |z1 - z0|:
//             likely 1 / (1 + e): e counts for e / (1 + e) <= 1/2 of it, 3 u; then 1 + e is rounded, u, and
//             its reciprocal is off by 3 u: at most 7 u = 4.2e-7, and 4 u where the voxel is decided;
//             unlikely e times that: 6 u / (1 + e) + u + 3 u + u: at most 11 u + 2.8e-9 d = 6.6e-7 + 2.8e-9
//             d. Of C classes: (15 + C) u + 2.8e-9 d for all but the largest.
//   surprise  log(1 + e): 6 u at most from e. 32 factors 1 + e are multiplied before one logarithm, which the
//             library takes; each adds u.
// A Dice term 1 - R moves by R (error of I + error of P), sums of p weighted by p: by 8 u in decided voxels,
// more where R and so the effect is small. The cross-entropy keeps its relative digits. With every error at
// its bound and in one direction tests/ops/test_dice_ce_approximations.py finds the loss within 1e-6, from
// networks that know nothing to such that miss 1 % of the voxels. A loss that is itself below 1e-3 has, as
// from any fp32 probabilities, an absolute error instead, of 5e-7.
#pragma once

#include "../support/host_device.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

#ifdef LUNGKIT_EMULATE

using lungkit_emulator::ex2_approx_ftz;
using lungkit_emulator::rcp_approx_ftz;

__device__ inline float larger_or_nan(float a, float b) {
  return a > b || a != a ? a : b;
}

#else

__device__ __forceinline__ float ex2_approx_ftz(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rcp_approx_ftz(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger one; NaN where either is.
__device__ __forceinline__ float larger_or_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}

#endif

// exp(x) of x <= 0. The bound keeps infinite x from making r NaN.
__device__ __forceinline__ float fast_exp_nonpositive(float x) {
  const float bounded = larger_or_nan(x, -100.0f), t = bounded * 1.44269504f;
  const float r = fmaf(t, -0.693147182f, bounded), e = ex2_approx_ftz(t);
  return fmaf(e, r, e);
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
