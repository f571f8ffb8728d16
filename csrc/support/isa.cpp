#include "isa.h"

#include <atomic>

namespace lungkit {

Isa best_isa() {
#ifdef LUNGKIT_X86_KERNELS
  static const Isa best = [] {
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512cd");
    return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
  }();
  return best;
#else
  return Isa::baseline;
#endif
}

namespace {
std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}
}  // namespace

Isa current_isa() {
  return selected().load(std::memory_order_relaxed);
}

bool set_isa(Isa requested) {
  if (requested < Isa::baseline || requested > best_isa()) return false;
  selected().store(requested, std::memory_order_relaxed);
  return true;
}

}  // namespace lungkit

// Reached from Python through ctypes (lungkit/ops/_library.py): lungkit-info shows the instruction set in use
// and the tests run every one that this processor has.
extern "C" {
__attribute__((visibility("default"))) int lungkit_cpu_isa() {
  return static_cast<int>(lungkit::current_isa());
}
__attribute__((visibility("default"))) int lungkit_set_cpu_isa(int isa) {
  return lungkit::set_isa(static_cast<lungkit::Isa>(isa)) ? 1 : 0;
}
}
