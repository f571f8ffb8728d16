// Checks that the CPU and the CUDA side of the norm share.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "../support/check.h"
#include "../support/dispatch.h"
#include "../support/features.h"

namespace lungkit {

using MaybeTensor = std::optional<Tensor>;

inline void check_beside(const char* op, const Tensor& x, const char* name, const Tensor& other) {
  LUNGKIT_CHECK(on_same_device(x, other), op, ": x and ", name, " must be on the same device");
}

inline void check_features_like(const char* op, const Tensor& x, const char* name, const Tensor& other) {
  check_beside(op, x, name, other);
  bool same = other.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = other.size(d) == x.size(d);
  LUNGKIT_CHECK(same, op, ": ", name, " must have the shape of x, ", shape_of(x), ", got ", shape_of(other));
  LUNGKIT_CHECK(other.scalar_type() == x.scalar_type(), op, ": ", name, " must have the dtype of x (",
                toString(x.scalar_type()), "), got ", toString(other.scalar_type()));
}

inline void check_parameter(const char* op, const Tensor& x, const char* name, const MaybeTensor& parameter) {
  if (!parameter) return;
  check_beside(op, x, name, *parameter);
  LUNGKIT_CHECK(parameter->dim() == 1 && parameter->size(0) == x.size(1), op, ": ", name, " must be (C,) = (",
                x.size(1), ",) for x ", shape_of(x), ", got ", shape_of(*parameter));
  const ScalarType type = parameter->scalar_type();
  LUNGKIT_CHECK(
      type == x.scalar_type() || (type == ScalarType::Float && x.scalar_type() != ScalarType::Double), op,
      ": ", name, " must have the dtype of x (", toString(x.scalar_type()),
      "), or float32 where that is a half type, got ", toString(type));
}

inline void check_norm_act(const char* op, const Tensor& x, const MaybeTensor& weight,
                           const MaybeTensor& bias, const MaybeTensor& residual, int64_t groups,
                           double slope) {
  LUNGKIT_CHECK(x.dim() >= 3 && x.dim() <= 5, op,
                ": x must be (B, C, *S) with one to three spatial axes, got ", shape_of(x));
  dispatch_floating(x.scalar_type(), op, [](auto) {});
  LUNGKIT_CHECK(groups >= 1 && groups <= std::max<int64_t>(1, x.size(1)) && x.size(1) % groups == 0, op,
                ": groups must divide the ", x.size(1), " channels of x, got ", groups);
  LUNGKIT_CHECK(slope >= 0, op, ": slope must be at least 0, got ", slope);
  check_parameter(op, x, "weight", weight);
  check_parameter(op, x, "bias", bias);
  if (residual) check_features_like(op, x, "residual", *residual);
}

// Two elements of x in one place would each be read after the other was written.
inline void check_written(const char* op, const Tensor& x) {
  if (x.numel() == 0) return;
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) > 1) axes.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(axes.begin(), axes.end());
  int64_t last = 0;  // offset of the last element of the axes so far
  for (const auto& [stride, size] : axes) {
    LUNGKIT_CHECK(stride > last, op,
                  ": x is written to, but several of its elements share their memory; pass x.clone()");
    last += (size - 1) * stride;
  }
}

inline void check_norm_act_backward(const Tensor& grad_y, const Tensor& x, const MaybeTensor& y,
                                    const Tensor& mean, const Tensor& rstd, const MaybeTensor& weight,
                                    const MaybeTensor& bias, double slope, bool needs_residual) {
  constexpr const char* op = "norm_act_backward";
  LUNGKIT_CHECK(mean.dim() == 2 && mean.size(0) == x.size(0) && mean.size(1) >= 1, op,
                ": mean must be (B, groups), got ", shape_of(mean));
  check_norm_act(op, x, weight, bias, y, mean.size(1), slope);
  check_features_like(op, x, "grad_y", grad_y);
  LUNGKIT_CHECK(y || !needs_residual, op, ": the gradient of the residual needs y");
  const ScalarType sums = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  for (const Tensor* statistic : {&mean, &rstd}) {
    check_beside(op, x, "mean and rstd", *statistic);
    LUNGKIT_CHECK(statistic->dim() == 2 && statistic->size(0) == mean.size(0) &&
                      statistic->size(1) == mean.size(1) && statistic->scalar_type() == sums,
                  op, ": mean and rstd must be (B, groups) of ", toString(sums), ", got ",
                  shape_of(*statistic), " of ", toString(statistic->scalar_type()));
  }
}

// `tensor` itself where the voxels of a channel, or the channels and voxels of an image, lie side by side,
// else a copy.
inline Tensor with_runs(const Tensor& tensor) {
  const Tensor readable = with_unit_stride(tensor);
  const bool gaps = is_by_voxel(readable) && voxel_stride_of(readable, 2) != readable.size(1);
  return gaps ? torch::stable::contiguous(readable) : readable;
}

// `other` as it is read beside x, which with_runs() returned: in x's order of memory.
inline Tensor with_runs_like(const Tensor& x, const Tensor& other) {
  const Tensor same = in_order_of(x, other);
  return is_by_voxel(same) && voxel_stride_of(same, 2) != same.size(1)
             ? in_order_of(x, torch::stable::contiguous(same))
             : same;
}

}  // namespace lungkit
