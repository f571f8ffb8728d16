// By pieces of 16 bytes (cuda_pieces.h) where the features allow it. Elsewhere one thread a voxel, walking
// its channels: neighbouring threads read neighbouring voxels of a channels-first tensor; of a channels-last
// one each thread walks a run of memory. The weights' gradient is summed within warps, then over warps in
// their order: the same bits on every run, no atomics.
#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../support/cuda_launch.h"
#include "../support/parallel.h"
#include "arguments.h"
#include "cuda_pieces.h"

namespace lungkit {
namespace {

constexpr int block_threads = 256;
constexpr int voxels_per_thread = 4;  // of the backward pass of psi, which sums over voxels
constexpr int64_t run_voxels = 32 * voxels_per_thread;
constexpr unsigned all_lanes = 0xffffffffu;

template <class Stored>
struct Features {
  Features(const Tensor& tensor, Stored* pointer) : data(pointer), layout(readable_layout(tensor)) {}
  __device__ Stored* at(int64_t image, int64_t voxel) const {
    return data + image * layout.batch_stride + voxel * layout.voxel_stride;
  }
  Stored* data;
  VoxelLayout layout;
};

template <class Stored>
Features<const Stored> features_of(const Tensor& tensor) {
  return {tensor, static_cast<const Stored*>(tensor.const_data_ptr())};
}
// A tensor of one axis is a gradient that was not asked for.
template <class Stored>
Features<Stored> gradient_of(const Tensor& tensor, const Tensor& like) {
  if (tensor.dim() == 1) return {like, nullptr};
  return {tensor, static_cast<Stored*>(tensor.mutable_data_ptr())};
}

// Every voxel of every image, one a thread.
template <class Body>
__device__ void for_each_voxel(const VoxelLayout& layout, const Body& body) {
  const int64_t count = layout.batch * layout.voxels, step = int64_t{gridDim.x} * block_threads;
  for (int64_t i = int64_t{blockIdx.x} * block_threads + threadIdx.x; i < count; i += step) {
    const int64_t image = i / layout.voxels;
    body(i, image, i - image * layout.voxels);
  }
}

template <class Stored>
__global__ void __launch_bounds__(block_threads)
    gate_psi_kernel(Features<const Stored> a, Features<const Stored> b,
                    const accumulate_t<Stored>* __restrict__ weight, Stored* psi, Features<Stored> q) {
  using Sum = accumulate_t<Stored>;
  for_each_voxel(a.layout, [&](int64_t i, int64_t image, int64_t voxel) {
    const Stored* left = a.at(image, voxel);
    const Stored* right = b.at(image, voxel);
    Stored* to = q.at(image, voxel);
    Sum sum = 0;
    for (int64_t c = 0; c < a.layout.channels; ++c) {
      const Sum value = static_cast<Sum>(left[c * a.layout.channel_stride]) +
                        static_cast<Sum>(right[c * b.layout.channel_stride]);
      const Sum kept = value < Sum(0) ? Sum(0) : value;  // keeps NaN
      to[c * q.layout.channel_stride] = static_cast<Stored>(kept);
      sum += weight[c] * kept;
    }
    psi[i] = static_cast<Stored>(sum);
  });
}

template <class T>
__device__ T warp_sum(T value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(all_lanes, value, step);
  return value;
}

// A warp takes runs of voxels and leaves its sums at partial[c * warps + warp].
template <class Stored>
__global__ void __launch_bounds__(block_threads)
    gate_psi_backward_kernel(const Stored* __restrict__ grad_psi, Features<const Stored> q,
                             const accumulate_t<Stored>* __restrict__ weight, Features<Stored> grad,
                             accumulate_t<Stored>* __restrict__ partial, int64_t runs) {
  using Sum = accumulate_t<Stored>;
  const int lane = threadIdx.x % 32;
  const int64_t run = int64_t{blockIdx.x} * (block_threads / 32) + threadIdx.x / 32;
  if (run >= runs) return;  // the whole warp
  const int64_t voxels = q.layout.voxels, runs_per_image = runs / q.layout.batch;
  const int64_t image = run / runs_per_image, first = run % runs_per_image * run_voxels + lane;
  Sum slope[voxels_per_thread];
  for (int k = 0; k < voxels_per_thread; ++k) {
    const int64_t voxel = first + 32 * k;
    slope[k] = voxel < voxels ? static_cast<Sum>(grad_psi[image * voxels + voxel]) : Sum(0);
  }
  for (int64_t c = 0; c < q.layout.channels; ++c) {
    Sum sum = 0;
    for (int k = 0; k < voxels_per_thread; ++k) {
      const int64_t voxel = first + 32 * k;
      if (voxel >= voxels) continue;
      const Sum value = static_cast<Sum>(q.at(image, voxel)[c * q.layout.channel_stride]);
      sum += slope[k] * value;
      if (grad.data != nullptr) {
        grad.at(image, voxel)[c * grad.layout.channel_stride] =
            static_cast<Stored>(value <= Sum(0) ? Sum(0) : slope[k] * weight[c]);
      }
    }
    if (partial == nullptr) continue;
    sum = warp_sum(sum);
    if (lane == 0) partial[c * runs + run] = sum;
  }
}

// One block a channel.
template <class Sum, class Weight>
__global__ void __launch_bounds__(block_threads)
    gate_psi_weights_kernel(const Sum* __restrict__ partial, int64_t runs, Weight* grad_weight) {
  __shared__ double of_warp[block_threads / 32];
  double sum = 0;
  for (int64_t run = threadIdx.x; run < runs; run += block_threads) {
    sum += static_cast<double>(partial[int64_t{blockIdx.x} * runs + run]);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (const double value : of_warp) total += value;
  grad_weight[blockIdx.x] = static_cast<Weight>(total);
}

template <class Stored>
__global__ void __launch_bounds__(block_threads)
    gate_scale_kernel(Features<const Stored> x, const Stored* __restrict__ alpha, Features<Stored> out) {
  using Sum = accumulate_t<Stored>;
  for_each_voxel(x.layout, [&](int64_t i, int64_t image, int64_t voxel) {
    const Sum factor = static_cast<Sum>(alpha[i]);
    const Stored* from = x.at(image, voxel);
    Stored* to = out.at(image, voxel);
    for (int64_t c = 0; c < x.layout.channels; ++c) {
      to[c * out.layout.channel_stride] =
          static_cast<Stored>(factor * static_cast<Sum>(from[c * x.layout.channel_stride]));
    }
  });
}

template <class Stored>
__global__ void __launch_bounds__(block_threads)
    gate_scale_backward_kernel(Features<const Stored> grad_out, Features<const Stored> x,
                               const Stored* __restrict__ alpha, Features<Stored> grad_x,
                               Stored* grad_alpha) {
  using Sum = accumulate_t<Stored>;
  for_each_voxel(x.layout, [&](int64_t i, int64_t image, int64_t voxel) {
    const Sum factor = static_cast<Sum>(alpha[i]);
    const Stored* slope = grad_out.at(image, voxel);
    const Stored* from = x.at(image, voxel);
    Stored* to = grad_x.data == nullptr ? nullptr : grad_x.at(image, voxel);
    Sum sum = 0;
    for (int64_t c = 0; c < x.layout.channels; ++c) {
      const Sum value = static_cast<Sum>(slope[c * grad_out.layout.channel_stride]);
      sum += value * static_cast<Sum>(from[c * x.layout.channel_stride]);
      if (to != nullptr) to[c * grad_x.layout.channel_stride] = static_cast<Stored>(factor * value);
    }
    if (grad_alpha != nullptr) grad_alpha[i] = static_cast<Stored>(sum);
  });
}

unsigned blocks_for(const VoxelLayout& layout) {
  const int64_t blocks = ceil_div(layout.batch * layout.voxels, block_threads);
  return static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 20));
}

template <class Stored>
Tensor weight_as_sum(const Tensor& weight) {
  constexpr ScalarType type = std::is_same_v<Stored, double> ? ScalarType::Double : ScalarType::Float;
  return torch::stable::contiguous(torch::stable::to(weight, type));
}

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
// Null for what was not asked for.
template <class T>
T* write(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls launch(layout, by_voxel, blocks) where all of `features` and `maps` can be read in pieces of 16
// bytes.
template <class Stored, class Launch>
bool launch_by_pieces(const std::vector<Tensor>& features, const std::vector<Tensor>& maps,
                      const Launch& launch) {
  constexpr int64_t width = Piece<Stored>::width;
  const VoxelLayout first = readable_layout(features[0]);
  const bool by_voxel = first.voxel_stride != 1;
  const PieceLayout layout{first.batch, first.channels, first.voxels, first.batch_stride,
                           by_voxel ? first.voxel_stride : first.channel_stride};
  const auto is_aligned = [](const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  };
  for (const Tensor& tensor : features) {
    const VoxelLayout other = readable_layout(tensor);
    const bool same = other.batch_stride == first.batch_stride && other.voxel_stride == first.voxel_stride &&
                      other.channel_stride == first.channel_stride;
    if (!same || !is_aligned(tensor)) return false;
  }
  if (!by_voxel && !std::all_of(maps.begin(), maps.end(), is_aligned)) return false;
  const int64_t columns = by_voxel ? layout.channels : layout.voxels;
  if (columns % width != 0 || layout.row_stride % width != 0 || layout.image_stride % width != 0)
    return false;
  const int64_t tile = by_voxel ? piece_tile<Stored, true> : piece_tile<Stored, false>;
  const int64_t blocks = layout.images * ceil_div(layout.voxels, tile);
  if (blocks > 0x7fffffff) return false;
  if (by_voxel) {
    launch(layout, std::true_type{}, static_cast<unsigned>(blocks));
  } else {
    launch(layout, std::false_type{}, static_cast<unsigned>(blocks));
  }
  return true;
}

// What was asked for of `features`.
std::vector<Tensor> and_if(std::vector<Tensor> features, bool needed, const Tensor& tensor) {
  if (needed) features.push_back(tensor);
  return features;
}

std::tuple<Tensor, Tensor> gate_psi_cuda(const Tensor& a, const Tensor& b, const Tensor& weight) {
  check_gate_psi(a, b, weight);
  LUNGKIT_CHECK(on_device(a), "gate_psi: a must be on the GPU");
  const DeviceGuard guard(a);
  const Tensor left = with_unit_stride(a), right = with_unit_stride(b);
  Tensor psi = new_map(left), q = new_features(left);
  if (psi.numel() == 0) return {psi, q};
  dispatch_floating(a.scalar_type(), "gate_psi", [&](auto zero) {
    using Stored = decltype(zero);
    using Sum = accumulate_t<Stored>;
    const Tensor weights = weight_as_sum<Stored>(weight);
    const auto by_pieces = [&](const PieceLayout& layout, auto by_voxel, unsigned blocks) {
      LUNGKIT_LAUNCH((gate_psi_pieces_kernel<Stored, decltype(by_voxel)::value>), blocks, piece_threads, 0,
                     current_stream(a), layout, read<Stored>(left), read<Stored>(right), read<Sum>(weights),
                     write<Stored>(psi), write<Stored>(q));
    };
    if (launch_by_pieces<Stored>({left, right, q}, {}, by_pieces)) return;
    const auto from = features_of<Stored>(left);
    LUNGKIT_LAUNCH((gate_psi_kernel<Stored>), blocks_for(from.layout), block_threads, 0, current_stream(a),
                   from, features_of<Stored>(right), read<accumulate_t<Stored>>(weights), write<Stored>(psi),
                   gradient_of<Stored>(q, q));
  });
  return {psi, q};
}

std::tuple<Tensor, Tensor> gate_psi_backward_cuda(const Tensor& grad_psi, const Tensor& q,
                                                  const Tensor& weight, bool needs_features,
                                                  bool needs_weight) {
  check_gate_psi_backward(grad_psi, q, weight);
  LUNGKIT_CHECK(on_device(q), "gate_psi_backward: q must be on the GPU");
  const DeviceGuard guard(q);
  const Tensor values = with_unit_stride(q), slopes = torch::stable::contiguous(grad_psi);
  Tensor grad = new_features_if(needs_features, values);
  const int64_t weights_asked_for = needs_weight ? q.size(1) : 0;
  if (slopes.numel() == 0 || q.size(1) == 0) {
    return {grad, torch::stable::new_zeros(weight, {weights_asked_for})};
  }
  const Tensor grad_weight = torch::stable::new_empty(weight, {weights_asked_for});
  dispatch_floating(q.scalar_type(), "gate_psi_backward", [&](auto zero) {
    using Stored = decltype(zero);
    using Sum = accumulate_t<Stored>;
    const Tensor weights = weight_as_sum<Stored>(weight);
    const auto from = features_of<Stored>(values);
    int64_t runs = from.layout.batch * ceil_div(from.layout.voxels, run_voxels);
    Tensor partial;
    const auto by_pieces = [&](const PieceLayout& layout, auto by_voxel, unsigned blocks) {
      runs = blocks;
      partial = torch::stable::new_empty(weights, {needs_weight ? q.size(1) * runs : 0});
      LUNGKIT_LAUNCH((gate_psi_backward_pieces_kernel<Stored, decltype(by_voxel)::value>), blocks,
                     piece_threads, 0, current_stream(q), layout, read<Stored>(slopes), read<Stored>(values),
                     read<Sum>(weights), write<Stored>(grad), write<Sum>(partial));
    };
    if (!launch_by_pieces<Stored>(and_if({values}, needs_features, grad), {slopes}, by_pieces)) {
      partial = torch::stable::new_empty(weights, {needs_weight ? q.size(1) * runs : 0});
      LUNGKIT_LAUNCH((gate_psi_backward_kernel<Stored>),
                     static_cast<unsigned>(ceil_div(runs, block_threads / 32)), block_threads, 0,
                     current_stream(q), read<Stored>(slopes), from, read<Sum>(weights),
                     gradient_of<Stored>(grad, values), write<Sum>(partial), runs);
    }
    if (!needs_weight) return;
    dispatch_floating(weight.scalar_type(), "gate_psi_backward", [&](auto weight_zero) {
      using Weight = decltype(weight_zero);
      LUNGKIT_LAUNCH((gate_psi_weights_kernel<Sum, Weight>), static_cast<unsigned>(q.size(1)), block_threads,
                     0, current_stream(q), read<Sum>(partial), runs, write<Weight>(grad_weight));
    });
  });
  return {grad, grad_weight};
}

Tensor gate_scale_cuda(const Tensor& x, const Tensor& alpha) {
  check_gate_scale(x, alpha);
  LUNGKIT_CHECK(on_device(x), "gate_scale: x must be on the GPU");
  const DeviceGuard guard(x);
  const Tensor values = with_unit_stride(x), map = torch::stable::contiguous(alpha);
  Tensor out = new_features(values);
  if (out.numel() == 0) return out;
  dispatch_floating(x.scalar_type(), "gate_scale", [&](auto zero) {
    using Stored = decltype(zero);
    const auto by_pieces = [&](const PieceLayout& layout, auto by_voxel, unsigned blocks) {
      LUNGKIT_LAUNCH((gate_scale_pieces_kernel<Stored, decltype(by_voxel)::value>), blocks, piece_threads, 0,
                     current_stream(x), layout, read<Stored>(values), read<Stored>(map), write<Stored>(out));
    };
    if (launch_by_pieces<Stored>({values, out}, {map}, by_pieces)) return;
    const auto from = features_of<Stored>(values);
    LUNGKIT_LAUNCH((gate_scale_kernel<Stored>), blocks_for(from.layout), block_threads, 0, current_stream(x),
                   from, read<Stored>(map), gradient_of<Stored>(out, out));
  });
  return out;
}

std::tuple<Tensor, Tensor> gate_scale_backward_cuda(const Tensor& grad_out, const Tensor& x,
                                                    const Tensor& alpha, bool needs_x, bool needs_alpha) {
  check_gate_scale_backward(grad_out, x, alpha);
  LUNGKIT_CHECK(on_device(x), "gate_scale_backward: x must be on the GPU");
  const DeviceGuard guard(x);
  const Tensor values = with_unit_stride(x), slopes = in_order_of(x, grad_out),
               map = torch::stable::contiguous(alpha);
  Tensor grad_x = new_features_if(needs_x, values), grad_alpha = new_map_if(needs_alpha, values);
  if (map.numel() == 0) return {grad_x, grad_alpha};
  dispatch_floating(x.scalar_type(), "gate_scale_backward", [&](auto zero) {
    using Stored = decltype(zero);
    const auto by_pieces = [&](const PieceLayout& layout, auto by_voxel, unsigned blocks) {
      LUNGKIT_LAUNCH((gate_scale_backward_pieces_kernel<Stored, decltype(by_voxel)::value>), blocks,
                     piece_threads, 0, current_stream(x), layout, read<Stored>(slopes), read<Stored>(values),
                     read<Stored>(map), write<Stored>(grad_x), write<Stored>(grad_alpha));
    };
    if (launch_by_pieces<Stored>(and_if({slopes, values}, needs_x, grad_x), {map}, by_pieces)) return;
    const auto from = features_of<Stored>(values);
    LUNGKIT_LAUNCH((gate_scale_backward_kernel<Stored>), blocks_for(from.layout), block_threads, 0,
                   current_stream(x), features_of<Stored>(slopes), from, read<Stored>(map),
                   gradient_of<Stored>(grad_x, values), write<Stored>(grad_alpha));
  });
  return {grad_x, grad_alpha};
}

}  // namespace

LUNGKIT_CUDA_LIBRARY(m) {
  m.impl("gate_psi", TORCH_BOX(&gate_psi_cuda));
  m.impl("gate_psi_backward", TORCH_BOX(&gate_psi_backward_cuda));
  m.impl("gate_scale", TORCH_BOX(&gate_scale_cuda));
  m.impl("gate_scale_backward", TORCH_BOX(&gate_scale_backward_cuda));
}

}  // namespace lungkit
