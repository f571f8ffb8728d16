// theta + up(phi) of a run as one product on the tensor cores: phi's columns beside the features, the weights
// of the interpolation beside W_x, so that up(phi) costs a few instructions a voxel for any ratio of the
// grids.
//
// A NaN or infinity of phi reaches every voxel whose block of 8 reads within 8 columns of it.
#pragma once

#include "cuda_rows.h"

namespace lungkit {

// Which inner channel a row of q is. Where features lie by voxel, the rows that a lane holds are neighbours
// in memory.
template <int size, bool by_voxel>
__device__ constexpr int inner_of_row(int row) {
  return by_voxel ? row % 8 * (2 * size) + row / 8 : row;
}

// W_x in shared memory as its products read it: (16 size, 32 size), rows `stride` apart, zeros around it.
template <class Stored, int size, bool by_voxel>
struct RowWeights {
  static constexpr int stride = 32 * size + 8;
  static constexpr int elements = 16 * size * stride;

  __device__ static void load(const GateInputs<Stored>& in, Stored* w_x) {
    const int channels = in.x_channels(), inner = in.inner();
#pragma unroll 1
    for (int k = threadIdx.x; k < elements; k += gate_threads) {
      const int i = inner_of_row<size, by_voxel>(k / stride), c = k % stride;
      w_x[k] = static_cast<Stored>(i < inner && c < channels ? in.w_x[i * channels + c] : 0.f);
    }
  }
};

// What a lane holds of rows 8 h + g, h < 2 size, of q, of one voxel: neighbours in memory.
template <int size>
struct alignas(4 * size) InnerWords {
  uint32_t word[size];  // rows 16 m + g and 16 m + 8 + g
};
// The halves of two words that lie beside each other: (low, low) or (high, high).
inline __device__ uint32_t pair_of_halves(uint32_t first, uint32_t second, int half) {
  return half == 0 ? (first & 0xffffu) | (second << 16) : (first >> 16) | (second & 0xffff0000u);
}

// Columns `column` (even) and `column` + 1 of a row of phi, of the inner channels that a lane holds, as they
// are loaded where they lie by voxel; beyond the last column whatever lies there, where the weights are 0.
template <class Stored, int size>
struct PhiColumns {
  uint32_t word[2 * size];

  // `row`: of the lane's first channel.
  __device__ __forceinline__ void load(const Stored* row, int step, int column, int columns) {
    using Words = InnerWords<size>;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Words words = *reinterpret_cast<const Words*>(row + min(column + j, columns - 1) * step);
#pragma unroll
      for (int m = 0; m < size; ++m) word[j * size + m] = words.word[m];
    }
  }
  // The pair of columns of row 8 h + g.
  __device__ __forceinline__ uint32_t pair(int h) const {
    return pair_of_halves(word[h / 2], word[size + h / 2], h % 2);
  }
};

// Two columns of one channel, anywhere in memory.
template <class Stored>
__device__ __forceinline__ uint32_t phi_pair(const Stored* row, int64_t column_step, int column,
                                             int columns) {
  const Stored pair[2] = {row[min(column, columns - 1) * column_step],
                          row[min(column + 1, columns - 1) * column_step]};
  uint32_t bits;
  memcpy(&bits, pair, sizeof bits);
  return bits;
}

// Which columns of phi a lane brings to the product of voxels 8 n .. 8 n + 7 of a run, and their weights for
// its voxel.
struct Reach {
  int column;  // the first one
  float at;    // where the voxel lies, counted from there

  __device__ __forceinline__ Reach(int own_lower, float own_weight, int n) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int lower = __shfl_sync(all_lanes, own_lower, 8 * n + g);
    const float weight = __shfl_sync(all_lanes, own_weight, 8 * n + g);
    column = (__shfl_sync(all_lanes, own_lower, 8 * n) & ~1) + 2 * t;
    at = static_cast<float>(lower - column) + weight;
  }
  __device__ __forceinline__ float weight(int beyond) const {
    return fmaxf(1.f - fabsf(at - static_cast<float>(beyond)), 0.f);
  }
};

