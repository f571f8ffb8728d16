// Work in chunks of a fixed size, so that a sum has the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace lungkit {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Calls body(image, chunk, first_voxel, last_voxel) for every chunk of `chunk_voxels` voxels of every image.
// A body writes only what belongs to its own (image, chunk); partial sums are added up afterwards, in order.
template <class Body>
void for_each_chunk(int64_t images, int64_t voxels, int64_t chunk_voxels, const Body& body) {
  const int64_t chunks = ceil_div(voxels, chunk_voxels);
  torch::stable::parallel_for(0, images * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * chunk_voxels;
      body(i / chunks, i % chunks, first, std::min(voxels, first + chunk_voxels));
    }
  });
}

}  // namespace lungkit
