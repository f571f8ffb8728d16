// The names of support/simd_maths.h for one number of a CUDA thread. exp and log are the accurate library
// functions, never the fast approximations.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

template <class A>
using Number = A;
template <class A>
using Truth = bool;

template <class A>
__device__ __forceinline__ A select(bool condition, A yes, A no) {
  return condition ? yes : no;
}
template <class A>
__device__ __forceinline__ void add_where(bool condition, A& sum, A v) {
  sum = condition ? sum + v : sum;
}
template <class A>
__device__ __forceinline__ A larger(A a, A b) {
  return a > b ? a : b;
}

__device__ __forceinline__ float absolute(float x) {
  return fabsf(x);
}
__device__ __forceinline__ double absolute(double x) {
  return fabs(x);
}
__device__ __forceinline__ float reciprocal(float x) {
  return __fdividef(1.0f, x);
}
__device__ __forceinline__ double reciprocal(double x) {
  return 1.0 / x;
}
__device__ __forceinline__ float exp_nonpositive(float x) {
  return expf(x);
}
__device__ __forceinline__ double exp_nonpositive(double x) {
  return exp(x);
}
__device__ __forceinline__ float log_positive(float x) {
  return logf(x);
}
__device__ __forceinline__ double log_positive(double x) {
  return log(x);
}
__device__ __forceinline__ float log1p_nonnegative(float x) {
  return log1pf(x);
}
__device__ __forceinline__ double log1p_nonnegative(double x) {
  return log1p(x);
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
