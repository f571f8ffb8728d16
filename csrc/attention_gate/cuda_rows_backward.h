// Backward of the half types: the forward pass again, as far as q, then everything that a run of voxels owes.
// The gradient of theta + up(phi) goes to memory once; cuda_adjoint.h turns it into phi's. The gradients of
// the weights are sums over the runs of a warp, then over the warps of a block, then over the blocks, always
// in the same order.
#pragma once

#include "cuda_rows_products.h"

namespace lungkit {

// A number that no device decides, so that every device adds in the same order.
constexpr int rows_backward_blocks = 528;

// (B, inner, z, y, x), or (B, z, y, x, inner) where x lies by voxel; phi's gradient itself where the grids
// are equal.
template <class Stored>
struct ThetaGradient {
  Stored* data;  // null: not asked for
  int64_t image_stride;
  int64_t channel_stride;  // of the first order
  int row_stride;
  int voxel_stride;  // of the second order; so many channels may be written
  bool pieces;       // of the first order: rows start on 16 bytes, and may be written up to the next ones
};

template <class Stored>
struct RowsGradients {
  const Stored* grad_out;    // in x's order; null: no gradient
  const Stored* grad_alpha;  // (B, voxels), likewise
  Stored* grad_x;            // null: not asked for
  float* partial;  // (blocks, Ci * Cx + Ci + 1): this block's grad_w_x, grad_w_psi, grad_b_psi; likewise
  VoxelLayout grad_out_layout;
  VoxelLayout grad_x_layout;
  ThetaGradient<Stored> theta;
};

template <class Stored, int size, bool by_voxel>
struct RowsBackwardShared {
  using Tile = RunTile<Stored, size, by_voxel>;
  struct Warp {
    alignas(16) Stored x[2][Tile::elements];
    alignas(16) Stored grad[2][Tile::elements];  // grad_out, then grad_x
    // phi's rows, until q is known.
    alignas(16) Stored theta[by_voxel ? 16 * size * inner_stride : PhiRows<Stored, size>::elements];
    alignas(16) float alpha[run_voxels];
    float dot[run_voxels];
    float grad_psi[run_voxels];
  };
  alignas(16) Stored w_x[RowWeights<Stored, size, by_voxel>::elements];
  Warp warp[row_warps];
};

// Whether a warp has the registers to load phi for its next run while it works on one.
template <int size>
constexpr bool loads_ahead = size == 1;

// Blocks whose shared memory fits a multiprocessor, before compute capability 9.0 and since: a kernel may use
// the registers that this leaves to it.
template <int size>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int rows_backward_resident = size == 1 ? 3 : 1;
#else
constexpr int rows_backward_resident = size == 1 ? 4 : 2;
#endif

template <class Stored, int size, bool by_voxel>
class RowsBackward {
 public:
  using Shared = RowsBackwardShared<Stored, size, by_voxel>;
  using Tile = typename Shared::Tile;
  using Products = RunProducts<Stored, size, by_voxel>;
  static constexpr int weight_stride = RowWeights<Stored, size, by_voxel>::stride;

  __device__ RowsBackward(const GateInputs<Stored>& in, const RowsGradients<Stored>& out, const RowGrid& grid,
                          Shared& shared)
      : in_(in),
        out_(out),
        grid_(grid),
        shared_(shared),
        own_(shared.warp[threadIdx.x / 32]),
        b_psi_(*in.b_psi) {
    RowWeights<Stored, size, by_voxel>::load(in, shared.w_x);
#pragma unroll
    for (int h = 0; h < 2 * size; ++h) {
      const int i = inner_of_row<size, by_voxel>(8 * h + g_);
      w_psi_[h] = i < in.inner() ? in.w_psi[i] : 0.f;
    }
    if (out.grad_out == nullptr) {
      Stored* const grad = &own_.grad[0][0];
#pragma unroll 1
      for (int k = lane_; k < 2 * Tile::elements; k += 32) grad[k] = Stored(0.f);
    }
    __syncthreads();
  }

