// The adjoint of the interpolation as a gather: every element of phi's gradient is a sum over the voxels of
// x's grid that read it. A thread owns a column of phi's grid along z and walks the planes of x's grid that
// read its part of it, with two planes of phi open at a time, so that each row of x's grid is read twice at
// most.
#pragma once

#include "../support/cuda_store.h"
#include "../support/cuda_tensor_cores.h"
#include "cuda_tile.h"

namespace lungkit {

constexpr int adjoint_threads = 256;

// The gradient of up(phi), (B, inner, z, y, x) with rows `row_stride` apart, or (B, z, y, x, inner) with
// voxels `voxel_stride` apart; and of phi.
template <class Stored>
struct AdjointTask {
  const Stored* fine;
  Stored* coarse;
  VoxelLayout coarse_layout;
  GateAxis axes[3];
  int row_stride;
  int voxel_stride;  // 0: the first order
  bool pieces;       // of the second order: 8 channels of phi's gradient can be written at once
  int planes;        // of phi, a thread; the order of the additions does not depend on it
  int segments;      // of so many planes
  int64_t threads;   // below 2^31
};

// What a thread owns: planes begin .. end of one row and column of phi's gradient, or group of `columns`
// columns, of one channel; 8 channels from `channel` on where the gradients lie by voxel, whose neighbours in
// memory are neighbours in a warp.
template <class Stored, bool by_voxel>
struct AdjointPart {
  const AdjointTask<Stored>& task;
  int column, row, channel, image, begin, end;

  __device__ AdjointPart(const AdjointTask<Stored>& task, int thread, int columns) : task(task) {
    const int inner = static_cast<int>(task.coarse_layout.channels), rows = task.axes[1].coarse;
    if constexpr (by_voxel) {
      const int groups = (inner + 7) / 8;
      channel = thread % groups * 8;
      thread /= groups;
    }
    column = thread % columns;
    row = thread / columns % rows;
    int rest = thread / columns / rows;
    if constexpr (!by_voxel) {
      channel = rest % inner;
      rest /= inner;
    }
    image = rest / task.segments;
    begin = rest % task.segments * task.planes;
    end = min(begin + task.planes, task.axes[0].coarse);
  }
  // The first plane of what it reads.
  __device__ const Stored* fine() const {
    const int64_t plane_step = int64_t{task.axes[1].fine} * task.row_stride;
    const int64_t of_image = int64_t{image} * task.axes[0].fine;
    if constexpr (by_voxel) return task.fine + of_image * plane_step + channel;
    return task.fine +
           (of_image * task.coarse_layout.channels + int64_t{channel} * task.axes[0].fine) * plane_step;
  }
  // `width` values of plane z from column x on: of 8 channels, or of neighbouring columns.
  template <int width>
  __device__ void store(int z, int x, const float (&value)[width]) const {
    const VoxelLayout& to = task.coarse_layout;
    const int64_t voxel = (int64_t{z} * task.axes[1].coarse + row) * task.axes[2].coarse + x;
    Stored* at =
        task.coarse + image * to.batch_stride + channel * to.channel_stride + voxel * to.voxel_stride;
    if constexpr (by_voxel) {
      if (task.pieces) {
        Bytes16 piece;
#pragma unroll
        for (int i = 0; i < 4; ++i) piece.word[i] = pack<Stored>(value[2 * i], value[2 * i + 1]);
        store_whole(at, piece);
        return;
      }
    }
    const int64_t step = by_voxel ? to.channel_stride : to.voxel_stride;
    const int count = by_voxel ? static_cast<int>(to.channels) - channel : task.axes[2].coarse - x;
    if constexpr (width == 4) {
      if (step == 1 && count >= 4 && reinterpret_cast<uintptr_t>(at) % 8 == 0) {
        const uint2 piece = {pack<Stored>(value[0], value[1]), pack<Stored>(value[2], value[3])};
        store_whole(at, piece);
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < width; ++i) {
      if (i < count) at[i * step] = static_cast<Stored>(value[i]);
    }
  }
};

// sum += weight * 8 elements.
template <class Stored>
__device__ __forceinline__ void add_piece(const Bytes16& piece, float weight, float (&sum)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<Stored>(piece.word[i]);
    sum[2 * i] += weight * pair.x;
    sum[2 * i + 1] += weight * pair.y;
  }
}

// Positions of x's grid that read column k of phi's, and with what weight: 1 - |distance|, in phi's columns.
struct AdjointTaps {
  const GateAxis& axis;
  const int k, first, count;

