// The half types' kernels, forward and backward: a warp takes runs of 32 voxels along x, one row of the grid
// at a time, and shares nothing with other warps but the weights. While it computes one run the features of
// its next one are on their way into shared memory.
#pragma once

#include "../support/cuda_store.h"
#include "../support/cuda_tensor_cores.h"
#include "cuda_tile.h"

namespace lungkit {

constexpr int run_voxels = 32;
constexpr int row_warps = gate_threads / 32;
constexpr int inner_stride =
    run_voxels + 8;  // of a tile of inner channels: a row in memory starts in new banks

// `size` 1 or 2: at most 32 * size channels of x and 16 * size inner channels. The tile of a run keeps the
// order that the features have in memory.
template <class Stored, int size, bool channels_last>
struct RunTile {
  static constexpr bool by_voxel = channels_last;
  static constexpr int channels = 32 * size;
  static constexpr int rows = by_voxel ? run_voxels : channels;
  static constexpr int columns = by_voxel ? channels : run_voxels;
  static constexpr int stride = columns + 8;
  static constexpr int elements = rows * stride;
  static constexpr int pieces_per_row = columns / 8;  // of 16 bytes
  static constexpr int pieces_per_lane = rows * pieces_per_row / 32;
};

// n / divisor for 0 <= n < 2^31 by a multiplication: the hardware has no division of integers.
struct Divisor {
  uint32_t value, multiplier, shift;

  explicit Divisor(int divisor) : value(static_cast<uint32_t>(divisor)), multiplier(0), shift(0) {
    while (shift < 31 && (1u << shift) < value) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - value) / value + 1);
  }
  __device__ int divide(int n) const {
    return static_cast<int>((__umulhi(multiplier, static_cast<uint32_t>(n)) + static_cast<uint32_t>(n)) >>
                            shift);
  }
  __device__ int rest(int n, int quotient) const { return n - quotient * static_cast<int>(value); }
};

// LinearAxis, whose lower column and weight come from one division.
struct RowAxis {
  GateAxis axis;
  Divisor twice_fine;
  float unit;  // 1 / (2 * fine)

  explicit RowAxis(const GateAxis& axis)
      : axis(axis), twice_fine(2 * axis.fine), unit(1.f / static_cast<float>(2 * axis.fine)) {}
  struct Point {
    int lower;
    float weight;
  };
  __device__ Point at(int p) const {
    const int position = max((2 * p + 1) * axis.coarse - axis.fine, 0), lower = twice_fine.divide(position);
    if (lower >= axis.coarse - 1) return {axis.coarse - 1, 0.f};
    return {lower, unit * static_cast<float>(twice_fine.rest(position, lower))};
  }
};

// The runs of a problem, rows fastest: the warps of a block read the same rows of phi.
struct RowGrid {
  int runs;  // of all images
  RowAxis z, y, x;
  Divisor height, runs_per_row, depth;
  bool fast;        // RunProducts::interpolate<true> or PhiRows will do
  bool phi_pieces;  // PhiRows may load 4 columns at once, otherwise 2
  bool x_pieces;    // every run starts on 16 bytes and ends on them, in x and in what is laid out like it
};

struct Run {
  int image, z, y, x, count;
  bool valid;
};

inline __device__ Run run_at(const RowGrid& grid, int index) {
  const int column = grid.height.divide(index), slab = grid.runs_per_row.divide(column);
  const int image = grid.depth.divide(slab), x = grid.runs_per_row.rest(column, slab) * run_voxels;
  return {image, grid.depth.rest(slab, image),          grid.height.rest(index, column),
          x,     min(run_voxels, grid.x.axis.fine - x), index < grid.runs};
}

inline __device__ int first_voxel(const RowGrid& grid, const Run& run) {
  return (run.z * grid.y.axis.fine + run.y) * grid.x.axis.fine + run.x;
}

// Starts to load a run's features; zeros beyond its voxels and beyond the channels.
template <class Tile, class Stored>
__device__ __forceinline__ void load_run(Stored* tile, const Features<const Stored>& from, int first,
                                         int count, int channels, bool pieces) {
  constexpr bool by_voxel = Tile::by_voxel;
  const int lane = threadIdx.x % 32;
  const int64_t row_step = by_voxel ? from.voxel_stride : from.channel_stride;
  const int rows = by_voxel ? count : channels, columns = by_voxel ? channels : count;
  const Stored* start = from.at(0, first);
  if (pieces) {
    const int first_row = lane / Tile::pieces_per_row, column = lane % Tile::pieces_per_row * 8;
    constexpr int step = 32 / Tile::pieces_per_row;
    const Stored* source = start + first_row * row_step + column;
    Stored* to = tile + first_row * Tile::stride + column;
#pragma unroll
    for (int k = 0; k < Tile::pieces_per_lane; ++k) {
      const bool wanted = first_row + k * step < rows && column < columns;
      copy_later(to + k * step * Tile::stride, wanted ? source : start, wanted);
      source += step * row_step;
    }
    return;
  }
#pragma unroll 1
  for (int r = 0; r < Tile::rows; ++r) {
#pragma unroll 1
    for (int c = lane; c < Tile::columns; c += 32) {
      tile[r * Tile::stride + c] = r < rows && c < columns ? start[r * row_step + c] : Stored(0.f);
    }
  }
}

// Writes value(row, column of the first of 8, 8 elements) of a run's tile to memory.
template <class Tile, class Stored, class Value>
__device__ __forceinline__ void store_run(const Stored* tile, const Features<Stored>& to, int first,
                                          int count, int channels, bool pieces, const Value& value) {
  constexpr bool by_voxel = Tile::by_voxel;
  const int lane = threadIdx.x % 32;
  const int64_t row_step = by_voxel ? to.voxel_stride : to.channel_stride;
  const int rows = by_voxel ? count : channels, columns = by_voxel ? channels : count;
  const int first_row = lane / Tile::pieces_per_row, column = lane % Tile::pieces_per_row * 8;
  constexpr int step = 32 / Tile::pieces_per_row;
  const auto piece_of = [&](int row) {
    Bytes16 piece = *reinterpret_cast<const Bytes16*>(tile + row * Tile::stride + column);
    value(row, column, piece);
    return piece;
  };
  Stored* target = to.at(0, first) + first_row * row_step + column;
  if (pieces) {
#pragma unroll
    for (int k = 0; k < Tile::pieces_per_lane; ++k, target += step * row_step) {
      const int row = first_row + k * step;
      if (row < rows && column < columns) store_whole(target, piece_of(row));
    }
    return;
  }
#pragma unroll 1
  for (int row = first_row; row < rows; row += step, target += step * row_step) {
    const Bytes16 piece = piece_of(row);
    Stored each[8];
    memcpy(each, &piece, sizeof each);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < columns) target[i] = each[i];
    }
  }
}

}  // namespace lungkit