  __device__ void add_runs() {
    const int step = gridDim.x * row_warps;
    int index = blockIdx.x * row_warps + threadIdx.x / 32, stage = 0;
    Run run = run_at(grid_, index);
    if (ahead_ && run.valid) phi_.load(in_, grid_, run);
    start(run, stage);
#pragma unroll 1
    while (run.valid) {
      index += step;
      const Run next = run_at(grid_, index);
      start(next, stage ^ 1);
      add(run, next, own_.x[stage], own_.grad[stage]);
      __syncwarp();  // before the next copies into this stage
      stage ^= 1;
      run = next;
    }
  }

  // What this block adds to the gradients of the weights, over the memory of the tiles.
  __device__ void write_partial(float* partial) {
    static_assert(sizeof(typename Shared::Warp) >= sizeof(float) * (16 * size * (32 * size + 1) + 1));
    constexpr int channels = 32 * size, width = 16 * size * (channels + 1) + 1;
    __syncthreads();
    float* of_warp = reinterpret_cast<float*>(&own_);
#pragma unroll
    for (int m = 0; m < size; ++m) {
#pragma unroll
      for (int n = 0; n < 4 * size; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = inner_of_row<size, by_voxel>(16 * m + lane_row(j));
          of_warp[i * channels + 8 * n + lane_column(j)] = grad_w_x_[m][n][j];
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2 * size; ++h) {
      const float sum = sum_over_columns(grad_w_psi_[h]);
      if (t_ == 0) of_warp[16 * size * channels + inner_of_row<size, by_voxel>(8 * h + g_)] = sum;
    }
    float sum = grad_b_psi_;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(all_lanes, sum, distance);
    if (lane_ == 0) of_warp[width - 1] = sum;
    __syncthreads();
    const int inner = in_.inner(), used = in_.x_channels();
    const auto total = [&](int at) {
      const auto of = [&](int warp) { return reinterpret_cast<const float*>(&shared_.warp[warp])[at]; };
      return (of(0) + of(1)) + (of(2) + of(3));
    };
#pragma unroll 1
    for (int k = threadIdx.x; k < inner * used; k += gate_threads) {
      partial[k] = total(k / used * channels + k % used);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i <= inner; i += gate_threads) {
      partial[inner * used + i] = total(i < inner ? 16 * size * channels + i : width - 1);
    }
  }

 private:
  __device__ void start(const Run& run, int stage) {
    if (run.valid) {
      const int first = first_voxel(grid_, run);
      load_run<Tile>(own_.x[stage], image_of(in_.x, in_.x_layout, run.image), first, run.count,
                     in_.x_channels(), grid_.x_pieces);
      if (out_.grad_out != nullptr) {
        load_run<Tile>(own_.grad[stage], image_of(out_.grad_out, out_.grad_out_layout, run.image), first,
                       run.count, in_.x_channels(), grid_.x_pieces);
      }
    }
    close_copies();
  }

  __device__ void add(const Run& run, const Run& next, const Stored* x, Stored* grad) {
    const int first = first_voxel(grid_, run), own = own_voxel();
    float total = 0;
    if (out_.grad_alpha != nullptr && own < run.count) {
      total = static_cast<float>(out_.grad_alpha[int64_t{run.image} * in_.voxels() + first + own]);
    }
    float q[size][4][4];
    if (!grid_.fast) {
      Products::template interpolate<false>(in_, grid_, run, q);
    } else if constexpr (by_voxel) {
      Products::template interpolate<true>(in_, grid_, run, q);
    } else {
      if constexpr (loads_ahead<size>) {
        phi_.put_down(own_.theta);
      } else {
        PhiRows<Stored, size> phi;
        phi.load(in_, grid_, run);
        phi.put_down(own_.theta);
      }
      __syncwarp();
      PhiRows<Stored, size>::interpolate(grid_, run, own_.theta, q);
    }
    wait_for_copies<1>();
    __syncwarp();
    float dot[4][4] = {};
    Products::template multiply<true>(shared_.w_x, x, grad, q, dot);
    keep_diagonal(dot);
    float psi[4][2] = {};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int m = 0; m < size; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) psi[n][j % 2] += w_psi_[2 * m + j / 2] * relu(q[m][n][j]);
      }
    }
    const float alpha = fast_sigmoid(sum_over_rows_of_run(psi) + b_psi_);
    __syncwarp();
    const float slope = own < run.count ? alpha * (1.f - alpha) * (total + own_.dot[own]) : 0.f;
    grad_b_psi_ += slope;
    own_.alpha[own] = alpha;
    own_.grad_psi[own] = slope;
    __syncwarp();

