// Where a position of x's grid reads phi's, along one axis: linear interpolation with align_corners=False, in
// whole numbers, so that every place that asks agrees to the last bit.
#pragma once

#include <cstdint>

#include "../support/host_device.h"

namespace lungkit {

// Position p reads (1 - weight) * coarse[lower] + weight * coarse[lower + 1]; fine >= coarse. Where the
// weight is 0 the second term may not exist.
struct LinearAxis {
  int64_t fine = 1;
  int64_t coarse = 1;

  LUNGKIT_HD int64_t lower(int64_t p) const {
    const int64_t k = position(p) / (2 * fine);
    return k < coarse ? k : coarse - 1;
  }

  template <class T>
  LUNGKIT_HD T weight(int64_t p) const {
    const int64_t at = position(p);
    return at / (2 * fine) < coarse - 1 ? static_cast<T>(at % (2 * fine)) / static_cast<T>(2 * fine) : T(0);
  }

  // The first position whose lower is at least k.
  LUNGKIT_HD int64_t first_reading(int64_t k) const {
    if (k <= 0) return 0;
    if (k >= coarse) return fine;
    return ((2 * k + 1) * fine - coarse + 2 * coarse - 1) / (2 * coarse);
  }

 private:
  // (p + 1/2) * coarse / fine - 1/2, clamped at 0, times 2 * fine.
  LUNGKIT_HD int64_t position(int64_t p) const {
    const int64_t at = (2 * p + 1) * coarse - fine;
    return at > 0 ? at : 0;
  }
};

}  // namespace lungkit
