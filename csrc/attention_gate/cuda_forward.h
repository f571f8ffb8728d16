// Forward of float32: one block takes tiles of 128 voxels. The features of a tile are read once, into shared
// memory; the product, up(phi), the map and the gated features come out of there.
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
__global__ void __launch_bounds__(gate_threads, 8)
    gate_tiles_forward_kernel(GateInputs<Stored> in, Stored* out, VoxelLayout out_layout, Stored* alpha_out) {
  LUNGKIT_DYNAMIC_SHARED(unsigned char, memory);
  const int channels = in.x_channels(), inner = in.inner();
  const GateForwardShared<Stored> shared(memory, channels, inner);
  const int warp_first = threadIdx.x / 32 * warp_voxels;
  const int voxels = in.voxels(), tiles = (voxels + tile_voxels - 1) / tile_voxels;
  const float b_psi = *in.b_psi;
  load_weights(in, shared.w_x, shared.w_psi);

  for (int tile = blockIdx.x; tile < tiles * in.images(); tile += gridDim.x) {
    const int image = tile / tiles, first = tile % tiles * tile_voxels;
    const int count = min(voxels - first, tile_voxels);
    const Features<const Stored> phi = image_of(in.phi, in.phi_layout, image);
    __syncthreads();
    load_tile(shared.x, image_of(in.x, in.x_layout, image), first, count, channels);
    const int own = threadIdx.x;
    shared.corners[own] = corner_of(in.axes, first + min(own, count - 1));
    __syncthreads();

#pragma unroll 1
    for (int v = warp_first; v < warp_first + warp_voxels; v += 8) {
      float psi[2] = {};
#pragma unroll 1
      for (int i = 0; i < inner; i += 16) {
        float q[4];
        compute_q(in, phi, shared.w_x, shared.x, shared.corners, i, v, q);
#pragma unroll
        for (int j = 0; j < 4; ++j) psi[j % 2] += shared.w_psi[i + lane_row(j)] * q[j];
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) shared.alpha[v + lane_column(j)] = sigmoid(sum_over_rows(psi[j]) + b_psi);
    }
    __syncthreads();
    store_tile(image_of(out, out_layout, image), first, count, channels, [&](int c, int v) {
      return static_cast<Stored>(shared.alpha[v] * static_cast<float>(shared.x[c * tile_stride<Stored> + v]));
    });
    if (own < count) {
      alpha_out[int64_t{image} * voxels + first + own] = static_cast<Stored>(shared.alpha[own]);
    }
  }
}

}  // namespace lungkit
