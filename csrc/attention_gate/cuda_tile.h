// Device code of the kernels for float32: a tile of 128 voxels in shared memory, one voxel a row of the
// block's 128 threads, one run of 32 voxels a warp; the product of a warp; and up(phi) of one element.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../support/cuda_tensor_cores.h"
#include "../support/dispatch.h"
#include "../support/layout.h"
#include "interpolation.h"

namespace lungkit {

constexpr int gate_threads = 128;
constexpr int tile_voxels = 128;
constexpr int warp_voxels = 32;
// Positions within one image are ints, which divide fast; offsets in memory are 64 bits wide.
constexpr int64_t max_image_voxels = INT64_C(0x7fffffff) - tile_voxels;
constexpr int64_t max_axis = 0x7fff;
using GateAxis = LinearAxis<int>;

constexpr unsigned all_lanes = 0xffffffffu;

// The product works in blocks of 16 rows and a depth of 16; tiles are padded with zeros up to them.
__host__ __device__ constexpr int padded16(int n) {
  return (n + 15) / 16 * 16;
}

// A row of a tile takes 16 bytes more than its voxels, so that rows start in different banks.
template <class Stored>
constexpr int tile_stride = tile_voxels + 16 / static_cast<int>(sizeof(Stored));
template <class Stored>
__host__ __device__ constexpr int weight_stride(int channels) {
  return padded16(channels) + 16 / static_cast<int>(sizeof(Stored));
}

// float32 in memory, whose products go through the tensor cores: operands lose 13 bits of their mantissa
// there.
struct Tf32 {
  Tf32() = default;
  __host__ __device__ explicit Tf32(float x) : value(x) {}
  __host__ __device__ operator float() const { return value; }
  float value;
};

template <class Stored>
struct Features {
  Stored* data;  // of the image
  int64_t channel_stride;
  int64_t voxel_stride;
  __device__ Stored* at(int channel, int voxel) const {
    return data + channel * channel_stride + voxel * voxel_stride;
  }
};

// What both kernels know of the problem.
template <class Stored>
struct GateInputs {
  const Stored* x;
  const Stored* phi;
  VoxelLayout x_layout;
  VoxelLayout phi_layout;
  GateAxis axes[3];    // z, y, x
  const float* w_x;    // (Ci, Cx)
  const float* w_psi;  // (Ci,)
  const float* b_psi;

