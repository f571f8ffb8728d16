// Backward of float32: one block owns a box of phi's grid and takes every voxel of x that reads it, so that
// the gradient of phi is a sum that one block makes in one order. Voxels that read two boxes are computed
// twice; one of the two, the box that holds the lower corner, also owns the voxel: its gradient of x and its
// part in the gradients of the weights.
#pragma once

#include "cuda_tile.h"

namespace lungkit {

// How the blocks share the work. `interpolates`: the boxes are cut from phi's grid along z, y and x;
// otherwise (equal grids, or no gradient of phi asked for) they are runs of box[2] voxels.
struct BoxGrid {
  bool interpolates = false;
  int box[3] = {};
  int boxes[3] = {};
  __host__ __device__ int per_image() const { return boxes[0] * boxes[1] * boxes[2]; }
};

template <class Stored>
struct GateGradients {
  const Stored* grad_out;    // null: no gradient
  const Stored* grad_alpha;  // (B, voxels), likewise
  Stored* grad_x;            // null: not asked for
  Stored* grad_phi;          // likewise
  float* partial;            // (blocks, Ci * Cx + Ci + 1): this block's grad_w_x, grad_w_psi, grad_b_psi
  VoxelLayout grad_out_layout;
  VoxelLayout grad_x_layout;
  VoxelLayout grad_phi_layout;
};

struct Range {
  int first;
  int last;
  __device__ bool holds(int k) const { return first <= k && k < last; }
  __device__ int size() const { return last - first; }
};

// What a voxel of the tile reads and owes.
struct VoxelState {
  float alpha;
  float grad_alpha;
  bool owned;
};

template <class Stored>
struct GateBackwardShared {
  __device__ GateBackwardShared(unsigned char* memory, int channels, int inner, int box_width)
      : corners(reinterpret_cast<Corner*>(memory)),
        voxels(reinterpret_cast<VoxelState*>(corners + tile_voxels)),
        w_psi(reinterpret_cast<float*>(voxels + tile_voxels)),
        first_x(reinterpret_cast<int*>(w_psi + padded16(inner))),
        w_x(reinterpret_cast<Stored*>(first_x + (box_width + 3 + 3) / 4 * 4)),
        x(w_x + padded16(inner) * weight_stride<Stored>(channels)),
        grad(x + padded16(channels) * tile_stride<Stored>),
        grad_theta(grad + padded16(channels) * tile_stride<Stored>),
        planes(reinterpret_cast<float*>(grad_theta + padded16(inner) * tile_stride<Stored>)) {}

  static size_t bytes(int channels, int inner, const BoxGrid& grid) {
    const int plane = grid.interpolates ? 2 * inner * grid.box[1] * grid.box[2] : 0;
    const int width = grid.interpolates ? grid.box[2] : 0;
    return tile_voxels * (sizeof(Corner) + sizeof(VoxelState)) + sizeof(float) * padded16(inner) +
           sizeof(int) * ((width + 3 + 3) / 4 * 4) +
           sizeof(Stored) *
               (padded16(inner) * weight_stride<Stored>(channels) +
                (2 * padded16(channels) + padded16(inner)) * tile_stride<Stored>)+sizeof(float) *
               plane;
  }

  Corner* corners;
  VoxelState* voxels;
  float* w_psi;
  int* first_x;  // first_x[k]: the first position along x that reads column box.first - 1 + k
  Stored* w_x;
  Stored* x;
  Stored* grad;        // grad_out, then grad_x
  Stored* grad_theta;  // gradient of theta + up(phi)
  float* planes;       // two open planes of phi's gradient, (2, Ci, box y, box x)
};

// `size` 1 or 2: at most 32 * size channels and 16 * size inner channels.
template <class Stored, int size>
class GateBackward {
 public:
  __device__ GateBackward(const GateInputs<Stored>& in, const GateGradients<Stored>& out, const BoxGrid& grid,
                          unsigned char* memory)
      : in_(in),
        out_(out),
        grid_(grid),
        channels_(in.x_channels()),
        inner_(in.inner()),
        shared_(memory, channels_, inner_, grid.interpolates ? grid.box[2] : 0),
        b_psi_(*in.b_psi) {
    load_weights(in, shared_.w_x, shared_.w_psi);
  }

