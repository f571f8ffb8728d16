// Statistics are taken in chunks of a fixed size, each in two passes while it is in the cache, and combined
// in order: the same bits for any number of threads. Where there are enough of what has statistics of its
// own, a thread does the whole of one, which then need not come from memory twice.
#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../support/huge_pages.h"
#include "../support/parallel.h"
#include "arguments.h"
#include "kernel.h"

namespace lungkit {
namespace {

constexpr int64_t chunk_elements = 1 << 13;
constexpr int64_t units_worth_a_thread = 4;

// A line is what lies in memory without a gap: a channel of a channels-first image, or a channels-last image
// whole.
struct Shape {
  Shape(const Tensor& x, int64_t group_count)
      : layout(readable_layout(x)),
        by_voxel(is_by_voxel(x)),
        type(x.scalar_type()),
        size(element_size(x.scalar_type())),
        groups(group_count),
        line_channels(by_voxel ? layout.channels : 1),
        lines_per_image(by_voxel ? 1 : layout.channels),
        chunk_voxels(std::max<int64_t>(1, chunk_elements / line_channels)),
        chunks(ceil_div(layout.voxels, chunk_voxels)) {}

  int64_t lines() const { return layout.batch * lines_per_image; }
  int64_t voxels_of(int64_t chunk) const {
    return std::min(chunk_voxels, layout.voxels - chunk * chunk_voxels);
  }
  double group_size() const { return static_cast<double>(layout.channels / groups * layout.voxels); }
  // Of chunk `chunk` of line `line` in a tensor of this shape and order of memory.
  int64_t offset(const Tensor& tensor, int64_t line, int64_t chunk) const {
    const VoxelLayout own = readable_layout(tensor);
    const int64_t image = line / lines_per_image, channel = line % lines_per_image;
    return (image * own.batch_stride + channel * own.channel_stride + chunk * chunk_voxels * line_channels) *
           size;
  }

  VoxelLayout layout;
  bool by_voxel;
  ScalarType type;
  int64_t size;
  int64_t groups;
  int64_t line_channels;
  int64_t lines_per_image;
  int64_t chunk_voxels;
  int64_t chunks;
};

const void* read_at(const Shape& shape, const MaybeTensor& tensor, int64_t line, int64_t chunk) {
  if (!tensor) return nullptr;
  return static_cast<const char*>(tensor->const_data_ptr()) + shape.offset(*tensor, line, chunk);
}
void* write_at(const Shape& shape, const MaybeTensor& tensor, int64_t line, int64_t chunk) {
  if (!tensor) return nullptr;
  return static_cast<char*>(tensor->mutable_data_ptr()) + shape.offset(*tensor, line, chunk);
}

// first(line, chunk) for every chunk, between(image, group) once its chunks are done, then second(line,
// chunk).
template <class First, class Between, class Second>
void in_two_passes(const Shape& shape, const First& first, const Between& between, const Second& second) {
  // What lies together and has statistics of its own: a row, or a channels-last image with all its groups.
  const int64_t units_per_image = shape.by_voxel ? 1 : shape.groups,
                units = shape.layout.batch * units_per_image;
  const int64_t of_unit = shape.lines() / units * shape.chunks;
  const int64_t threads = torch::stable::get_num_threads();
  const auto close = [&](int64_t unit) {
    if (!shape.by_voxel) return between(unit / units_per_image, unit % units_per_image);
    for (int64_t group = 0; group < shape.groups; ++group) between(unit, group);
  };
  const auto each = [&](const auto& pass) {
    return [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pass(i / shape.chunks, i % shape.chunks);
    };
  };
  if (units % threads == 0 || units >= units_worth_a_thread * threads) {
    torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        each(first)(unit * of_unit, (unit + 1) * of_unit);
        close(unit);
        each(second)(unit * of_unit, (unit + 1) * of_unit);
      }
    });
    return;
  }
  torch::stable::parallel_for(0, units * of_unit, 1, each(first));
  for (int64_t unit = 0; unit < units; ++unit) close(unit);
  torch::stable::parallel_for(0, units * of_unit, 1, each(second));
}

// A number for each channel of every image, repeated as the kernels read it beside a line: see NormRun.
template <class T>
class Slots {
 public:
  Slots(const Shape& shape, int64_t slots) : shape_(shape), slots_(slots), values_(shape.lines() * slots) {}
  const T* of_line(int64_t line) const { return &values_[line * slots_]; }
  void set(int64_t image, int64_t channel, T value) {
    const int64_t line = shape_.by_voxel ? image : image * shape_.layout.channels + channel;
    const int64_t first = shape_.by_voxel ? channel : 0;
    for (int64_t s = first; s < slots_; s += shape_.line_channels) values_[line * slots_ + s] = value;
  }