  __host__ __device__ int x_channels() const { return static_cast<int>(x_layout.channels); }
  __host__ __device__ int inner() const { return static_cast<int>(phi_layout.channels); }
  __host__ __device__ int voxels() const { return static_cast<int>(x_layout.voxels); }
  __host__ __device__ int images() const { return static_cast<int>(x_layout.batch); }
};

template <class Stored>
__device__ Features<Stored> image_of(Stored* data, const VoxelLayout& layout, int image) {
  return {data + image * layout.batch_stride, layout.channel_stride, layout.voxel_stride};
}

inline __device__ bool on_16_bytes(const void* address) {
  return (reinterpret_cast<uintptr_t>(address) & 15) == 0;
}

// tile[c][v], v < 128, from `count` voxels after `first`; zeros beyond them and beyond the channels.
template <class Stored>
__device__ void load_tile(Stored* tile, const Features<const Stored>& from, int first, int count,
                          int channels) {
  constexpr int stride = tile_stride<Stored>;
  const int rows = padded16(channels);
  if (from.voxel_stride == 1) {
    constexpr int width = 16 / sizeof(Stored), pieces = tile_voxels / width;
    for (int k = threadIdx.x; k < rows * pieces; k += gate_threads) {
      const int c = k / pieces, v = k % pieces * width;
      const Stored* source = from.at(c, first + v);
      Stored* to = tile + c * stride + v;
      if (c < channels && v + width <= count && on_16_bytes(source)) {
        *reinterpret_cast<Bytes16*>(to) = *reinterpret_cast<const Bytes16*>(source);
      } else {
        for (int i = 0; i < width; ++i) to[i] = c < channels && v + i < count ? source[i] : Stored(0.f);
      }
    }
  } else {
    for (int k = threadIdx.x; k < rows * tile_voxels; k += gate_threads) {
      const int c = k % rows, v = k / rows;
      tile[c * stride + v] = c < channels && v < count ? *from.at(c, first + v) : Stored(0.f);
    }
  }
}

// Writes value(c, v) to `count` voxels after `first`, in the order that memory likes.
template <class Stored, class Value>
__device__ void store_tile(const Features<Stored>& to, int first, int count, int channels,
                           const Value& value) {
  if (to.voxel_stride == 1) {
    constexpr int width = 16 / sizeof(Stored), pieces = tile_voxels / width;
    for (int k = threadIdx.x; k < channels * pieces; k += gate_threads) {
      const int c = k / pieces, v = k % pieces * width;
      Stored* target = to.at(c, first + v);
      if (v + width <= count && on_16_bytes(target)) {
        alignas(16) Stored piece[width];
        for (int i = 0; i < width; ++i) piece[i] = value(c, v + i);
        Bytes16 bytes;
        memcpy(&bytes, piece, sizeof bytes);
        *reinterpret_cast<Bytes16*>(target) = bytes;
      } else {
        for (int i = 0; i < width && v + i < count; ++i) target[i] = value(c, v + i);
      }
    }
  } else {
    for (int k = threadIdx.x; k < channels * count; k += gate_threads) {
      const int c = k % channels, v = k / channels;
      *to.at(c, first + v) = value(c, v);
    }
  }
}

// A matrix in shared memory, either way round.
template <class Stored>
struct SharedMatrix {
  const Stored* data;
  int row;     // elements from one row to the next
  int column;  // and from one column to the next
};

// Which element of a 16 x 8 block a lane holds as its number j, 0 <= j < 4: the layout of the tensor cores'
// mma.
inline __device__ int lane_row(int j) {
  return static_cast<int>(threadIdx.x % 32 / 4) + 8 * (j / 2);
}
inline __device__ int lane_column(int j) {
  return static_cast<int>(threadIdx.x % 4) * 2 + j % 2;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define LUNGKIT_HAS_MMA 1
#else
#define LUNGKIT_HAS_MMA 0
#endif

#if LUNGKIT_HAS_MMA

__device__ inline uint32_t rounded_to_tf32(Tf32 x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x.value));
  return bits;
}

// sum += A B for one 16 x 8 block of A and one 8 x 8 block of B.
__device__ inline void mma_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

// sum[n] += A B_n for the `blocks` 16 x 8 blocks B_n of B, `next` columns apart, over `depth`, a multiple
// of 16. One call of a whole warp. Tf32 goes through the tensor cores where there are any; float, and the
// emulator, multiply element by element in float.
template <int blocks, class Stored>
__device__ void multiply_add(float (&sum)[blocks][4], SharedMatrix<Stored> a, SharedMatrix<Stored> b,
                             int next, int depth) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#if LUNGKIT_HAS_MMA
  if constexpr (std::is_same_v<Stored, Tf32>) {
#pragma unroll 1
    for (int k = 0; k < depth; k += 8) {
      const Tf32* from = a.data + g * a.row + (k + t) * a.column;
      const uint32_t left[4] = {rounded_to_tf32(from[0]), rounded_to_tf32(from[8 * a.row]),
                                rounded_to_tf32(from[4 * a.column]),
                                rounded_to_tf32(from[8 * a.row + 4 * a.column])};
#pragma unroll
      for (int n = 0; n < blocks; ++n) {
        const Tf32* right = b.data + (k + t) * b.row + (n * next + g) * b.column;
        const uint32_t pair[2] = {rounded_to_tf32(right[0]), rounded_to_tf32(right[4 * b.row])};
        mma_tf32(sum[n], left, pair);
      }
    }
    return;
  }
#endif
  const Stored* left = a.data + g * a.row;
  const Stored* right = b.data + 2 * t * b.column;
#pragma unroll 2
  for (int k = 0; k < depth; ++k) {
    const float low = static_cast<float>(left[k * a.column]);
    const float high = static_cast<float>(left[8 * a.row + k * a.column]);
#pragma unroll
    for (int n = 0; n < blocks; ++n) {
      const float first = static_cast<float>(right[k * b.row + n * next * b.column]);
      const float second = static_cast<float>(right[k * b.row + (n * next + 1) * b.column]);
      sum[n][0] += low * first;
      sum[n][1] += low * second;
      sum[n][2] += high * first;
      sum[n][3] += high * second;
    }
  }
}