  __device__ AdjointTaps(const GateAxis& axis, int k)
      : axis(axis),
        k(k),
        first(axis.first_reading(axis.fine == axis.coarse ? k : k - 1)),
        count(axis.first_reading(k + 1) - first) {}
  // Twice fine times how far a position lies behind column `column`.
  __device__ int behind(int column, int tap) const {
    const int at = (2 * (first + tap) + 1) * axis.coarse - axis.fine;
    return min(max(at, 0), 2 * axis.fine * (axis.coarse - 1)) - 2 * axis.fine * column;
  }
  __device__ float in_columns(int distance) const {
    return __fdividef(static_cast<float>(distance), static_cast<float>(2 * axis.fine));
  }
  __device__ float weight(int tap) const { return fmaxf(1.f - in_columns(abs(behind(k, tap))), 0.f); }
};

// Any ratio of the grids. A thread owns one column.
template <class Stored, bool by_voxel>
__global__ void __launch_bounds__(adjoint_threads, 2) gate_adjoint_kernel(AdjointTask<Stored> task) {
  constexpr int width = by_voxel ? 8 : 1;
  const int64_t thread = int64_t{blockIdx.x} * adjoint_threads + threadIdx.x;
  if (thread >= task.threads) return;
  const GateAxis &az = task.axes[0], &ay = task.axes[1], &ax = task.axes[2];
  const AdjointPart<Stored, by_voxel> part(task, static_cast<int>(thread), ax.coarse);
  const AdjointTaps along_x(ax, part.column), along_y(ay, part.row), along_z(az, part.begin);
  const int64_t plane_step = int64_t{ay.fine} * task.row_stride;
  const int step = by_voxel ? task.voxel_stride : 1;
  const Stored* plane = part.fine() + along_z.first * plane_step + int64_t{along_y.first} * task.row_stride +
                        along_x.first * step;

  float low[width] = {}, high[width] = {};
  int open = part.begin - 1;
  const auto close = [&] {
    if (open >= part.begin && open < part.end) part.store(open, part.column, low);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      low[i] = high[i];
      high[i] = 0;
    }
    ++open;
  };
  const int planes = az.first_reading(part.end) - along_z.first;
#pragma unroll 1
  for (int z = 0; z < planes; ++z, plane += plane_step) {
    float sum[width] = {};
#pragma unroll 1
    for (int y = 0; y < along_y.count; ++y) {
      const Stored* from = plane + y * task.row_stride;
      const float of_row = along_y.weight(y);
#pragma unroll 1
      for (int x = 0; x < along_x.count; ++x, from += step) {
        const float weight = of_row * along_x.weight(x);
        if constexpr (by_voxel) {
          add_piece<Stored>(*reinterpret_cast<const Bytes16*>(from), weight, sum);
        } else {
          sum[0] += weight * static_cast<float>(*from);
        }
      }
    }
    if (along_z.behind(open, z) >= 2 * az.fine) close();
    const float weight = along_z.in_columns(along_z.behind(open, z));
#pragma unroll
    for (int i = 0; i < width; ++i) {
      low[i] += (1.f - weight) * sum[i];
      high[i] += weight * sum[i];
    }
  }
  while (open < part.end) close();
}

