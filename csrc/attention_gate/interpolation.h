// Where a position of x's grid reads phi's, along one axis: linear interpolation with align_corners=False, in
// whole numbers, so that every place that asks agrees to the last bit.
#pragma once

#include <cstdint>

#include "../support/host_device.h"

namespace lungkit {

// Position p reads (1 - weight) * coarse[lower] + weight * coarse[lower + 1]; fine >= coarse. Where the
// weight is 0 the second term may not exist. `Index` holds 2 * fine * coarse.
template <class Index>
struct LinearAxis {
  Index fine = 1;
  Index coarse = 1;

  LUNGKIT_HD Index lower(Index p) const {
    const Index k = position(p) / (2 * fine);
    return k < coarse ? k : coarse - 1;
  }

  template <class T>
  LUNGKIT_HD T weight(Index p) const {
    const Index at = position(p);
    return at / (2 * fine) < coarse - 1 ? static_cast<T>(at % (2 * fine)) / static_cast<T>(2 * fine) : T(0);
  }

  // The first position whose lower is at least k.
  LUNGKIT_HD Index first_reading(Index k) const {
    if (k <= 0) return 0;
    if (k >= coarse) return fine;
    return ((2 * k + 1) * fine + coarse - 1) / (2 * coarse);
  }

 private:
  // (p + 1/2) * coarse / fine - 1/2, clamped at 0, times 2 * fine.
  LUNGKIT_HD Index position(Index p) const {
    const Index at = (2 * p + 1) * coarse - fine;
    return at > 0 ? at : 0;
  }
};

}  // namespace lungkit