  __device__ void add_box(int index) {
    image_ = index / grid_.per_image();
    const int box = index % grid_.per_image();
    if (!grid_.interpolates) {
      const int end = min((box + 1) * grid_.box[2], in_.voxels());
      for (int v = box * grid_.box[2]; v < end; v += tile_voxels) add_tile(v, min(end - v, tile_voxels));
      return;
    }
    const int at[3] = {box / grid_.boxes[2] / grid_.boxes[1], box / grid_.boxes[2] % grid_.boxes[1],
                       box % grid_.boxes[2]};
    Range reads[3];
    for (int d = 0; d < 3; ++d) {
      const GateAxis& axis = in_.axes[d];
      box_[d] = {at[d] * grid_.box[d], min((at[d] + 1) * grid_.box[d], axis.coarse)};
      // Positions whose lower corner lies one before the box read it too; along equal axes none does.
      const int before = axis.fine == axis.coarse ? 0 : 1;
      reads[d] = {axis.first_reading(box_[d].first - before), axis.first_reading(box_[d].last)};
    }
    open_box();
    const bool whole_rows = grid_.boxes[2] == 1;
    for (int z = reads[0].first; z < reads[0].last; ++z) {
      for (; open_ < in_.axes[0].lower(z); ++open_) store_plane(open_);
      const int plane = z * in_.axes[1].fine;
      if (whole_rows) {
        add_run((plane + reads[1].first) * in_.axes[2].fine, (plane + reads[1].last) * in_.axes[2].fine);
      } else {
        for (int y = reads[1].first; y < reads[1].last; ++y) {
          const int row = (plane + y) * in_.axes[2].fine;
          add_run(row + reads[2].first, row + reads[2].last);
        }
      }
    }
    for (; open_ < box_[0].last; ++open_) store_plane(open_);
  }

