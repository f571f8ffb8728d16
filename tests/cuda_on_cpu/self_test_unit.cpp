// A second translation unit of self_test: it must share the machine of the first, as the `.cu` files of a
// library do.
#include <vector>

#include "cuda_on_cpu.h"

std::vector<unsigned> sequence_of_other_unit() {
  std::vector<unsigned> threads;
  lungkit_emulator::launch("sequence", 1, 4, 0, [&] { threads.push_back(threadIdx.x); });
  return threads;
}
