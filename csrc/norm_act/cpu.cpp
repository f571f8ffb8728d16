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
  int64_t group_channels() const { return layout.channels / groups; }
  int64_t voxels_of(int64_t chunk) const {
    return std::min(chunk_voxels, layout.voxels - chunk * chunk_voxels);
  }
  double group_size() const { return static_cast<double>(group_channels() * layout.voxels); }

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

// Where each chunk of a tensor of that shape and order of memory begins; null where there is no tensor.
class Chunks {
 public:
  Chunks(const Shape& shape, const MaybeTensor& tensor, bool written = false) : shape_(shape) {
    if (!tensor) return;
    // Only what is written is asked for as such: that has to be memory of its own.
    begin_ = written ? static_cast<char*>(tensor->mutable_data_ptr())
                     : const_cast<char*>(static_cast<const char*>(tensor->const_data_ptr()));
    const VoxelLayout own = readable_layout(*tensor);
    of_image_ = own.batch_stride * shape.size;
    of_channel_ = own.channel_stride * shape.size;
    of_chunk_ = shape.chunk_voxels * shape.line_channels * shape.size;
  }
  char* at(int64_t line, int64_t chunk) const {
    if (begin_ == nullptr) return nullptr;
    const int64_t image = line / shape_.lines_per_image, channel = line % shape_.lines_per_image;
    return begin_ + image * of_image_ + channel * of_channel_ + chunk * of_chunk_;
  }

 private:
  const Shape& shape_;
  char* begin_ = nullptr;
  int64_t of_image_ = 0, of_channel_ = 0, of_chunk_ = 0;
};

// What lies together and has statistics of its own: one group, or a channels-last image with all its groups.
struct Unit {
  int64_t image;
  int64_t first_group, last_group;
  int64_t first_channel, last_channel;
};

// first(line, chunk, scratch) for every chunk, between(unit) once its chunks are done, then second(line,
// chunk). The scratch, `numbers` of T, is the thread's own.
template <class T, class First, class Between, class Second>
void in_two_passes(const Shape& shape, int64_t numbers, const First& first, const Between& between,
                   const Second& second) {
  const int64_t units_per_image = shape.by_voxel ? 1 : shape.groups,
                units = shape.layout.batch * units_per_image;
  const int64_t of_unit = shape.lines() / units * shape.chunks;
  const int64_t threads = torch::stable::get_num_threads();
  const auto close = [&](int64_t unit) {
    const int64_t begin = shape.by_voxel ? 0 : unit % units_per_image,
                  end = shape.by_voxel ? shape.groups : begin + 1;
    between(Unit{unit / units_per_image, begin, end, begin * shape.group_channels(),
                 end * shape.group_channels()});
  };
  const auto measure = [&](int64_t begin, int64_t end, std::vector<T>& scratch) {
    for (int64_t i = begin; i < end; ++i) first(i / shape.chunks, i % shape.chunks, scratch.data());
  };
  const auto apply = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) second(i / shape.chunks, i % shape.chunks);
  };
  if (units % threads == 0 || units >= units_worth_a_thread * threads) {
    torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(numbers);
      for (int64_t unit = begin; unit < end; ++unit) {
        measure(unit * of_unit, (unit + 1) * of_unit, scratch);
        close(unit);
        apply(unit * of_unit, (unit + 1) * of_unit);
      }
    });
    return;
  }
  torch::stable::parallel_for(0, units * of_unit, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(numbers);
    measure(begin, end, scratch);
  });
  for (int64_t unit = 0; unit < units; ++unit) close(unit);
  torch::stable::parallel_for(0, units * of_unit, 1, apply);
}

// body(channel, group) for the channels of a unit.
template <class Body>
void for_each_channel(const Shape& shape, const Unit& unit, const Body& body) {
  const int64_t each = shape.group_channels();
  for (int64_t group = unit.first_group; group < unit.last_group; ++group) {
    for (int64_t c = group * each; c < (group + 1) * each; ++c) body(c, group);
  }
}