 private:
  const Shape& shape_;
  int64_t slots_;
  std::vector<T> values_;
};

// Sums of every chunk of every channel, in double.
class ChunkSums {
 public:
  explicit ChunkSums(const Shape& shape)
      : shape_(shape), values_(shape.layout.batch * shape.layout.channels * shape.chunks) {}
  double& at(int64_t image, int64_t channel, int64_t chunk) {
    const int64_t line = shape_.by_voxel ? image : image * shape_.layout.channels + channel;
    const int64_t inner = shape_.by_voxel ? channel : 0;
    return values_[(line * shape_.chunks + chunk) * shape_.line_channels + inner];
  }
  // Adds up the slots of a run.
  template <class T>
  double* fold(int64_t line, int64_t chunk, const std::vector<T>& slots) {
    double* sums = &values_[(line * shape_.chunks + chunk) * shape_.line_channels];
    std::fill_n(sums, shape_.line_channels, 0.0);
    for (size_t s = 0; s < slots.size(); ++s) sums[s % shape_.line_channels] += static_cast<double>(slots[s]);
    return sums;
  }

 private:
  const Shape& shape_;
  std::vector<double> values_;
};

// The values of a parameter, or `otherwise` where it is absent.
template <class T>
std::vector<T> parameter_values(const MaybeTensor& parameter, int64_t channels, T otherwise) {
  std::vector<T> values(channels, otherwise);
  if (!parameter) return values;
  const Tensor packed = torch::stable::contiguous(*parameter);
  dispatch_floating(packed.scalar_type(), "norm_act", [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(packed.const_data_ptr());
    for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<T>(from[c]);
  });
  return values;
}

template <class T>
int64_t slots_of(const Shape& shape, const NormKernels& kernels) {
  const int64_t lanes = std::is_same_v<T, double> ? kernels.double_lanes : kernels.float_lanes;
  return std::lcm(shape.line_channels, lanes);
}

// The three numbers that lead from x to the normalised value, of every image and channel.
template <class T>
struct Affine {
  Affine(const Shape& shape, int64_t slots) : mean(shape, slots), scale(shape, slots), shift(shape, slots) {}
  NormAffine of_line(int64_t line) const {
    return {mean.of_line(line), scale.of_line(line), shift.of_line(line)};
  }
  Slots<T> mean, scale, shift;
};

template <class T>
void norm_forward(const Tensor& x, const Tensor& y, const Tensor& mean, const Tensor& rstd,
                  const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual, double eps,
                  double slope) {
  const Shape shape(x, mean.size(1));
  const NormKernels& kernels = LUNGKIT_SELECT_KERNELS(norm_kernels);
  const int64_t slots = slots_of<T>(shape, kernels), channels = shape.layout.channels;
  const std::vector<T> weights = parameter_values<T>(weight, channels, 1),
                       biases = parameter_values<T>(bias, channels, 0);
  auto* means = static_cast<T*>(mean.mutable_data_ptr());
  auto* rstds = static_cast<T*>(rstd.mutable_data_ptr());
  ChunkSums chunk_means(shape), chunk_squares(shape);
  Affine<T> affine(shape, slots);
  const auto run_of = [&](int64_t line, int64_t chunk) {
    return NormRun{shape.type, shape.voxels_of(chunk) * shape.line_channels, slots,
                   read_at(shape, x, line, chunk)};
  };

  const auto measure = [&](int64_t line, int64_t chunk) {
    const NormRun run = run_of(line, chunk);
    std::vector<T> sums(slots, T(0)), centres(slots);
    kernels.sums(run, sums.data());
    double* of_channels = chunk_means.fold(line, chunk, sums);
    for (int64_t c = 0; c < shape.line_channels; ++c)
      of_channels[c] /= static_cast<double>(shape.voxels_of(chunk));
    for (int64_t s = 0; s < slots; ++s) centres[s] = static_cast<T>(of_channels[s % shape.line_channels]);
    // What was subtracted is what counts as the chunk's mean; the rest of it is below the rounding of the
    // sum.
    std::fill(sums.begin(), sums.end(), T(0));
    kernels.squares(run, centres.data(), sums.data());
    chunk_squares.fold(line, chunk, sums);
  };
  const auto combine = [&](int64_t image, int64_t group) {
    const int64_t first = group * (channels / shape.groups), last = first + channels / shape.groups;
    double centre = 0, squares = 0;
    for (int64_t c = first; c < last; ++c) {
      for (int64_t k = 0; k < shape.chunks; ++k) {
        centre += chunk_means.at(image, c, k) * static_cast<double>(shape.voxels_of(k));
      }
    }
    centre /= shape.group_size();
    for (int64_t c = first; c < last; ++c) {
      for (int64_t k = 0; k < shape.chunks; ++k) {
        const double distance = chunk_means.at(image, c, k) - centre;
        squares +=
            chunk_squares.at(image, c, k) + distance * distance * static_cast<double>(shape.voxels_of(k));
      }
    }
    const double inverse = 1 / std::sqrt(squares / shape.group_size() + eps);
    means[image * shape.groups + group] = static_cast<T>(centre);
    rstds[image * shape.groups + group] = static_cast<T>(inverse);
    for (int64_t c = first; c < last; ++c) {
      affine.mean.set(image, c, static_cast<T>(centre));
      affine.scale.set(image, c, static_cast<T>(inverse) * weights[c]);
      affine.shift.set(image, c, biases[c]);
    }
  };
  const auto apply = [&](int64_t line, int64_t chunk) {
    kernels.forward(run_of(line, chunk), {affine.of_line(line), read_at(shape, residual, line, chunk), slope,
                                          write_at(shape, y, line, chunk)});
  };
  in_two_passes(shape, measure, combine, apply);
}

