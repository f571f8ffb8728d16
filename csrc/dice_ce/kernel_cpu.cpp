// The sums of dice_ce and their gradient over one chunk of voxels. Compiled once for each instruction set
// (support/isa.h).
#include "kernel.h"

#include "any_classes.h"
#include "two_classes.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

size_t scratch_bytes(const DiceCeChunk& chunk) {
  if (is_two_classes(chunk)) return 0;
  return scratch_elements(chunk.classes) *
         (chunk.logits_type == ScalarType::Double ? sizeof(double) : sizeof(float));
}

// Calls body with a zero of the type that the chunk is computed in.
template <class Body>
auto with_type(const DiceCeChunk& chunk, const Body& body) {
  return chunk.logits_type == ScalarType::Double ? body(double{}) : body(float{});
}

bool sums(const DiceCeChunk& chunk, double* to) {
  return with_type(chunk, [&](auto zero) {
    using A = decltype(zero);
    const auto run = is_two_classes(chunk) ? two_class_sums<A>
                     : chunk.class_indices ? any_class_sums<A, true>
                                           : any_class_sums<A, false>;
    return run(chunk, to);
  });
}

void gradient(const DiceCeChunk& chunk, const double* slopes, void* to, int64_t channel_stride,
              int64_t voxel_stride) {
  with_type(chunk, [&](auto zero) {
    using A = decltype(zero);
    const auto run = is_two_classes(chunk) ? two_class_gradient<A>
                     : chunk.class_indices ? any_class_gradient<A, true>
                                           : any_class_gradient<A, false>;
    run(chunk, slopes, to, channel_stride, voxel_stride);
  });
}

}  // namespace

const DiceCeKernels dice_ce_kernels = {scratch_bytes, sums, gradient};

}  // namespace lungkit::LUNGKIT_ISA