// Repeats the first `period` of `count` numbers.
template <class T>
void repeat(T* numbers, int64_t period, int64_t count) {
  for (int64_t i = period; i < count; ++i) numbers[i] = numbers[i - period];
}

// A number for each channel of every image, repeated as the kernels read it beside a line: see NormRun.
template <class T>
class Slots {
 public:
  Slots(const Shape& shape, int64_t slots) : shape_(shape), slots_(slots), values_(shape.lines() * slots) {}
  const T* of_line(int64_t line) const { return &values_[line * slots_]; }
  // value(channel, group) for the channels of a unit.
  template <class Value>
  void fill(const Unit& unit, const Value& value) {
    T* line = &values_[unit.image * shape_.lines_per_image * slots_];
    for_each_channel(shape_, unit, [&](int64_t c, int64_t group) {
      if (shape_.by_voxel) {
        line[c] = value(c, group);
      } else {
        std::fill_n(line + c * slots_, slots_, value(c, group));
      }
    });
    if (shape_.by_voxel) repeat(line, shape_.line_channels, slots_);
  }

 private:
  const Shape& shape_;
  int64_t slots_;
  std::vector<T> values_;
};

// Sums of every channel of every chunk, in double.
class ChunkSums {
 public:
  explicit ChunkSums(const Shape& shape)
      : shape_(shape), values_(shape.layout.batch * shape.layout.channels * shape.chunks) {}
  // Of all channels of the image.
  const double* of_chunk(int64_t image, int64_t chunk) const {
    return &values_[(image * shape_.chunks + chunk) * shape_.layout.channels];
  }
  double* of_chunk(int64_t image, int64_t chunk) {
    return &values_[(image * shape_.chunks + chunk) * shape_.layout.channels];
  }
  // Adds up the slots of a run; returns the sums of the line's channels.
  template <class T>
  double* fold(int64_t line, int64_t chunk, const T* slots, int64_t count) {
    const int64_t channels = shape_.line_channels;
    double* sums = of_chunk(line / shape_.lines_per_image, chunk) + line % shape_.lines_per_image;
    std::fill_n(sums, channels, 0.0);
    for (int64_t s = 0; s < count; s += channels) {
      for (int64_t c = 0; c < channels; ++c) sums[c] += static_cast<double>(slots[s + c]);
    }
    return sums;
  }
  // Of the unit's channels over all chunks, in order.
  std::vector<double> total(const Unit& unit) const {
    std::vector<double> sums(unit.last_channel - unit.first_channel);
    for (int64_t k = 0; k < shape_.chunks; ++k) {
      const double* of_channels = of_chunk(unit.image, k) + unit.first_channel;
      for (size_t c = 0; c < sums.size(); ++c) sums[c] += of_channels[c];
    }
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
  // From the statistics (B, groups) and the parameters (C).
  void fill(const Unit& unit, const Shape& shape, const T* means, const T* rstds,
            const std::vector<T>& weights, const std::vector<T>& biases) {
    const T *of_mean = means + unit.image * shape.groups, *of_rstd = rstds + unit.image * shape.groups;
    mean.fill(unit, [&](int64_t, int64_t group) { return of_mean[group]; });
    scale.fill(unit, [&](int64_t c, int64_t group) { return of_rstd[group] * weights[c]; });
    shift.fill(unit, [&](int64_t c, int64_t) { return biases[c]; });
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
  const Chunks x_chunks(shape, x), residual_chunks(shape, residual), y_chunks(shape, y, true);
  ChunkSums chunk_sums(shape), chunk_squares(shape);
  Affine<T> affine(shape, slots);
  const auto run_of = [&](int64_t line, int64_t chunk) {
    return NormRun{shape.type, shape.voxels_of(chunk) * shape.line_channels, slots, x_chunks.at(line, chunk)};
  };

  const auto measure = [&](int64_t line, int64_t chunk, T* scratch) {
    const NormRun run = run_of(line, chunk);
    T *sums = scratch, *centres = scratch + slots;
    std::fill_n(sums, slots, T(0));
    kernels.sums(run, sums);
    double* of_channels = chunk_sums.fold(line, chunk, sums, slots);
    // What is subtracted is what counts as the chunk's mean; the rest of it is below the rounding of the sum.
    const auto voxels = static_cast<double>(shape.voxels_of(chunk));
    for (int64_t c = 0; c < shape.line_channels; ++c) centres[c] = static_cast<T>(of_channels[c] / voxels);
    repeat(centres, shape.line_channels, slots);
    std::fill_n(sums, slots, T(0));
    kernels.squares(run, centres, sums);
    chunk_squares.fold(line, chunk, sums, slots);
  };
  const auto combine = [&](const Unit& unit) {
    const int64_t each = shape.group_channels(), count = unit.last_channel - unit.first_channel;
    std::vector<double> sums = chunk_sums.total(unit), centres(count), squares(count);
    for (int64_t first = 0; first < count; first += each) {
      const double sum = std::accumulate(&sums[first], &sums[first] + each, 0.0);
      std::fill_n(&centres[first], each, sum / shape.group_size());
    }
    for (int64_t k = 0; k < shape.chunks; ++k) {
      const auto voxels = static_cast<double>(shape.voxels_of(k));
      const double* of_sums = chunk_sums.of_chunk(unit.image, k) + unit.first_channel;
      const double* of_squares = chunk_squares.of_chunk(unit.image, k) + unit.first_channel;
      for (int64_t c = 0; c < count; ++c) {
        const double distance = of_sums[c] / voxels - centres[c];
        squares[c] += of_squares[c] + distance * distance * voxels;
      }
    }
    for (int64_t group = unit.first_group; group < unit.last_group; ++group) {
      const int64_t first = (group - unit.first_group) * each;
      const double square = std::accumulate(&squares[first], &squares[first] + each, 0.0);
      means[unit.image * shape.groups + group] = static_cast<T>(centres[first]);
      rstds[unit.image * shape.groups + group] =
          static_cast<T>(1 / std::sqrt(square / shape.group_size() + eps));
    }
    affine.fill(unit, shape, means, rstds, weights, biases);
  };
  const auto apply = [&](int64_t line, int64_t chunk) {
    kernels.forward(run_of(line, chunk),
                    {affine.of_line(line), residual_chunks.at(line, chunk), slope, y_chunks.at(line, chunk)});
  };
  in_two_passes<T>(shape, 2 * slots, measure, combine, apply);
}

template <class T>
void norm_backward(const Tensor& grad_y, const Tensor& x, const MaybeTensor& y, const Tensor& mean,
                   const Tensor& rstd, const MaybeTensor& weight, const MaybeTensor& bias, double slope,
                   const Tensor& grad_x, const MaybeTensor& grad_residual, std::vector<double>& grad_weight,
                   std::vector<double>& grad_bias) {
  const Shape shape(x, mean.size(1));
  const NormKernels& kernels = LUNGKIT_SELECT_KERNELS(norm_kernels);
  const int64_t slots = slots_of<T>(shape, kernels), channels = shape.layout.channels;
  const auto whole = [&](int64_t image) { return Unit{image, 0, shape.groups, 0, channels}; };
  const std::vector<T> weights = parameter_values<T>(weight, channels, 1),
                       biases = parameter_values<T>(bias, channels, 0);
  const Tensor own_mean = torch::stable::contiguous(mean), own_rstd = torch::stable::contiguous(rstd);
  const auto* means = static_cast<const T*>(own_mean.const_data_ptr());
  const auto* rstds = static_cast<const T*>(own_rstd.const_data_ptr());
  const Chunks x_chunks(shape, x), y_chunks(shape, y), grad_y_chunks(shape, grad_y),
      grad_x_chunks(shape, grad_x, true), grad_residual_chunks(shape, grad_residual, true);
  ChunkSums chunk_g(shape), chunk_gx(shape);
  Affine<T> affine(shape, slots);
  Slots<T> to_gradient(shape, slots), constant(shape, slots), to_x(shape, slots);
  for (int64_t image = 0; image < shape.layout.batch; ++image) {
    affine.fill(whole(image), shape, means, rstds, weights, biases);
  }
  // Of every image and channel, and from there on of the parameters.
  std::vector<double> image_g(shape.layout.batch * channels), image_gx(image_g.size());
  const auto run_of = [&](int64_t line, int64_t chunk) {
    return NormRun{shape.type, shape.voxels_of(chunk) * shape.line_channels, slots, x_chunks.at(line, chunk)};
  };
  const auto gradient_of = [&](int64_t line, int64_t chunk) {
    return NormGradient{affine.of_line(line), grad_y_chunks.at(line, chunk), y_chunks.at(line, chunk), slope};
  };

  const auto measure = [&](int64_t line, int64_t chunk, T* scratch) {
    T *sum_g = scratch, *sum_gx = scratch + slots;
    std::fill_n(scratch, 2 * slots, T(0));
    kernels.gradient_sums(run_of(line, chunk), gradient_of(line, chunk), sum_g, sum_gx);
    chunk_g.fold(line, chunk, sum_g, slots);
    chunk_gx.fold(line, chunk, sum_gx, slots);
  };
  const auto combine = [&](const Unit& unit) {
    const std::vector<double> sums_g = chunk_g.total(unit), sums_gx = chunk_gx.total(unit);
    std::copy(sums_g.begin(), sums_g.end(), &image_g[unit.image * channels + unit.first_channel]);
    std::copy(sums_gx.begin(), sums_gx.end(), &image_gx[unit.image * channels + unit.first_channel]);
    const T* inverses = rstds + unit.image * shape.groups;
    const int64_t first = unit.first_group, count = unit.last_group - first;
    std::vector<double> of_g(count), of_gx(count);
    for_each_channel(shape, unit, [&](int64_t c, int64_t group) {
      of_g[group - first] += static_cast<double>(weights[c]) * sums_g[c - unit.first_channel];
      of_gx[group - first] += static_cast<double>(weights[c]) * sums_gx[c - unit.first_channel];
    });
    for (int64_t g = 0; g < count; ++g) {
      const auto inverse = static_cast<double>(inverses[first + g]);
      of_g[g] *= inverse / shape.group_size();
      of_gx[g] *= inverse * inverse * inverse / shape.group_size();
    }
    to_gradient.fill(unit, [&](int64_t c, int64_t group) { return inverses[group] * weights[c]; });
    constant.fill(unit, [&](int64_t, int64_t group) { return static_cast<T>(of_g[group - first]); });
    to_x.fill(unit, [&](int64_t, int64_t group) { return static_cast<T>(of_gx[group - first]); });
  };
  const auto apply = [&](int64_t line, int64_t chunk) {
    kernels.input_gradient(run_of(line, chunk), gradient_of(line, chunk),
                           {to_gradient.of_line(line), constant.of_line(line), to_x.of_line(line),
                            grad_x_chunks.at(line, chunk), grad_residual_chunks.at(line, chunk)});
  };
  in_two_passes<T>(shape, 2 * slots, measure, combine, apply);
  for (int64_t image = 0; image < shape.layout.batch; ++image) {
    const double *of_g = &image_g[image * channels], *of_gx = &image_gx[image * channels];
    const T* inverses = rstds + image * shape.groups;
    for_each_channel(shape, whole(image), [&](int64_t c, int64_t group) {
      grad_bias[c] += of_g[c];
      grad_weight[c] += of_gx[c] * static_cast<double>(inverses[group]);
    });
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