template <class T>
void norm_backward(const Tensor& grad_y, const Tensor& x, const MaybeTensor& y, const Tensor& mean,
                   const Tensor& rstd, const MaybeTensor& weight, const MaybeTensor& bias, double slope,
                   const Tensor& grad_x, const MaybeTensor& grad_residual, std::vector<double>& grad_weight,
                   std::vector<double>& grad_bias) {
  const Shape shape(x, mean.size(1));
  const NormKernels& kernels = LUNGKIT_SELECT_KERNELS(norm_kernels);
  const int64_t slots = slots_of<T>(shape, kernels), channels = shape.layout.channels;
  const int64_t group_channels = channels / shape.groups;
  const std::vector<T> weights = parameter_values<T>(weight, channels, 1),
                       biases = parameter_values<T>(bias, channels, 0);
  const Tensor own_mean = torch::stable::contiguous(mean), own_rstd = torch::stable::contiguous(rstd);
  const auto* means = static_cast<const T*>(own_mean.const_data_ptr());
  const auto* rstds = static_cast<const T*>(own_rstd.const_data_ptr());
  ChunkSums chunk_g(shape), chunk_gx(shape);
  Affine<T> affine(shape, slots);
  Slots<T> to_gradient(shape, slots), constant(shape, slots), to_x(shape, slots);
  for (int64_t image = 0; image < shape.layout.batch; ++image) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t row = image * shape.groups + c / group_channels;
      affine.mean.set(image, c, means[row]);
      affine.scale.set(image, c, rstds[row] * weights[c]);
      affine.shift.set(image, c, biases[c]);
    }
  }
  const auto run_of = [&](int64_t line, int64_t chunk) {
    return NormRun{shape.type, shape.voxels_of(chunk) * shape.line_channels, slots,
                   read_at(shape, x, line, chunk)};
  };
  const auto gradient_of = [&](int64_t line, int64_t chunk) {
    return NormGradient{affine.of_line(line), read_at(shape, grad_y, line, chunk),
                        read_at(shape, y, line, chunk), slope};
  };

  const auto measure = [&](int64_t line, int64_t chunk) {
    std::vector<T> sum_g(slots, T(0)), sum_gx(slots, T(0));
    kernels.gradient_sums(run_of(line, chunk), gradient_of(line, chunk), sum_g.data(), sum_gx.data());
    chunk_g.fold(line, chunk, sum_g);
    chunk_gx.fold(line, chunk, sum_gx);
  };
  const auto combine = [&](int64_t image, int64_t group) {
    double of_g = 0, of_gx = 0;
    for (int64_t c = group * group_channels; c < (group + 1) * group_channels; ++c) {
      // The first chunk holds the channel's sum from here on.
      for (int64_t k = 1; k < shape.chunks; ++k) {
        chunk_g.at(image, c, 0) += chunk_g.at(image, c, k);
        chunk_gx.at(image, c, 0) += chunk_gx.at(image, c, k);
      }
      of_g += static_cast<double>(weights[c]) * chunk_g.at(image, c, 0);
      of_gx += static_cast<double>(weights[c]) * chunk_gx.at(image, c, 0);
    }
    const double inverse = static_cast<double>(rstds[image * shape.groups + group]);
    for (int64_t c = group * group_channels; c < (group + 1) * group_channels; ++c) {
      to_gradient.set(image, c, static_cast<T>(inverse) * weights[c]);
      constant.set(image, c, static_cast<T>(inverse * of_g / shape.group_size()));
      to_x.set(image, c, static_cast<T>(inverse * inverse * inverse * of_gx / shape.group_size()));
    }
  };
  const auto apply = [&](int64_t line, int64_t chunk) {
    kernels.input_gradient(
        run_of(line, chunk), gradient_of(line, chunk),
        {to_gradient.of_line(line), constant.of_line(line), to_x.of_line(line),
         write_at(shape, grad_x, line, chunk), write_at(shape, grad_residual, line, chunk)});
  };
  in_two_passes(shape, measure, combine, apply);
  for (int64_t image = 0; image < shape.layout.batch; ++image) {
    for (int64_t c = 0; c < channels; ++c) {
      grad_bias[c] += chunk_g.at(image, c, 0);
      grad_weight[c] +=
          chunk_gx.at(image, c, 0) * static_cast<double>(rstds[image * shape.groups + c / group_channels]);
    }
  }
}