// The rows of phi that a run reads, of features by channel: loaded in whole pieces, interpolated along z and
// y in float, and put down as the sum of two half numbers, whose product with the weights along x takes both
// at once. For grids whose ratio along x is a power of two, so that the half type holds those weights. An
// infinity of phi becomes NaN.
template <class Stored, int size>
class PhiRows {
 public:
  static constexpr int columns =
      24;  // a run reads 18, from any of 4 on; a block of voxels 8, from an even one on
  // 8 would keep all banks apart, but the backward pass of size 2 has to fit devices with 99 KB.
  static constexpr int stride = 2 * columns + (size == 1 ? 8 : 4);
  static constexpr int elements = 16 * size * stride;

  // Starts to load; nothing waits for it before put_down().
  __device__ __forceinline__ void load(const GateInputs<Stored>& in, const RowGrid& grid, const Run& run) {
    const GateAxis &ay = grid.y.axis, &ax = grid.x.axis;
    const auto [lower_z, weight_z] = grid.z.at(run.z);
    const auto [lower_y, weight_y] = grid.y.at(run.y);
    of_z_ = weight_z;
    of_y_ = weight_y;
    const int first = grid.x.at(run.x).lower & ~3, next_row = weight_y != 0 ? ax.coarse : 0;
    const int next_plane = weight_z != 0 ? ay.coarse * ax.coarse : 0;
    const Stored* phi =
        image_of(in.phi, in.phi_layout, run.image).at(0, (lower_z * ay.coarse + lower_y) * ax.coarse);
#pragma unroll
    for (int k = 0; k < pieces; ++k) {
      const int i = min(channel(k), in.inner() - 1), column = first + 4 * piece(k);
      const Stored* from = phi + i * in.phi_layout.channel_stride;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        if (corner == 2 && next_plane == 0) break;
        const Stored* row = from + (corner / 2 * next_plane + corner % 2 * next_row);
        if (grid.phi_pieces) {
          const Bytes8 both = *reinterpret_cast<const Bytes8*>(row + min(column, ax.coarse - 4));
          raw_[k][corner][0] = both.word[0];
          raw_[k][corner][1] = both.word[1];
        } else {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            raw_[k][corner][j] = *reinterpret_cast<const uint32_t*>(row + min(column + 2 * j, ax.coarse - 2));
          }
        }
      }
    }
  }

  // The rows interpolated along z and y, for the whole warp.
  __device__ __forceinline__ void put_down(Stored* tile) const {
    const float share[4] = {(1.f - of_z_) * (1.f - of_y_), (1.f - of_z_) * of_y_, of_z_ * (1.f - of_y_),
                            of_z_ * of_y_};
#pragma unroll
    for (int k = 0; k < pieces; ++k) {
      float2 sum[2] = {};
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        if (corner == 2 && of_z_ == 0) break;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float2 pair = unpack<Stored>(raw_[k][corner][j]);
          sum[j].x += share[corner] * pair.x;
          sum[j].y += share[corner] * pair.y;
        }
      }
      Bytes8 held, rest;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        held.word[j] = pack<Stored>(sum[j].x, sum[j].y);
        const float2 rounded = unpack<Stored>(held.word[j]);
        rest.word[j] = pack<Stored>(sum[j].x - rounded.x, sum[j].y - rounded.y);
      }
      Stored* to = tile + channel(k) * stride + 4 * piece(k);
      *reinterpret_cast<Bytes8*>(to) = held;
      *reinterpret_cast<Bytes8*>(to + columns) = rest;
    }
  }

  // sum = up(phi), from what the warp put down.
  __device__ __forceinline__ static void interpolate(const RowGrid& grid, const Run& run, const Stored* tile,
                                                     float (&sum)[size][4][4]) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    const auto [own_lower, own_weight] = grid.x.at(min(run.x + lane, grid.x.axis.fine - 1));
    const int first = __shfl_sync(all_lanes, own_lower, 0) & ~3;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const Reach reach(own_lower, own_weight, n);
      const uint32_t weights = pack<Stored>(reach.weight(0), reach.weight(1));
      const uint32_t b[2] = {weights, weights};
      const Stored* from = tile + g * stride + (reach.column - first);
