// Forward of the half types.
#pragma once

#include "cuda_rows_products.h"

namespace lungkit {

// Blocks of a multiprocessor: their registers fit, and so many runs are on their way.
template <int size>
constexpr int rows_forward_blocks = size == 1 ? 4 : 3;

template <class Stored, int size, bool by_voxel>
struct RowsForwardShared {
  using Tile = RunTile<Stored, size, by_voxel>;
  struct Warp {
    alignas(16) Stored x[2][Tile::elements];
    alignas(16) Stored phi[by_voxel ? 8 : PhiRows<Stored, size>::elements];
    alignas(16) float alpha[run_voxels];
  };
  alignas(16) Stored w_x[RowWeights<Stored, size, by_voxel>::elements];
  Warp warp[row_warps];
};

template <class Stored, int size, bool by_voxel>
__global__ void __launch_bounds__(gate_threads, rows_forward_blocks<size>)
    gate_rows_forward_kernel(GateInputs<Stored> in, RowGrid grid, Stored* out, VoxelLayout out_layout,
                             Stored* alpha_out) {
  using Shared = RowsForwardShared<Stored, size, by_voxel>;
  using Tile = typename Shared::Tile;
  using Products = RunProducts<Stored, size, by_voxel>;
  LUNGKIT_DYNAMIC_SHARED(Shared, shared);
  const int lane = threadIdx.x % 32, g = lane / 4, channels = in.x_channels();
  typename Shared::Warp& own = shared->warp[threadIdx.x / 32];
  RowWeights<Stored, size, by_voxel>::load(in, shared->w_x);
  float w_psi[2 * size];
#pragma unroll
  for (int h = 0; h < 2 * size; ++h) {
    const int i = inner_of_row<size, by_voxel>(8 * h + g);
    w_psi[h] = i < in.inner() ? in.w_psi[i] : 0.f;
  }
  const float b_psi = *in.b_psi;
  __syncthreads();

  const int step = gridDim.x * row_warps;
  const auto start = [&](const Run& run, int stage) {
    if (run.valid) {
      load_run<Tile>(own.x[stage], image_of(in.x, in.x_layout, run.image), first_voxel(grid, run), run.count,
                     channels, grid.x_pieces);
    }
    close_copies();
  };
  int index = blockIdx.x * row_warps + threadIdx.x / 32, stage = 0;
  Run run = run_at(grid, index);
  [[maybe_unused]] PhiRows<Stored, size> phi;
  [[maybe_unused]] const bool phi_rows = !by_voxel && grid.fast;
  if (phi_rows && run.valid) phi.load(in, grid, run);
  start(run, stage);
#pragma unroll 1
  while (run.valid) {
    index += step;
    const Run next = run_at(grid, index);
    start(next, stage ^ 1);

    float q[size][4][4], none[4][4];
    if (!grid.fast) {
      Products::template interpolate<false>(in, grid, run, q);
    } else if constexpr (by_voxel) {
      Products::template interpolate<true>(in, grid, run, q);
    } else {
      phi.put_down(own.phi);
      __syncwarp();
      phi.interpolate(grid, run, own.phi, q);
    }
    wait_for_copies<1>();
    __syncwarp();
    const Stored* x = own.x[stage];
    Products::template multiply<false>(shared->w_x, x, nullptr, q, none);
    float psi[4][2] = {};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int m = 0; m < size; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) psi[n][j % 2] += w_psi[2 * m + j / 2] * relu(q[m][n][j]);
      }
    }
    if (phi_rows && next.valid) phi.load(in, grid, next);  // q is gone: there are registers for it
    own.alpha[own_voxel()] = fast_sigmoid(sum_over_rows_of_run(psi) + b_psi);
    __syncwarp();

    const int first = first_voxel(grid, run);
    if (lane < run.count) {
      alpha_out[int64_t{run.image} * in.voxels() + first + lane] = static_cast<Stored>(own.alpha[lane]);
    }
    store_run<Tile>(x, image_of(out, out_layout, run.image), first, run.count, channels, grid.x_pieces,
                    [&](int row, int column, Bytes16& piece) {
#pragma unroll
                      for (int i = 0; i < 4; ++i) {
                        const float2 pair = unpack<Stored>(piece.word[i]);
                        const float* alpha = own.alpha + (by_voxel ? row : column + 2 * i);
                        piece.word[i] = pack<Stored>(alpha[0] * pair.x, alpha[by_voxel ? 0 : 1] * pair.y);
                      }
                    });
    __syncwarp();  // before the next copies into this stage
    stage ^= 1;
    run = next;
  }
}

}  // namespace lungkit