template <class Body>
void dispatch_real(ScalarType type, Body&& body) {
  if (type == ScalarType::Double) {
    body(double{});
  } else {
    body(float{});
  }
}

// A parameter's gradient in the parameter's own type; empty where there is no parameter.
Tensor parameter_gradient(const Tensor& x, const MaybeTensor& parameter, const std::vector<double>& values) {
  if (!parameter) return torch::stable::new_empty(x, {0});
  Tensor gradient = torch::stable::new_empty(*parameter, {parameter->size(0)});
  dispatch_floating(parameter->scalar_type(), "norm_act_backward", [&](auto zero) {
    auto* to = static_cast<decltype(zero)*>(gradient.mutable_data_ptr());
    for (size_t c = 0; c < values.size(); ++c) to[c] = static_cast<decltype(zero)>(values[c]);
  });
  return gradient;
}

std::pair<Tensor, Tensor> into(const Tensor& values, const Tensor& y, const MaybeTensor& weight,
                               const MaybeTensor& bias, const MaybeTensor& residual, int64_t groups,
                               double eps, double slope) {
  const ScalarType sums = values.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor mean = torch::stable::new_zeros(values, {values.size(0), groups}, sums);
  Tensor rstd = torch::stable::new_zeros(values, {values.size(0), groups}, sums);
  if (values.numel() == 0) return {mean, rstd};
  const MaybeTensor added = residual ? MaybeTensor(with_runs_like(values, *residual)) : residual;
  dispatch_real(values.scalar_type(), [&](auto zero) {
    norm_forward<decltype(zero)>(values, y, mean, rstd, weight, bias, added, eps, slope);
  });
  return {mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_cpu(const Tensor& x, const MaybeTensor& weight,
                                                const MaybeTensor& bias, const MaybeTensor& residual,
                                                int64_t groups, double eps, double slope) {
  check_norm_act("norm_act", x, weight, bias, residual, groups, slope);
  const Tensor values = with_runs(x);
  Tensor y = new_features(values);
  prefer_huge_pages(y);
  const auto [mean, rstd] = into(values, y, weight, bias, residual, groups, eps, slope);
  return {y, mean, rstd};
}

void norm_act_in_place_cpu(Tensor x, const MaybeTensor& weight, const MaybeTensor& bias,
                           const MaybeTensor& residual, int64_t groups, double eps, double slope) {
  check_norm_act("norm_act_", x, weight, bias, residual, groups, slope);
  check_written("norm_act_", x);
  const Tensor values = with_runs(x);
  into(values, values, weight, bias, residual, groups, eps, slope);
  if (values.const_data_ptr() != x.const_data_ptr()) torch::stable::copy_(x, values);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_backward_cpu(
    const Tensor& grad_y, const Tensor& x, const MaybeTensor& y, const Tensor& mean, const Tensor& rstd,
    const MaybeTensor& weight, const MaybeTensor& bias, double slope, bool needs_residual) {
  check_norm_act_backward(grad_y, x, y, mean, rstd, weight, bias, slope, needs_residual);
  const Tensor values = with_runs(x), slopes = with_runs_like(values, grad_y);
  const MaybeTensor signs = y ? MaybeTensor(with_runs_like(values, *y)) : y;
  Tensor grad_x = new_features(values);
  MaybeTensor grad_residual;
  if (needs_residual) grad_residual = new_features(values);
  prefer_huge_pages(grad_x);
  std::vector<double> grad_weight(x.size(1)), grad_bias(x.size(1));
  if (x.numel() > 0) {
    dispatch_real(x.scalar_type(), [&](auto zero) {
      norm_backward<decltype(zero)>(slopes, values, signs, mean, rstd, weight, bias, slope, grad_x,
                                    grad_residual, grad_weight, grad_bias);
    });
  }
  return {grad_x, parameter_gradient(x, weight, grad_weight), parameter_gradient(x, bias, grad_bias),
          grad_residual ? *grad_residual : torch::stable::new_empty(x, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lungkit, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&norm_act_cpu));
  m.impl("norm_act_", TORCH_BOX(&norm_act_in_place_cpu));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward_cpu));
}

}  // namespace lungkit
