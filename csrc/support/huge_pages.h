// Fresh memory costs a page fault for every 4 KiB: for the outputs of an op that runs at the speed of memory,
// more than the op itself. With 2 MiB pages there are 512 times fewer.
#pragma once

#include <cstdint>

#include <sys/mman.h>

#include <torch/csrc/stable/tensor.h>

#include "dispatch.h"

namespace lungkit {

// Asks for large pages under a tensor that is about to be written. A hint: where the system has none, or the
// memory is in use already, nothing changes.
inline void prefer_huge_pages(const torch::stable::Tensor& tensor) {
  constexpr uintptr_t huge_page = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const auto end = begin + static_cast<uintptr_t>(tensor.numel() * element_size(tensor.scalar_type()));
  const uintptr_t first = (begin + huge_page - 1) / huge_page * huge_page;
  const uintptr_t last = end / huge_page * huge_page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

}  // namespace lungkit
