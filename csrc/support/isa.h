// Instruction sets chosen at run time. A kernel file (kernel_cpu.cpp) is compiled once for each of them, with
// LUNGKIT_ISA naming the namespace it fills; each namespace exports one table of function pointers.
//
//   header:          LUNGKIT_DECLARE_KERNELS(MyKernels, my_kernels)
//   kernel_cpu.cpp:  namespace lungkit::LUNGKIT_ISA { const MyKernels my_kernels = {...}; }
//   cpu.cpp:         LUNGKIT_SELECT_KERNELS(my_kernels).run(...)
//
// A kernel file keeps everything but its table in an unnamed namespace and calls no inline function of a
// library that is not certain to be inlined: the linker would keep one copy for all instruction sets, perhaps
// the widest.
#pragma once

#include <array>
#include <string_view>

namespace lungkit {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

inline constexpr std::array<std::string_view, 3> isa_names = {"baseline", "avx2", "avx512"};

Isa best_isa();               // the widest one that this processor and this build have
Isa current_isa();            // the one in use: best_isa() unless set_isa() narrowed it
bool set_isa(Isa requested);  // false, and no change, where the processor or the build lacks it

}  // namespace lungkit

#ifdef LUNGKIT_X86_KERNELS
#define LUNGKIT_DECLARE_KERNELS(Table, name) \
  namespace lungkit::baseline {              \
  extern const Table name;                   \
  }                                          \
  namespace lungkit::avx2 {                  \
  extern const Table name;                   \
  }                                          \
  namespace lungkit::avx512 {                \
  extern const Table name;                   \
  }
#define LUNGKIT_SELECT_KERNELS(name)                                            \
  (::lungkit::current_isa() == ::lungkit::Isa::avx512 ? ::lungkit::avx512::name \
   : ::lungkit::current_isa() == ::lungkit::Isa::avx2 ? ::lungkit::avx2::name   \
                                                      : ::lungkit::baseline::name)
#else
#define LUNGKIT_DECLARE_KERNELS(Table, name) \
  namespace lungkit::baseline {              \
  extern const Table name;                   \
  }
#define LUNGKIT_SELECT_KERNELS(name) (::lungkit::baseline::name)
#endif