#pragma unroll
      for (int m = 0; m < size; ++m) {
        uint32_t a[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a[j] = *reinterpret_cast<const uint32_t*>(from + (16 * m + j % 2 * 8) * stride + j / 2 * columns);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[m][n][j] = 0;
        multiply_add<Stored>(sum[m][n], a, b);
      }
    }
  }

 private:
  struct alignas(8) Bytes8 {
    uint32_t word[2];
  };
  static constexpr int per_row = columns / 4;
  static constexpr int pieces = 16 * size * per_row / 32;  // of a lane

  __device__ static int channel(int k) { return (static_cast<int>(threadIdx.x) % 32 + 32 * k) / per_row; }
  __device__ static int piece(int k) { return (static_cast<int>(threadIdx.x) % 32 + 32 * k) % per_row; }

  uint32_t raw_[pieces][4][2];
  float of_z_, of_y_;
};

// q before its relu: q[m][n] is the block of inner channels 16 m .. and voxels 8 n .. of the run.
template <class Stored, int size, bool by_voxel>
struct RunProducts {
  using Tile = RunTile<Stored, size, by_voxel>;

  // sum = up(phi). A lane's share of the weights of the interpolation is 1 - |distance|, in columns of phi.
  // `fast`: phi lies by voxel, the half type holds every weight and 8 voxels read 8 columns at most, so that
  // one product takes two rows of phi; otherwise it takes 16 columns of one row, and what rounding takes from
  // the weights is another product: the sign of q decides about gradients.
  template <bool fast>
  __device__ __forceinline__ static void interpolate(const GateInputs<Stored>& in, const RowGrid& grid,
                                                     const Run& run, float (&sum)[size][4][4]) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    const GateAxis &ay = grid.y.axis, &ax = grid.x.axis;
    const auto [lower_z, wz] = grid.z.at(run.z);
    const auto [lower_y, wy] = grid.y.at(run.y);
    const auto [own_lower, own_weight] = grid.x.at(min(run.x + lane, ax.fine - 1));
    const int64_t column_step = in.phi_layout.voxel_stride, row_step = column_step * ax.coarse;
    const Features<const Stored> phi = image_of(in.phi, in.phi_layout, run.image);
    const int row = lower_z * ay.coarse + lower_y;
    // The lower row of phi, of the channels that this lane holds; one of them, or their whole group, where
    // they lie beyond the last one, whose weights are 0.
    const Stored* corner[2 * size];
    const int last = in.inner() - (fast ? 2 * size : 1);
#pragma unroll
    for (int h = 0; h < 2 * size; ++h) {
      corner[h] = phi.at(min(inner_of_row<size, by_voxel>(8 * h + g), last), 0) + row * row_step;
    }

    if constexpr (fast) {
      static_assert(by_voxel);
      const int step = static_cast<int>(column_step);
      int column[4];
      float near[4][2];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const Reach reach(own_lower, own_weight, n);
        column[n] = reach.column;
#pragma unroll
        for (int j = 0; j < 2; ++j) near[n][j] = reach.weight(j);
#pragma unroll
        for (int m = 0; m < size; ++m) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[m][n][j] = 0;
        }
      }
