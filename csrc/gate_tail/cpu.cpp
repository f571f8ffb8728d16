#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../support/huge_pages.h"
#include "../support/parallel.h"
#include "arguments.h"
#include "kernel.h"

namespace lungkit {
namespace {

constexpr int64_t chunk_voxels = 1 << 13;

// A voxel stride other than 1 tells the kernels that the channels of a voxel lie side by side.
struct Layout {
  explicit Layout(const Tensor& features)
      : view(readable_layout(features)), size(element_size(features.scalar_type())) {}
  int64_t offset(int64_t image, int64_t voxel) const {
    return (image * view.batch_stride + voxel * view.voxel_stride) * size;
  }
  VoxelLayout view;
  int64_t size;
};

TailFeatures from_voxel(const Tensor& features, int64_t image, int64_t voxel) {
  const Layout layout(features);
  return {static_cast<const char*>(features.const_data_ptr()) + layout.offset(image, voxel),
          layout.view.channel_stride, layout.view.voxel_stride};
}

MutableTailFeatures to_voxel(const Tensor& features, int64_t image, int64_t voxel) {
  if (features.dim() == 1) return {nullptr, 0, 1};  // not asked for
  const Layout layout(features);
  return {static_cast<char*>(features.mutable_data_ptr()) + layout.offset(image, voxel),
          layout.view.channel_stride, layout.view.voxel_stride};
}

// Voxel `voxel` of image `image` of a contiguous map.
const char* from_map(const Tensor& map, int64_t voxels, int64_t image, int64_t voxel) {
  return static_cast<const char*>(map.const_data_ptr()) +
         (image * voxels + voxel) * element_size(map.scalar_type());
}
char* to_map(const Tensor& map, int64_t voxels, int64_t image, int64_t voxel) {
  if (map.dim() == 1) return nullptr;  // not asked for
  return static_cast<char*>(map.mutable_data_ptr()) +
         (image * voxels + voxel) * element_size(map.scalar_type());
}

// The weights in the type that the kernels compute with, padded with zeros.
template <class T>
std::vector<T> padded_weights(const Tensor& weight, int64_t channels) {
  const Tensor packed = torch::stable::contiguous(weight);
  std::vector<T> values(padded_channels(channels), T(0));
  dispatch_floating(packed.scalar_type(), "gate_psi", [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(packed.const_data_ptr());
    for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<T>(from[c]);
  });
  return values;
}

template <class Body>
void dispatch_real(ScalarType type, Body&& body) {
  if (type == ScalarType::Double) {
    body(double{});
  } else {
    body(float{});
  }
}

TailChunk chunk_of(const Tensor& features, int64_t first, int64_t last) {
  return {features.scalar_type(), features.size(1), last - first};
}

std::tuple<Tensor, Tensor> gate_psi_cpu(const Tensor& a, const Tensor& b, const Tensor& weight) {
  check_gate_psi(a, b, weight);
  const Tensor left = with_unit_stride(a), right = in_order_of(left, b);
  Tensor psi = new_map(left), q = new_features(left);
  prefer_huge_pages(q);
  const int64_t voxels = channel_layout(left).voxels;
  const TailKernels& kernels = LUNGKIT_SELECT_KERNELS(tail_kernels);
  dispatch_real(a.scalar_type(), [&](auto zero) {
    const auto weights = padded_weights<decltype(zero)>(weight, a.size(1));
    for_each_chunk(a.size(0), voxels, chunk_voxels, [&](int64_t image, int64_t, int64_t first, int64_t last) {
      kernels.psi(chunk_of(left, first, last), from_voxel(left, image, first),
                  from_voxel(right, image, first), weights.data(), to_map(psi, voxels, image, first),
                  to_voxel(q, image, first));
    });
  });
  return {psi, q};
}

std::tuple<Tensor, Tensor> gate_psi_backward_cpu(const Tensor& grad_psi, const Tensor& q,
                                                 const Tensor& weight, bool needs_features,
                                                 bool needs_weight) {
  check_gate_psi_backward(grad_psi, q, weight);
  const Tensor values = with_unit_stride(q), slopes = torch::stable::contiguous(grad_psi);
  Tensor grad = new_features_if(needs_features, values);
  Tensor grad_weight = torch::stable::new_zeros(weight, {needs_weight ? q.size(1) : 0});
  prefer_huge_pages(grad);
  const int64_t voxels = channel_layout(values).voxels, channels = q.size(1);
  const int64_t chunks = ceil_div(voxels, chunk_voxels), width = padded_channels(channels);
  const TailKernels& kernels = LUNGKIT_SELECT_KERNELS(tail_kernels);
  dispatch_real(q.scalar_type(), [&](auto zero) {
    using Real = decltype(zero);
    const std::vector<Real> weights = padded_weights<Real>(weight, channels);
    std::vector<Real> partial(needs_weight ? q.size(0) * chunks * width : 0, Real(0));
    for_each_chunk(
        q.size(0), voxels, chunk_voxels, [&](int64_t image, int64_t chunk, int64_t first, int64_t last) {
          kernels.psi_backward(chunk_of(values, first, last), from_map(slopes, voxels, image, first),
                               from_voxel(values, image, first), weights.data(), to_voxel(grad, image, first),
                               needs_weight ? &partial[(image * chunks + chunk) * width] : nullptr);
        });
    if (!needs_weight) return;
    dispatch_floating(weight.scalar_type(), "gate_psi_backward", [&](auto stored) {
      auto* out = static_cast<decltype(stored)*>(grad_weight.mutable_data_ptr());
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < q.size(0) * chunks; ++i) sum += static_cast<double>(partial[i * width + c]);
        out[c] = static_cast<decltype(stored)>(sum);
      }
    });
  });
  return {grad, grad_weight};
}

