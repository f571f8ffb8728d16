// Forward: one block takes tiles of 128 voxels. The features of a tile are read once, into shared memory; the
// product, up(phi), the map and the gated features come out of there.
#pragma once

#include "cuda_tile.h"

namespace lungkit {

template <class Stored>
struct GateForwardShared {
  __device__ GateForwardShared(unsigned char* memory, int channels, int inner)
      : corners(reinterpret_cast<Corner*>(memory)),
        w_psi(reinterpret_cast<float*>(corners + tile_voxels)),
        alpha(w_psi + padded16(inner)),
        w_x(reinterpret_cast<Stored*>(alpha + tile_voxels)),
        x(w_x + padded16(inner) * weight_stride<Stored>(channels)) {}

  static size_t bytes(int channels, int inner) {
    return tile_voxels * sizeof(Corner) + sizeof(float) * (padded16(inner) + tile_voxels) +
           sizeof(Stored) *
               (padded16(inner) * weight_stride<Stored>(channels) + padded16(channels) * tile_stride<Stored>);
  }

  Corner* corners;
  float* w_psi;
  float* alpha;
  Stored* w_x;
  Stored* x;
};

template <class Stored>
__global__ void __launch_bounds__(gate_threads)
    gate_forward_kernel(GateInputs<Stored> in, Stored* out, VoxelLayout out_layout, Stored* alpha_out) {
  LUNGKIT_DYNAMIC_SHARED(unsigned char, memory);
  const int channels = in.x_channels(), inner = in.inner();
  const GateForwardShared<Stored> shared(memory, channels, inner);
  const int warp_first = threadIdx.x / 32 * warp_voxels;
  const int64_t voxels = in.x_layout.voxels, tiles = (voxels + tile_voxels - 1) / tile_voxels;
  const float b_psi = *in.b_psi;
  load_weights(in, shared.w_x, shared.w_psi);

  for (int64_t tile = blockIdx.x; tile < tiles * in.x_layout.batch; tile += gridDim.x) {
    const int64_t image = tile / tiles, first = tile % tiles * tile_voxels;
    const int count = static_cast<int>(voxels - first < tile_voxels ? voxels - first : tile_voxels);
    const Features<const Stored> phi = image_of(in.phi, in.phi_layout, image);
    __syncthreads();
    load_tile(shared.x, image_of(in.x, in.x_layout, image), first, count, channels);
    const int64_t own = first + min(static_cast<int>(threadIdx.x), count - 1);
    shared.corners[threadIdx.x] = corner_of(in.axes, own);
    __syncthreads();

    float psi[4][2] = {};
    for (int i = 0; i < inner; i += 16) {
      float theta[4][4] = {};
      const int stride = weight_stride<Stored>(channels);
      multiply_add<4, Stored>(theta, {shared.w_x + i * stride, stride, 1},
                              {shared.x + warp_first, tile_stride<Stored>, 1}, 8, padded16(channels));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = i + lane_row(j);
          if (row >= inner) continue;
          const Corner& corner = shared.corners[warp_first + 8 * n + lane_column(j)];
          const float q = theta[n][j] + interpolate(phi, in.axes, row, corner);
          psi[n][j % 2] += shared.w_psi[row] * (q < 0 ? 0.f : q);  // keeps NaN
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float sum = sum_over_rows(psi[n][j]);
        if (threadIdx.x % 32 < 4) shared.alpha[warp_first + 8 * n + lane_column(j)] = sigmoid(sum + b_psi);
      }
    }
    __syncthreads();
    store_tile(image_of(out, out_layout, image), first, count, channels, [&](int c, int v) {
      return static_cast<Stored>(shared.alpha[v] * static_cast<float>(shared.x[c * tile_stride<Stored> + v]));
    });
    if (threadIdx.x < count) {
      alpha_out[image * voxels + first + threadIdx.x] = static_cast<Stored>(shared.alpha[threadIdx.x]);
    }
  }
}

}  // namespace lungkit