  // What this block adds to the gradients of the weights.
  __device__ void write_partial(float* partial) {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < size; ++m) {
#pragma unroll
      for (int n = 0; n < size; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = 16 * m + lane_row(j), c = 8 * (warp + 4 * n) + lane_column(j);
          if (i < inner_ && c < channels_) partial[i * channels_ + c] = grad_w_x_[m][n][0][j];
        }
      }
    }
    // Lanes of one row, then warps, in a fixed order.
    float* sums = reinterpret_cast<float*>(shared_.corners);  // (4 warps, padded16(Ci) + 1)
    const int width = padded16(inner_) + 1;
    static_assert(4 * (64 + 1) * sizeof(float) <= tile_voxels * sizeof(Corner));
    __syncthreads();
#pragma unroll
    for (int m = 0; m < size; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = sum_over_columns(grad_w_psi_[m][h]);
        const int row = 16 * m + lane_row(2 * h);
        if (threadIdx.x % 4 == 0 && row < inner_) sums[warp * width + row] = sum;
      }
    }
    float sum = grad_b_psi_;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(all_lanes, sum, step);
    if (threadIdx.x % 32 == 0) sums[warp * width + width - 1] = sum;
    __syncthreads();
    for (int i = threadIdx.x; i <= inner_; i += gate_threads) {
      const int at = i < inner_ ? i : width - 1;
      partial[inner_ * channels_ + i] =
          (sums[at] + sums[width + at]) + (sums[2 * width + at] + sums[3 * width + at]);
    }
  }

 private:
  __device__ void open_box() {
    __syncthreads();
    const int plane = 2 * inner_ * box_[1].size() * box_[2].size();
    for (int k = threadIdx.x; k < plane; k += gate_threads) shared_.planes[k] = 0;
    for (int k = threadIdx.x; k < box_[2].size() + 3; k += gate_threads) {
      shared_.first_x[k] = in_.axes[2].first_reading(box_[2].first - 1 + k);
    }
    open_ = box_[0].first;
  }

  __device__ void add_run(int first, int last) {
    for (int v = first; v < last; v += tile_voxels) add_tile(v, min(last - v, tile_voxels));
  }

  __device__ void add_tile(int first, int count) {
    __syncthreads();
    load_tile(shared_.x, image_of(in_.x, in_.x_layout, image_), first, count, channels_);
    if (out_.grad_out != nullptr) {
      load_tile(shared_.grad, image_of(out_.grad_out, out_.grad_out_layout, image_), first, count, channels_);
    }
    const int own = threadIdx.x;
    shared_.corners[own] = corner_of(in_.axes, first + min(own, count - 1));
    shared_.voxels[own].owned = own < count && is_owned(shared_.corners[own]);
    const int owned = __syncthreads_count(shared_.voxels[own].owned);
    compute_grad_alpha(first, count);
    __syncwarp();
    compute_grad_theta();
    __syncthreads();
    if (out_.grad_phi != nullptr) {
      if (grid_.interpolates) {
        add_to_planes(first, count);
      } else {
        store_tile(image_of(out_.grad_phi, out_.grad_phi_layout, image_), first, count, inner_,
                   [&](int i, int v) { return shared_.grad_theta[i * tile_stride<Stored> + v]; });
      }
    }
    if (owned == 0) return;
    if (out_.grad_x != nullptr) compute_grad_x();
    if (owned < count) forget_x_of_others();
    __syncthreads();
    if (out_.grad_x != nullptr) store_grad_x(first, count, owned == count);
    if (out_.partial != nullptr) add_grad_w_x();
  }

  __device__ bool is_owned(const Corner& corner) const {
    if (!grid_.interpolates) return true;
    const int row = corner.voxel / in_.axes[2].coarse;
    return box_[0].first <= row / in_.axes[1].coarse && box_[1].first <= row % in_.axes[1].coarse &&
           box_[2].first <= corner.x;
  }

  // Sum of grad_out * x over the channels, and grad_alpha: one voxel a thread.
  __device__ void compute_grad_alpha(int first, int count) {
    constexpr int tile = tile_stride<Stored>;
    const int v = threadIdx.x;
    float sum = 0;
    if (out_.grad_out != nullptr) {
      for (int c = 0; c < channels_; ++c) {
        sum += static_cast<float>(shared_.grad[c * tile + v]) * static_cast<float>(shared_.x[c * tile + v]);
      }
    }
    if (out_.grad_alpha != nullptr && v < count) {
      sum += static_cast<float>(out_.grad_alpha[int64_t{image_} * in_.voxels() + first + v]);
    }
    shared_.voxels[v].grad_alpha = v < count ? sum : 0.f;
  }

  // The forward pass again, as far as q and alpha, then back to theta. Each warp takes its own 32 voxels, 8
  // at a time.
  __device__ void compute_grad_theta() {
    const int warp_first = threadIdx.x / 32 * warp_voxels;
    const Features<const Stored> phi = image_of(in_.phi, in_.phi_layout, image_);
#pragma unroll 1
    for (int v = warp_first; v < warp_first + warp_voxels; v += 8) {
      float q[size][4];
      float grad_psi[2] = {};
#pragma unroll
      for (int m = 0; m < size; ++m) {
        if (16 * m >= inner_) continue;
        compute_q(in_, phi, shared_.w_x, shared_.x, shared_.corners, 16 * m, v, q[m]);
#pragma unroll
        for (int j = 0; j < 4; ++j) grad_psi[j % 2] += shared_.w_psi[16 * m + lane_row(j)] * q[m][j];
      }
      float owned[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        VoxelState& voxel = shared_.voxels[v + lane_column(j)];
        const float alpha = sigmoid(sum_over_rows(grad_psi[j]) + b_psi_);
        voxel.alpha = alpha;
        grad_psi[j] = alpha * (1 - alpha) * voxel.grad_alpha;
        owned[j] = voxel.owned ? grad_psi[j] : 0.f;
        if (threadIdx.x % 32 < 4) grad_b_psi_ += owned[j];
      }
#pragma unroll
      for (int m = 0; m < size; ++m) {
        if (16 * m >= inner_) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = 16 * m + lane_row(j);
          grad_w_psi_[m][j / 2] += owned[j % 2] * q[m][j];
          shared_.grad_theta[row * tile_stride<Stored> + v + lane_column(j)] =
              static_cast<Stored>(q[m][j] > 0 ? shared_.w_psi[row] * grad_psi[j % 2] : 0.f);
        }
      }
    }
  }

  // grad = alpha grad_out + W_x^T grad_theta, in place; each warp its own 32 voxels.
  __device__ void compute_grad_x() {
    constexpr int tile = tile_stride<Stored>;
    const int stride = weight_stride<Stored>(channels_), warp_first = threadIdx.x / 32 * warp_voxels;
    for (int c = 0; c < channels_; c += 16) {
      float sum[4][4] = {};
      multiply_add<4, Stored>(sum, {shared_.w_x + c, 1, stride}, {shared_.grad_theta + warp_first, tile, 1},
                              8, padded16(inner_));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int v = warp_first + 8 * n + lane_column(j);
          Stored& grad = shared_.grad[(c + lane_row(j)) * tile + v];
          const float direct =
              out_.grad_out != nullptr ? shared_.voxels[v].alpha * static_cast<float>(grad) : 0.f;
          grad = static_cast<Stored>(direct + sum[n][j]);
        }
      }
    }
  }

  // A voxel of another box has no part in the gradient of the weights: its x becomes 0 before that product.
  __device__ void forget_x_of_others() const {
    if (shared_.voxels[threadIdx.x].owned) return;
    for (int c = 0; c < channels_; ++c) shared_.x[c * tile_stride<Stored> + threadIdx.x] = Stored(0.f);
  }

  // The voxels that the block owns are written; those of other boxes are written there.
  __device__ void store_grad_x(int first, int count, bool all_owned) const {
    const Features<Stored> to = image_of(out_.grad_x, out_.grad_x_layout, image_);
    const auto value = [&](int c, int v) { return shared_.grad[c * tile_stride<Stored> + v]; };
    if (all_owned) return store_tile(to, first, count, channels_, value);
    for (int k = threadIdx.x; k < channels_ * tile_voxels; k += gate_threads) {
      const int c = k / tile_voxels, v = k % tile_voxels;
      if (shared_.voxels[v].owned) *to.at(c, first + v) = value(c, v);
    }
  }

  __device__ void add_grad_w_x() {
    constexpr int tile = tile_stride<Stored>;
    const int first_channel = 8 * (threadIdx.x / 32);
#pragma unroll
    for (int m = 0; m < size; ++m) {
      if (16 * m >= inner_) continue;
#pragma unroll
      for (int n = 0; n < size; ++n) {
        const int c = first_channel + 32 * n;
        if (c >= channels_) continue;
        multiply_add<1, Stored>(grad_w_x_[m][n], {shared_.grad_theta + 16 * m * tile, tile, 1},
                                {shared_.x + c * tile, 1, tile}, 0, tile_voxels);
      }
    }
  }

  // The adjoint of the interpolation: every element of the open planes gathers from the tile, one row of x's
  // grid after the other. A thread keeps to its own elements, so that no two add to the same.
  __device__ void add_to_planes(int first, int count) const {
    const int width = in_.axes[2].fine;
    for (int begin = 0; begin < count;) {
      const int row = (first + begin) / width, x = (first + begin) % width;
      const int end = min(count, begin + width - x);
      const int z = row / in_.axes[1].fine, y = row % in_.axes[1].fine;
      const Corner& left = shared_.corners[begin];
      const Range columns{max(box_[2].first, left.x), min(box_[2].last, shared_.corners[end - 1].x + 2)};
      for (int k = columns.first + threadIdx.x % 32; k < columns.last; k += 32) {
        const int in_box = k - box_[2].first;
        const int from = max(begin, begin + shared_.first_x[in_box] - x);
        const int to = min(end, begin + shared_.first_x[in_box + 2] - x);
        for (int i = threadIdx.x / 32; i < inner_; i += gate_threads / 32) {
          float sum = 0;
          for (int v = from; v < to; ++v) {
            const Corner& corner = shared_.corners[v];
            const float weight = corner.x == k ? 1 - corner.wx : corner.wx;
            sum += weight * static_cast<float>(shared_.grad_theta[i * tile_stride<Stored> + v]);
          }
          add_to_rows(i, in_.axes[0].lower(z), in_.axes[1].lower(y), in_box, left.wz, left.wy, sum);
        }
      }
      begin = end;
    }
  }

  __device__ void add_to_rows(int i, int z, int y, int x, float wz, float wy, float sum) const {
    for (int dz = 0; dz < 2; ++dz) {
      const float weight_z = dz ? wz : 1 - wz;
      if (weight_z == 0 || !box_[0].holds(z + dz)) continue;
      for (int dy = 0; dy < 2; ++dy) {
        const float weight = weight_z * (dy ? wy : 1 - wy);
        if (weight == 0 || !box_[1].holds(y + dy)) continue;
        *element(z + dz, i, y + dy - box_[1].first, x) += weight * sum;
      }
    }
  }

  __device__ float* element(int z, int i, int y, int x) const {
    return shared_.planes + ((z & 1) * inner_ + i) * box_[1].size() * box_[2].size() + y * box_[2].size() + x;
  }

  __device__ void store_plane(int z) const {
    const Features<Stored> to = image_of(out_.grad_phi, out_.grad_phi_layout, image_);
    const int columns = box_[2].size(), rows = box_[1].size();
    __syncthreads();
    for (int k = threadIdx.x; k < inner_ * rows * columns; k += gate_threads) {
      const int i = k / (rows * columns), y = k / columns % rows, x = k % columns;
      const int voxel = (z * in_.axes[1].coarse + box_[1].first + y) * in_.axes[2].coarse + box_[2].first + x;
      float* sum = element(z, i, y, x);
      *to.at(i, voxel) = static_cast<Stored>(*sum);
      *sum = 0;
    }
    __syncthreads();
  }

  const GateInputs<Stored>& in_;
  const GateGradients<Stored>& out_;
  const BoxGrid& grid_;
  const int channels_;
  const int inner_;
  const GateBackwardShared<Stored> shared_;
  const float b_psi_;
  int image_ = 0;
  int open_ = 0;  // the first plane of phi that is not stored yet
  Range box_[3] = {};
  float grad_w_x_[size][size][1][4] = {};  // blocks of 16 x 8; a warp has every fourth block of columns
  float grad_w_psi_[size][2] = {};
  float grad_b_psi_ = 0;
};

template <class Stored, int size>
__global__ void __launch_bounds__(gate_threads, 2)
    gate_boxes_backward_kernel(GateInputs<Stored> in, GateGradients<Stored> out, BoxGrid grid) {
  LUNGKIT_DYNAMIC_SHARED(unsigned char, memory);
  GateBackward<Stored, size> backward(in, out, grid, memory);
  const int boxes = grid.per_image() * in.images();
  for (int box = blockIdx.x; box < boxes; box += gridDim.x) backward.add_box(box);
  const int64_t width = static_cast<int64_t>(in.inner()) * in.x_channels() + in.inner() + 1;
  if (out.partial != nullptr) backward.write_partial(out.partial + blockIdx.x * width);
}

}  // namespace lungkit
