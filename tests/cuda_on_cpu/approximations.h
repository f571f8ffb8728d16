// The device's approximate functions, as inexact as the PTX manual lets them be: the exact value, rounded and
// then moved up by the promised number of units in the last place. All errors point the same way, so sums of
// many do not cancel.
#pragma once

#include <math.h>

#include <limits>

namespace lungkit_emulator {

// Flushes subnormal numbers to zero, as .ftz does.
inline float flushed(float x) noexcept {
  return fabsf(x) < std::numeric_limits<float>::min() ? copysignf(0.0f, x) : x;
}

inline float moved_up(double exact, int units) noexcept {
  float value = flushed(static_cast<float>(exact));
  if (!isfinite(value) || value == 0.0f) return value;
  for (int i = 0; i < units; ++i) value = nextafterf(value, std::numeric_limits<float>::infinity());
  return value;
}

// ex2.approx.ftz.f32: 2 ulp; 1 at 0
inline float ex2_approx_ftz(float x) noexcept {
  return moved_up(exp2(static_cast<double>(flushed(x))), flushed(x) == 0.0f ? 0 : 2);
}

// rcp.approx.ftz.f32: 1 ulp
inline float rcp_approx_ftz(float x) noexcept {
  return moved_up(1.0 / static_cast<double>(flushed(x)), 1);
}

}  // namespace lungkit_emulator