// Grids that differ by 2 along x, and by 2 or not at all (`halves_z`, `halves_y`) along the others: element k
// is 1/4, 3/4, 3/4, 1/4 of positions 2k - 1 .. 2k + 2, the first and the last one in place of those beyond
// them. A thread owns 4 columns: it reads 16 bytes of a row, and the two neighbours; or, by voxel, 8 channels
// of one column.
template <class Stored, bool by_voxel, bool halves_z, bool halves_y>
__global__ void __launch_bounds__(adjoint_threads) gate_halving_adjoint_kernel(AdjointTask<Stored> task) {
  constexpr int columns = by_voxel ? 1 : 4, width = by_voxel ? 8 : columns;
  const int64_t thread = int64_t{blockIdx.x} * adjoint_threads + threadIdx.x;
  if (thread >= task.threads) return;
  const GateAxis &az = task.axes[0], &ay = task.axes[1], &ax = task.axes[2];
  const AdjointPart<Stored, by_voxel> part(task, static_cast<int>(thread),
                                           (ax.coarse + columns - 1) / columns);
  const int first = 2 * columns * part.column;  // of the positions between its neighbours
  const int left = max(first - 1, 0), right = min(first + 2 * columns, ax.fine - 1);
  const int64_t plane_step = int64_t{ay.fine} * task.row_stride;
  const Stored* const start = part.fine();

  const auto add_row = [&](const Stored* row, float weight, float(&sum)[width]) {
    if constexpr (by_voxel) {
      const uint32_t at[4] = {static_cast<uint32_t>(left * task.voxel_stride),
                              static_cast<uint32_t>(first * task.voxel_stride),
                              static_cast<uint32_t>((first + 1) * task.voxel_stride),
                              static_cast<uint32_t>(right * task.voxel_stride)};
      Bytes16 piece[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) piece[k] = *reinterpret_cast<const Bytes16*>(row + at[k]);
#pragma unroll
      for (int k = 0; k < 4; ++k) add_piece<Stored>(piece[k], k % 3 == 0 ? weight : 3.f * weight, sum);
    } else {
      const Bytes16 piece = *reinterpret_cast<const Bytes16*>(row + first);
      float of[10];
      of[0] = static_cast<float>(row[left]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<Stored>(piece.word[i]);
        of[2 * i + 1] = pair.x;
        of[2 * i + 2] = pair.y;
      }
      of[9] = static_cast<float>(row[right]);
      if (first + 8 > ax.fine) {
#pragma unroll
        for (int i = 1; i < 8; ++i) of[i + 1] = first + i < ax.fine ? of[i + 1] : of[i];
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sum[k] += weight * (of[2 * k] + of[2 * k + 3]) + 3.f * weight * (of[2 * k + 1] + of[2 * k + 2]);
      }
    }
  };
  const auto plane_sum = [&](int z, float(&sum)[width]) {
    const Stored* plane = start + min(max(z, 0), az.fine - 1) * plane_step;
#pragma unroll
    for (int k = 0; k < width; ++k) sum[k] = 0;
    if constexpr (halves_y) {
#pragma unroll
      for (int tap = 0; tap < 4; ++tap) {
        const int y = min(max(2 * part.row - 1 + tap, 0), ay.fine - 1);
        add_row(plane + int64_t{y} * task.row_stride, tap % 3 == 0 ? 1.f / 16 : 3.f / 16, sum);
      }
    } else {
      add_row(plane + int64_t{part.row} * task.row_stride, 1.f / 4, sum);
    }
  };

  if constexpr (!halves_z) {
#pragma unroll 1
    for (int z = part.begin; z < part.end; ++z) {
      float sum[width];
      plane_sum(z, sum);
      part.store(z, columns * part.column, sum);
    }
  } else {
    float open[width] = {};
#pragma unroll 1
    for (int z = part.begin; z <= part.end; ++z) {
      float behind[width], ahead[width];
      plane_sum(2 * z - 1, behind);
      plane_sum(2 * z, ahead);
#pragma unroll
      for (int k = 0; k < width; ++k) open[k] += 0.75f * behind[k] + 0.25f * ahead[k];
      if (z > part.begin) part.store(z - 1, columns * part.column, open);
#pragma unroll
      for (int k = 0; k < width; ++k) open[k] = 0.25f * behind[k] + 0.75f * ahead[k];
    }
  }
}

}  // namespace lungkit
