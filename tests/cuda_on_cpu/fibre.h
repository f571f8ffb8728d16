// Fibres: stacks of their own that give way to one another. On x86-64 a switch is 14 instructions; elsewhere
// it is swapcontext, which is slower (two system calls) and does the same.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#include "counting.h"
#include "types.h"

#if defined(__x86_64__) && !defined(LUNGKIT_EMULATOR_UCONTEXT)
#define LUNGKIT_EMULATOR_ASSEMBLY 1
#else
#define LUNGKIT_EMULATOR_ASSEMBLY 0
#include <ucontext.h>
#endif

#if LUNGKIT_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace lungkit_emulator {

#if LUNGKIT_EMULATOR_ASSEMBLY
// Saves the registers that a function must preserve, and the stack pointer in *saved; goes on where `next`
// was saved. Whatever a compiler counts or checks would spoil the registers.
[[gnu::naked, gnu::noinline, gnu::noipa, gnu::no_profile_instrument_function,
  gnu::no_sanitize("thread")]] inline void
swap_stacks(void** /*saved: rdi*/, void* /*next: rsi*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}
#endif

class Fibre {
 public:
  using Entry = void (*)();  // never returns

  // The stack that the caller is already on.
  Fibre() = default;

  // A stack of its own, with an inaccessible page below it: a kernel that overruns it is killed, not
  // corrupted. `number` shifts the first frame a little, so that the hot parts of many stacks do not share
  // cache sets.
  Fibre(Entry entry, unsigned number) : entry_(entry) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_bytes_ = stack_bytes + page;
    mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) {
      mapping_ = nullptr;
      throw std::bad_alloc();
    }
    mprotect(mapping_, page, PROT_NONE);
    bottom_ = static_cast<char*>(mapping_) + page;
    bytes_ = stack_bytes;
    leave_out(bottom_, bytes_);
    shift_ = number % 61 * 320;
    reset();
  }

  ~Fibre() {
    if (mapping_) munmap(mapping_, mapped_bytes_);
  }

  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // Forgets whatever ran on this stack; the next switch to it enters it afresh. Destructors do not run.
  void reset() {
    char* const bottom = static_cast<char*>(const_cast<void*>(bottom_));
#if LUNGKIT_EMULATOR_ASAN
    ASAN_UNPOISON_MEMORY_REGION(bottom, bytes_);
    fake_stack_ = nullptr;
#endif
#if LUNGKIT_EMULATOR_ASSEMBLY
    // swap_stacks pops six registers and returns into enter(), which then sees 0 as its own return address.
    void** const top = reinterpret_cast<void**>(bottom + bytes_ - shift_);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(&enter);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    stack_pointer_ = top - 8;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom;
    context_.uc_stack.ss_size = bytes_ - shift_;
    context_.uc_link = nullptr;
    makecontext(&context_, &enter, 0);
#endif
  }

  // Leaves `from`, on which the caller runs, for `to`; returns when somebody switches back.
  static void switch_stack(Fibre& from, Fibre& to) {
    left_ = &from;
    entered_ = &to;
#if LUNGKIT_EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.bytes_);
#endif
#if LUNGKIT_EMULATOR_ASSEMBLY
    swap_stacks(&from.stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
    arrive(from);
  }

 private:
  // Room for the sanitisers, which print their reports on the stack of the thread that they catch.
  static constexpr size_t stack_bytes = LUNGKIT_EMULATOR_ASAN ? 1024 * 1024 : 256 * 1024;

  static void arrive([[maybe_unused]] Fibre& here) {
#if LUNGKIT_EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(here.fake_stack_, &left_->bottom_, &left_->bytes_);
#endif
  }

  static void enter() {
    arrive(*entered_);
    entered_->entry_();
    __builtin_unreachable();
  }

  inline static Fibre* left_ = nullptr;
  inline static Fibre* entered_ = nullptr;

  Entry entry_ = nullptr;
  void* mapping_ = nullptr;
  size_t mapped_bytes_ = 0;
  const void* bottom_ = nullptr;  // ASan tells those of the caller's own stack
  size_t bytes_ = 0;
  size_t shift_ = 0;
#if LUNGKIT_EMULATOR_ASSEMBLY
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#if LUNGKIT_EMULATOR_ASAN
  void* fake_stack_ = nullptr;
#endif
};

}  // namespace lungkit_emulator
