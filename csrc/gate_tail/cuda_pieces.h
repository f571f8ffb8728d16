// The gate's tail in pieces of 16 bytes: 8 voxels of a channel where features lie channels-first, 8 channels
// of a voxel where they lie channels-last (of the half types; 4 of float32). A block of 256 threads takes a
// tile of voxels of one image: 16 threads side by side in memory, and 16 of those rows, which share the
// channels of the same voxels, or take voxels of their own. Sums over the channels and over the voxels run in
// an order that the shape decides.
#pragma once

#include <cstdint>
#include <cstring>

#include "../support/cuda_store.h"
#include "../support/dispatch.h"
#include "../support/layout.h"

namespace lungkit {

constexpr int piece_threads = 256, piece_row = 16, piece_rows = 16;

struct alignas(16) PieceBytes {
  uint32_t word[4];
};

template <class Stored>
struct Piece {
  static constexpr int width = 16 / static_cast<int>(sizeof(Stored));
  using Sum = accumulate_t<Stored>;
  Stored of[width];

  __device__ static Piece load(const Stored* from) {
    const PieceBytes bytes = *reinterpret_cast<const PieceBytes*>(from);
    Piece piece;
    memcpy(&piece, &bytes, sizeof bytes);
    return piece;
  }
  __device__ void store(Stored* to) const { store_whole(to, *this); }
  __device__ Sum at(int i) const { return static_cast<Sum>(of[i]); }
};

// Strides of features whose pieces all start on 16 bytes.
struct PieceLayout {
  int64_t images, channels, voxels;
  int64_t image_stride, row_stride;  // a row: a channel's voxels, or a voxel's channels
};

// Voxels of a tile: of channels-first features a row of threads, of channels-last ones 4 for each row.
template <class Stored, bool by_voxel>
constexpr int piece_tile = by_voxel ? 4 * piece_rows : piece_row * Piece<Stored>::width;

template <class Stored, bool by_voxel>
struct PieceTile {
  static constexpr int width = Piece<Stored>::width;
  int64_t image, first;
  int column, row;  // of this thread