    uint32_t theta[size][4][2];
    differentiate(q, theta);
    if (ahead_ && next.valid) phi_.load(in_, grid_, next);  // q is gone
    __syncwarp();
    if (out_.theta.data != nullptr) {
      if constexpr (by_voxel) {
        store_theta_by_voxel(run, theta);
      } else {
        store_theta_by_channel(run);
      }
    }
    if (out_.partial != nullptr) add_grad_w_x(theta, x);
    if (out_.grad_x == nullptr) return;
    compute_grad_x(grad);
    __syncwarp();
    store_run<Tile>(grad, image_of(out_.grad_x, out_.grad_x_layout, run.image), first, run.count,
                    in_.x_channels(), grid_.x_pieces, [](int, int, Bytes16&) {});
  }

  __device__ void keep_diagonal(const float (&dot)[4][4]) const {
    if (t_ != g_ / 2) return;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int j = n % 2 * 2;
      own_.dot[8 * n + g_] = g_ % 2 ? dot[n][j + 1] : dot[n][j];
    }
  }

  // The gradient of theta + up(phi), in the lanes' registers and in shared memory, and w_psi's.
  __device__ void differentiate(const float (&q)[size][4][4], uint32_t (&theta)[size][4][2]) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float slope[2] = {own_.grad_psi[8 * n + 2 * t_], own_.grad_psi[8 * n + 2 * t_ + 1]};
#pragma unroll
      for (int m = 0; m < size; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float of[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float value = q[m][n][2 * h + j];
            grad_w_psi_[2 * m + h] += slope[j] * relu(value);
            of[j] = value > 0 ? w_psi_[2 * m + h] * slope[j] : 0.f;
          }
          theta[m][n][h] = pack<Stored>(of[0], of[1]);
          *reinterpret_cast<uint32_t*>(own_.theta + (16 * m + 8 * h + g_) * inner_stride + 8 * n + 2 * t_) =
              theta[m][n][h];
        }
      }
    }
  }

  __device__ Stored* theta_row(const Run& run) const {
    const ThetaGradient<Stored>& to = out_.theta;
    return to.data + run.image * to.image_stride + int64_t{run.z * grid_.y.axis.fine + run.y} * to.row_stride;
  }

  __device__ void store_theta_by_voxel(const Run& run, const uint32_t (&theta)[size][4][2]) const {
    using Words = InnerWords<size>;
    const int step = out_.theta.voxel_stride, channel = inner_of_row<size, by_voxel>(g_);
    if (channel >= step) return;
    Stored* const target = theta_row(run) + (run.x + 2 * t_) * step + channel;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Words words;
#pragma unroll
        for (int m = 0; m < size; ++m) words.word[m] = pair_of_halves(theta[m][n][0], theta[m][n][1], j);
        if (8 * n + 2 * t_ + j < run.count) *reinterpret_cast<Words*>(target + (8 * n + j) * step) = words;
      }
    }
  }

  __device__ void store_theta_by_channel(const Run& run) const {
    const ThetaGradient<Stored>& to = out_.theta;
    const int row = lane_ / 4, column = lane_ % 4 * 8;
    if (column >= run.count) return;
    Stored* target = theta_row(run) + row * to.channel_stride + run.x + column;
    if (to.pieces) {
#pragma unroll
      for (int h = 0; h < 2 * size; ++h, target += 8 * to.channel_stride) {
        if (8 * h + row >= in_.inner()) break;
        *reinterpret_cast<Bytes16*>(target) =
            *reinterpret_cast<const Bytes16*>(own_.theta + (8 * h + row) * inner_stride + column);
      }
      return;
    }
#pragma unroll 1
    for (int i = row; i < in_.inner(); i += 8, target += 8 * to.channel_stride) {
#pragma unroll 1
      for (int k = 0; k < min(8, run.count - column); ++k) {
        target[k] = own_.theta[i * inner_stride + column + k];
      }
    }
  }

  // grad = alpha grad_out + W_x^T grad_theta, in place.
  __device__ void compute_grad_x(Stored* grad) const {
    constexpr int row_blocks = Tile::rows / 16, column_pairs = Tile::columns / 16;
#pragma unroll
    for (int r = 0; r < row_blocks; ++r) {
      uint32_t a[size][4];
#pragma unroll
      for (int m = 0; m < size; ++m) {
        if constexpr (by_voxel) {
          load_a<true>(a[m], own_.theta, inner_stride, 16 * r, 16 * m);
        } else {
          load_a<true>(a[m], shared_.w_x, weight_stride, 16 * r, 16 * m);
        }
      }
#pragma unroll
      for (int c = 0; c < column_pairs; ++c) {
        float sum[2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = 16 * r + 8 * h + g_, column = 16 * c + 8 * n + 2 * t_;
            const float2 pair =
                unpack<Stored>(*reinterpret_cast<const uint32_t*>(grad + row * Tile::stride + column));
            sum[n][2 * h] = own_.alpha[by_voxel ? row : column] * pair.x;
            sum[n][2 * h + 1] = own_.alpha[by_voxel ? row : column + 1] * pair.y;
          }
        }
#pragma unroll
        for (int m = 0; m < size; ++m) {
          uint32_t b[2][2];
          if constexpr (by_voxel) {
            load_b<true>(b, shared_.w_x, weight_stride, 16 * m, 16 * c);
          } else {
            load_b<true>(b, own_.theta, inner_stride, 16 * m, 16 * c);
          }
#pragma unroll
          for (int n = 0; n < 2; ++n) multiply_add<Stored>(sum[n], a[m], b[n]);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = 16 * r + 8 * h + g_, column = 16 * c + 8 * n + 2 * t_;
            *reinterpret_cast<uint32_t*>(grad + row * Tile::stride + column) =
                pack<Stored>(sum[n][2 * h], sum[n][2 * h + 1]);
          }
        }
      }
    }
  }

  // The depth of this product is the voxels: the lanes hold grad_theta as its left operand already.
  __device__ void add_grad_w_x(const uint32_t (&theta)[size][4][2], const Stored* x) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