#pragma unroll
      for (int dz = 0; dz < 2; ++dz) {
        if (dz == 1 && wz == 0) continue;
        const int64_t first = dz * row_step * ay.coarse, second = wy != 0 ? first + row_step : first;
        const float of_z = dz ? wz : 1.f - wz, low = of_z * (1.f - wy), high = of_z * wy;
        PhiColumns<Stored, size> of_first[4], of_second[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          of_first[n].load(corner[0] + first, step, column[n], ax.coarse);
          of_second[n].load(corner[0] + second, step, column[n], ax.coarse);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float(&of)[2] = near[n];
          const uint32_t b[2] = {pack<Stored>(low * of[0], low * of[1]),
                                 pack<Stored>(high * of[0], high * of[1])};
#pragma unroll
          for (int m = 0; m < size; ++m) {
            const uint32_t a[4] = {of_first[n].pair(2 * m), of_first[n].pair(2 * m + 1),
                                   of_second[n].pair(2 * m), of_second[n].pair(2 * m + 1)};
            multiply_add<Stored>(sum[m][n], a, b);
          }
        }
      }
    } else {
#pragma unroll 1  // few registers: the fast way decides how many warps there are
      for (int n = 0; n < 4; ++n) {
        const Reach reach(own_lower, own_weight, n);
        float block[size][4] = {};
#pragma unroll 1
        for (int of_corner = 0; of_corner < 4; ++of_corner) {
          const int dz = of_corner / 2, dy = of_corner % 2;
          if ((dz == 1 && wz == 0) || (dy == 1 && wy == 0)) continue;
          const float weight = (dz ? wz : 1.f - wz) * (dy ? wy : 1.f - wy);
          const int64_t first = (dz * ay.coarse + dy) * row_step;
          const float exact[4] = {weight * reach.weight(0), weight * reach.weight(1),
                                  weight * reach.weight(8), weight * reach.weight(9)};
          const uint32_t b[2] = {pack<Stored>(exact[0], exact[1]), pack<Stored>(exact[2], exact[3])};
          const float2 held[2] = {unpack<Stored>(b[0]), unpack<Stored>(b[1])};
          const uint32_t rest[2] = {pack<Stored>(exact[0] - held[0].x, exact[1] - held[0].y),
                                    pack<Stored>(exact[2] - held[1].x, exact[3] - held[1].y)};
#pragma unroll
          for (int m = 0; m < size; ++m) {
            uint32_t a[4];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const Stored* from = corner[2 * m + h] + first;
              a[h] = phi_pair(from, column_step, reach.column, ax.coarse);
              a[2 + h] = phi_pair(from, column_step, reach.column + 8, ax.coarse);
            }
            multiply_add<Stored>(block[m], a, b);
            multiply_add<Stored>(block[m], a, rest);
          }
        }
#pragma unroll
        for (int m = 0; m < size; ++m) {
#pragma unroll
          for (int other = 0; other < 4; ++other) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[m][other][j] = other == n ? block[m][j] : sum[m][other][j];
          }
        }
      }
    }
  }

  // sum += W_x x and, of two tiles, dot[n] (j = 0, 1: voxel 8 n + g at 2t, 2t + 1; j = 2, 3 where n is odd),
  // whose diagonal is the sum over the channels of x times other.
  template <bool with_dot>
  __device__ __forceinline__ static void multiply(const Stored* w_x, const Stored* x, const Stored* other,
                                                  float (&sum)[size][4][4], float (&dot)[4][4]) {
#pragma unroll
    for (int c = 0; c < 32 * size; c += 16) {
      uint32_t w[size][4];
#pragma unroll
      for (int m = 0; m < size; ++m)
        load_a<false>(w[m], w_x, RowWeights<Stored, size, by_voxel>::stride, 16 * m, c);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t b[2][2];
        load_b<!by_voxel>(b, x, Tile::stride, c, 16 * half);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int m = 0; m < size; ++m) multiply_add<Stored>(sum[m][2 * half + n], w[m], b[n]);
        }
        if constexpr (with_dot) {
          uint32_t a[4];
          load_a<!by_voxel>(a, other, Tile::stride, 16 * half, c);
#pragma unroll
          for (int n = 0; n < 2; ++n) multiply_add<Stored>(dot[2 * half + n], a, b[n]);
        }
      }
    }
  }
};

// Which voxel of the run a lane gets from sum_over_rows_of_run.
inline __device__ int own_voxel() {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  return 8 * (g / 2) + 2 * t + g % 2;
}

// Sums of value[n][j], n < 4, j < 2, over the lanes that hold the same columns; each lane gets one of 32
// sums.
inline __device__ float sum_over_rows_of_run(const float (&value)[4][2]) {
  const int lane = threadIdx.x % 32;
  const auto step = [&](float low, float high, int distance) {
    const bool upper = lane & distance;
    const float kept = upper ? high : low, given = upper ? low : high;
    return kept + __shfl_xor_sync(all_lanes, given, distance);
  };
  float halves[2][2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) halves[n][j] = step(value[n][j], value[n + 2][j], 16);
  }
  return step(step(halves[0][0], halves[1][0], 8), step(halves[0][1], halves[1][1], 8), 4);
}

inline __device__ float fast_sigmoid(float x) {
  return __fdividef(1.f, 1.f + __expf(-x));
}

inline __device__ float relu(float x) {
  return x < 0 ? 0.f : x;  // keeps NaN
}

}  // namespace lungkit