Tensor gate_scale_cpu(const Tensor& x, const Tensor& alpha) {
  check_gate_scale(x, alpha);
  const Tensor values = with_unit_stride(x), map = torch::stable::contiguous(alpha);
  Tensor out = new_features(values);
  prefer_huge_pages(out);
  const int64_t voxels = channel_layout(values).voxels;
  const TailKernels& kernels = LUNGKIT_SELECT_KERNELS(tail_kernels);
  for_each_chunk(x.size(0), voxels, chunk_voxels, [&](int64_t image, int64_t, int64_t first, int64_t last) {
    kernels.scale(chunk_of(values, first, last), from_voxel(values, image, first),
                  from_map(map, voxels, image, first), to_voxel(out, image, first));
  });
  return out;
}

std::tuple<Tensor, Tensor> gate_scale_backward_cpu(const Tensor& grad_out, const Tensor& x,
                                                   const Tensor& alpha, bool needs_x, bool needs_alpha) {
  check_gate_scale_backward(grad_out, x, alpha);
  const Tensor values = with_unit_stride(x), slopes = in_order_of(values, grad_out),
               map = torch::stable::contiguous(alpha);
  Tensor grad_x = new_features_if(needs_x, values), grad_alpha = new_map_if(needs_alpha, values);
  prefer_huge_pages(grad_x);
  const int64_t voxels = channel_layout(values).voxels;
  const TailKernels& kernels = LUNGKIT_SELECT_KERNELS(tail_kernels);
  for_each_chunk(x.size(0), voxels, chunk_voxels, [&](int64_t image, int64_t, int64_t first, int64_t last) {
    kernels.scale_backward(chunk_of(values, first, last), from_voxel(slopes, image, first),
                           from_voxel(values, image, first), from_map(map, voxels, image, first),
                           to_voxel(grad_x, image, first), to_map(grad_alpha, voxels, image, first));
  });
  return {grad_x, grad_alpha};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lungkit, CPU, m) {
  m.impl("gate_psi", TORCH_BOX(&gate_psi_cpu));
  m.impl("gate_psi_backward", TORCH_BOX(&gate_psi_backward_cpu));
  m.impl("gate_scale", TORCH_BOX(&gate_scale_cpu));
  m.impl("gate_scale_backward", TORCH_BOX(&gate_scale_backward_cpu));
}

}  // namespace lungkit