// Where one voxel of x reads phi.
struct Corner {
  int voxel;  // of phi's grid, the lower one along every axis
  int x;      // its position along x
  float wz, wy, wx;
};

inline __device__ Corner corner_of(const GateAxis (&axes)[3], int voxel) {
  const int row = voxel / axes[2].fine, x = voxel % axes[2].fine;
  const int z = row / axes[1].fine, y = row % axes[1].fine;
  const int low_x = axes[2].lower(x);
  return {(axes[0].lower(z) * axes[1].coarse + axes[1].lower(y)) * axes[2].coarse + low_x, low_x,
          axes[0].weight<float>(z), axes[1].weight<float>(y), axes[2].weight<float>(x)};
}

// up(phi) of one inner channel at one voxel.
template <class Stored>
__device__ float interpolate(const Features<const Stored>& phi, const GateAxis (&axes)[3], int channel,
                             const Corner& corner) {
  const Stored* from = phi.at(channel, corner.voxel);
  const int64_t dx = corner.wx != 0 ? phi.voxel_stride : 0;
  const int64_t dy = corner.wy != 0 ? phi.voxel_stride * axes[2].coarse : 0;
  const int64_t dz = corner.wz != 0 ? phi.voxel_stride * axes[2].coarse * axes[1].coarse : 0;
  const auto along_x = [&](const Stored* at) {
    const float low = static_cast<float>(at[0]);
    return low + corner.wx * (static_cast<float>(at[dx]) - low);
  };
  const auto along_y = [&](const Stored* at) {
    const float low = along_x(at);
    return low + corner.wy * (along_x(at + dy) - low);
  };
  const float low = along_y(from);
  return low + corner.wz * (along_y(from + dz) - low);
}

// q = relu(theta + up(phi)) of 16 inner channels from `first_inner` on at 8 voxels of the tile from
// `first_voxel` on, spread over the lanes of a warp; 0 beyond the last inner channel.
template <class Stored>
__device__ void compute_q(const GateInputs<Stored>& in, const Features<const Stored>& phi, const Stored* w_x,
                          const Stored* x, const Corner* corners, int first_inner, int first_voxel,
                          float (&q)[4]) {
  const int stride = weight_stride<Stored>(in.x_channels());
  float theta[1][4] = {};
  multiply_add<1, Stored>(theta, {w_x + first_inner * stride, stride, 1},
                          {x + first_voxel, tile_stride<Stored>, 1}, 0, padded16(in.x_channels()));
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = first_inner + lane_row(j);
    q[j] = 0;
    if (row >= in.inner()) continue;
    const float sum = theta[0][j] + interpolate(phi, in.axes, row, corners[first_voxel + lane_column(j)]);
    q[j] = sum < 0 ? 0.f : sum;  // keeps NaN
  }
}

// W_x with zeros around it, and w_psi likewise, in shared memory.
template <class Stored>
__device__ void load_weights(const GateInputs<Stored>& in, Stored* w_x, float* w_psi) {
  const int channels = in.x_channels(), inner = in.inner(), stride = weight_stride<Stored>(channels);
  for (int k = threadIdx.x; k < padded16(inner) * stride; k += gate_threads) {
    const int i = k / stride, c = k % stride;
    w_x[k] = static_cast<Stored>(i < inner && c < channels ? in.w_x[i * channels + c] : 0.f);
  }
  for (int i = threadIdx.x; i < padded16(inner); i += gate_threads) w_psi[i] = i < inner ? in.w_psi[i] : 0.f;
}

// Sum over the lanes that hold different rows of the same columns; every lane gets it.
inline __device__ float sum_over_rows(float value) {
  value += __shfl_xor_sync(all_lanes, value, 4);
  value += __shfl_xor_sync(all_lanes, value, 8);
  return value + __shfl_xor_sync(all_lanes, value, 16);
}

// Sum over the lanes that hold different columns of the same rows.
inline __device__ float sum_over_columns(float value) {
  value += __shfl_xor_sync(all_lanes, value, 1);
  return value + __shfl_xor_sync(all_lanes, value, 2);
}

inline __device__ float sigmoid(float x) {
  return 1.f / (1.f + expf(-x));
}

}  // namespace lungkit