  __device__ explicit PieceTile(const PieceLayout& layout)
      : column(static_cast<int>(threadIdx.x) % piece_row), row(static_cast<int>(threadIdx.x) / piece_row) {
    const int64_t tiles = (layout.voxels + piece_tile<Stored, by_voxel> - 1) / piece_tile<Stored, by_voxel>;
    image = blockIdx.x / tiles;
    first = blockIdx.x % tiles * piece_tile<Stored, by_voxel>;
  }
};

template <class Sum>
__device__ Sum sum_of_row(Sum value) {
#pragma unroll
  for (int step = piece_row / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// map[v] = sum over the channels c of what term(offset of the piece, c, index in the map, sums) adds to its
// sums, one an element of the piece. Null: only what `term` does besides.
template <class Stored, bool by_voxel, class Term>
__device__ void sum_over_channels(const PieceLayout& layout, Stored* __restrict__ map, const Term& term) {
  using Sum = accumulate_t<Stored>;
  constexpr int width = Piece<Stored>::width;
  const PieceTile<Stored, by_voxel> tile(layout);
  const int64_t start = tile.image * layout.image_stride, map_start = tile.image * layout.voxels;
  if constexpr (by_voxel) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t voxel = tile.first + tile.row + k * piece_rows;
      const bool inside = voxel < layout.voxels;
      Sum sum[width] = {}, total = 0;
      if (inside) {
#pragma unroll 2
        for (int64_t c = tile.column * width; c < layout.channels; c += piece_row * width) {
          term(start + voxel * layout.row_stride + c, c, map_start + voxel, sum);
        }
      }
#pragma unroll
      for (int i = 0; i < width; ++i) total += sum[i];
      total = sum_of_row(total);
      if (inside && tile.column == 0 && map != nullptr) map[map_start + voxel] = static_cast<Stored>(total);
    }
  } else {
    __shared__ Sum of_row[piece_rows][piece_row * width];
    const int64_t voxel = tile.first + tile.column * width;
    Sum sum[width] = {};
    if (voxel < layout.voxels) {
#pragma unroll 4
      for (int64_t c = tile.row; c < layout.channels; c += piece_rows) {
        term(start + c * layout.row_stride + voxel, c, map_start + voxel, sum);
      }
    }
    if (map == nullptr) return;
#pragma unroll
    for (int i = 0; i < width; ++i) of_row[tile.row][tile.column * width + i] = sum[i];
    __syncthreads();
    const int own = static_cast<int>(threadIdx.x);
    if (own >= piece_row * width || tile.first + own >= layout.voxels) return;
    Sum total = 0;
#pragma unroll
    for (int r = 0; r < piece_rows; ++r) total += of_row[r][own];
    map[map_start + tile.first + own] = static_cast<Stored>(total);
  }
}

// The elements of a map beside a piece: 8 voxels, or one voxel 8 times.
template <class Stored, bool by_voxel>
__device__ void load_map(const Stored* __restrict__ map, int64_t index,
                         accumulate_t<Stored> (&value)[Piece<Stored>::width]) {
  using Sum = accumulate_t<Stored>;
  if constexpr (by_voxel) {
    const Sum one = static_cast<Sum>(map[index]);
#pragma unroll
    for (int i = 0; i < Piece<Stored>::width; ++i) value[i] = one;
  } else {
    const auto piece = Piece<Stored>::load(map + index);
#pragma unroll
    for (int i = 0; i < Piece<Stored>::width; ++i) value[i] = piece.at(i);
  }
}

template <class Stored, bool by_voxel>
__global__ void __launch_bounds__(piece_threads, 2)
    gate_psi_pieces_kernel(PieceLayout layout, const Stored* __restrict__ a, const Stored* __restrict__ b,
                           const accumulate_t<Stored>* __restrict__ weight, Stored* __restrict__ psi,
                           Stored* __restrict__ q) {
  using Sum = accumulate_t<Stored>;
  sum_over_channels<Stored, by_voxel>(layout, psi, [&](int64_t offset, int64_t channel, int64_t, auto& sum) {
    const auto left = Piece<Stored>::load(a + offset), right = Piece<Stored>::load(b + offset);
    Piece<Stored> kept;
#pragma unroll
    for (int i = 0; i < Piece<Stored>::width; ++i) {
      const Sum value = left.at(i) + right.at(i), positive = value < Sum(0) ? Sum(0) : value;  // keeps NaN
      kept.of[i] = static_cast<Stored>(positive);
      sum[i] += weight[by_voxel ? channel + i : channel] * positive;
    }
    kept.store(q + offset);
  });
}

template <class Stored, bool by_voxel>
__global__ void __launch_bounds__(piece_threads, 2)
    gate_scale_backward_pieces_kernel(PieceLayout layout, const Stored* __restrict__ grad_out,
                                      const Stored* __restrict__ x, const Stored* __restrict__ alpha,
                                      Stored* __restrict__ grad_x, Stored* __restrict__ grad_alpha) {
  using Sum = accumulate_t<Stored>;
  sum_over_channels<Stored, by_voxel>(
      layout, grad_alpha, [&](int64_t offset, int64_t, int64_t index, auto& sum) {
        const auto slope = Piece<Stored>::load(grad_out + offset), from = Piece<Stored>::load(x + offset);
        Sum factor[Piece<Stored>::width];
        load_map<Stored, by_voxel>(alpha, index, factor);
        Piece<Stored> to;
#pragma unroll
        for (int i = 0; i < Piece<Stored>::width; ++i) {
          sum[i] += slope.at(i) * from.at(i);
          to.of[i] = static_cast<Stored>(factor[i] * slope.at(i));
        }
        if (grad_x != nullptr) to.store(grad_x + offset);
      });
}

template <class Stored, bool by_voxel>
__global__ void __launch_bounds__(piece_threads, 2)
    gate_scale_pieces_kernel(PieceLayout layout, const Stored* __restrict__ x,
                             const Stored* __restrict__ alpha, Stored* __restrict__ out) {
  using Sum = accumulate_t<Stored>;
  Stored* const no_map = nullptr;
  sum_over_channels<Stored, by_voxel>(layout, no_map, [&](int64_t offset, int64_t, int64_t index, auto&) {
    const auto from = Piece<Stored>::load(x + offset);
    Sum factor[Piece<Stored>::width];
    load_map<Stored, by_voxel>(alpha, index, factor);
    Piece<Stored> to;
#pragma unroll
    for (int i = 0; i < Piece<Stored>::width; ++i) to.of[i] = static_cast<Stored>(factor[i] * from.at(i));
    to.store(out + offset);
  });
}

// Of each channel the sum over a tile's voxels goes to partial[channel * tiles + tile].
template <class Stored, bool by_voxel>
__global__ void __launch_bounds__(piece_threads, 2)
    gate_psi_backward_pieces_kernel(PieceLayout layout, const Stored* __restrict__ grad_psi,
                                    const Stored* __restrict__ q,
                                    const accumulate_t<Stored>* __restrict__ weight,
                                    Stored* __restrict__ grad, accumulate_t<Stored>* __restrict__ partial) {
  using Sum = accumulate_t<Stored>;
  constexpr int width = Piece<Stored>::width;
  const PieceTile<Stored, by_voxel> tile(layout);
  const int64_t start = tile.image * layout.image_stride, map_start = tile.image * layout.voxels;
  // Writes the gradient of one piece of q; sum[i] += slope[i] * value[i].
  const auto differentiate = [&](const Piece<Stored>& value, int64_t offset, int64_t channel,
                                 const Sum(&slope)[width], Sum(&sum)[width]) {
    Piece<Stored> to;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      sum[i] += slope[i] * value.at(i);
      const Sum of_channel = weight[by_voxel ? channel + i : channel];
      to.of[i] = static_cast<Stored>(value.at(i) <= Sum(0) ? Sum(0) : slope[i] * of_channel);
    }
    if (grad != nullptr) to.store(grad + offset);
  };
  if constexpr (by_voxel) {
    __shared__ Sum of_row[piece_rows][piece_row * width];
    Sum slope[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t voxel = tile.first + tile.row + k * piece_rows;
      slope[k] = voxel < layout.voxels ? static_cast<Sum>(grad_psi[map_start + voxel]) : Sum(0);
    }
    for (int64_t first = 0; first < layout.channels; first += piece_row * width) {
      const int64_t channel = first + tile.column * width;
      Sum sum[width] = {};
      if (channel < layout.channels) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int64_t voxel = tile.first + tile.row + k * piece_rows;
          if (voxel >= layout.voxels) continue;
          Sum of_voxel[width];
#pragma unroll
          for (int i = 0; i < width; ++i) of_voxel[i] = slope[k];
          const int64_t offset = start + voxel * layout.row_stride + channel;
          differentiate(Piece<Stored>::load(q + offset), offset, channel, of_voxel, sum);
        }
      }
      if (partial == nullptr) continue;
#pragma unroll
      for (int i = 0; i < width; ++i) of_row[tile.row][tile.column * width + i] = sum[i];
      __syncthreads();
      const int own = static_cast<int>(threadIdx.x);
      if (own < piece_row * width && first + own < layout.channels) {
        Sum total = 0;
#pragma unroll
        for (int r = 0; r < piece_rows; ++r) total += of_row[r][own];
        partial[(first + own) * gridDim.x + blockIdx.x] = total;
      }
      __syncthreads();
    }
  } else {
    const int64_t voxel = tile.first + tile.column * width;
    Sum slope[width] = {};
    if (voxel < layout.voxels) load_map<Stored, false>(grad_psi, map_start + voxel, slope);
    constexpr int batch = 4;  // pieces on their way together
    for (int64_t first = 0; first < layout.channels; first += batch * piece_rows) {
      const auto channel = [&](int k) { return first + k * piece_rows + tile.row; };
      const auto offset = [&](int k) { return start + channel(k) * layout.row_stride + voxel; };
      const auto has = [&](int k) { return channel(k) < layout.channels && voxel < layout.voxels; };
      Piece<Stored> values[batch];
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        if (has(k)) values[k] = Piece<Stored>::load(q + offset(k));
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        Sum sum[width] = {}, total = 0;
        if (has(k)) differentiate(values[k], offset(k), channel(k), slope, sum);
        if (partial == nullptr) continue;
#pragma unroll
        for (int i = 0; i < width; ++i) total += sum[i];
        total = sum_of_row(total);
        if (tile.column == 0 && channel(k) < layout.channels) {
          partial[channel(k) * gridDim.x + blockIdx.x] = total;
        }
      }
    }
  }
}

}  // namespace lungkit