#pragma unroll
      for (int c = 0; c < 2 * size; ++c) {
        uint32_t b[2][2];
        load_b<by_voxel>(b, x, Tile::stride, 16 * v, 16 * c);
#pragma unroll
        for (int m = 0; m < size; ++m) {
          const uint32_t a[4] = {theta[m][2 * v][0], theta[m][2 * v][1], theta[m][2 * v + 1][0],
                                 theta[m][2 * v + 1][1]};
#pragma unroll
          for (int n = 0; n < 2; ++n) multiply_add<Stored>(grad_w_x_[m][2 * c + n], a, b[n]);
        }
      }
    }
  }

  const GateInputs<Stored>& in_;
  const RowsGradients<Stored>& out_;
  const RowGrid& grid_;
  Shared& shared_;
  typename Shared::Warp& own_;
  const float b_psi_;
  const int lane_ = threadIdx.x % 32, g_ = lane_ / 4, t_ = lane_ % 4;
  // Of the next run, of features by channel.
  const bool ahead_ = loads_ahead<size> && !by_voxel && grid_.fast;
  PhiRows<Stored, size> phi_;
  float w_psi_[2 * size];
  float grad_w_x_[size][4 * size][4] = {};
  float grad_w_psi_[2 * size] = {};
  float grad_b_psi_ = 0;
};

template <class Stored, int size, bool by_voxel>
__global__ void __launch_bounds__(gate_threads, rows_backward_resident<size>)
    gate_rows_backward_kernel(GateInputs<Stored> in, RowsGradients<Stored> out, RowGrid grid) {
  using Shared = RowsBackwardShared<Stored, size, by_voxel>;
  LUNGKIT_DYNAMIC_SHARED(Shared, shared);
  RowsBackward<Stored, size, by_voxel> backward(in, out, grid, *shared);
  backward.add_runs();
  const int64_t width = static_cast<int64_t>(in.inner()) * in.x_channels() + in.inner() + 1;
  if (out.partial != nullptr) backward.write_partial(out.partial + blockIdx.x * width);
}

}  // namespace lungkit
