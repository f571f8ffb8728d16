// Two launches forward beside a small one between them, likewise backward: statistics of chunks, their
// combination in order, and one pass that writes. Channels that one block holds (the deep levels of a
// network) take a single launch and are read once; backward, sums over the images take a second. No atomics:
// the same bits for any number of multiprocessors.
#include <algorithm>
#include <cmath>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../support/cuda_launch.h"
#include "../support/parallel.h"
#include "arguments.h"
#include "cuda_backward.h"
#include "cuda_forward.h"

namespace lungkit {
namespace {

// Whether every vector of 16 bytes of a tensor begins on a boundary of 16 bytes.
bool has_whole_vectors(const Tensor& tensor, bool by_voxel) {
  const VoxelLayout layout = readable_layout(tensor);
  const int64_t per_vector = 16 / element_size(tensor.scalar_type());
  const bool starts = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  const bool images = layout.batch == 1 || layout.batch_stride % per_vector == 0;
  if (by_voxel) return starts && images && layout.channels % per_vector == 0;
  const bool lines = layout.channels == 1 || layout.channel_stride % per_vector == 0;
  return starts && images && lines && layout.voxels % per_vector == 0;
}

bool have_whole_vectors(bool by_voxel, std::initializer_list<const MaybeTensor*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const MaybeTensor* tensor) {
    return !*tensor || has_whole_vectors(**tensor, by_voxel);
  });
}

// A block reads `vectors` of each thread at a time, and does so as often as leaves about `blocks` of them:
// fewer sums to combine, but work for every multiprocessor. The shape alone decides, so that results have the
// same bits on any device.
struct Plan {
  int vectors;
  int64_t blocks;
};
constexpr int64_t most_batches = 16;
constexpr int fewest_threads = 32;  // at least one a channel of a block that holds its channels
constexpr Plan moments_plan{moment_vectors, 1024}, gradient_sums_plan{gradient_vectors, 1024};
constexpr Plan apply_plan{apply_vectors, 4096}, input_gradient_plan{gradient_vectors, 4096};

template <class P>
int64_t lines_of(const Shape& shape) {
  return shape.layout.batch *
         (P::by_voxel ? ceil_div(shape.layout.channels / P::vec, shape.tile) : shape.layout.channels);
}

// With a tile of at most `widest_tile` vectors, and a chunk still to be chosen.
template <class P>
Shape tiled_shape(const Tensor& x, int64_t groups, int64_t widest_tile, int threads = block_threads) {
  Shape shape{};
  shape.layout = readable_layout(x);
  shape.groups = static_cast<int>(groups);
  shape.group_channels = static_cast<int>(shape.layout.channels / groups);
  shape.tile = P::by_voxel ? static_cast<int>(std::min(shape.layout.channels / P::vec, widest_tile)) : 1;
  shape.rows = threads / shape.tile;
  const int balanced = static_cast<int>(std::ceil(std::sqrt(shape.rows)));
  shape.parts = std::clamp(threads / (shape.tile * P::sums), 1, balanced);
  return shape;
}

template <class P>
int64_t rows_of(const Shape& shape) {
  return P::by_voxel ? shape.layout.voxels : shape.layout.voxels / P::vec;
}

template <class P>
Shape shape_of(const Tensor& x, int64_t groups, const Plan& plan) {
  Shape shape = tiled_shape<P>(x, groups, block_threads);
  const int64_t batch = int64_t{shape.rows} * plan.vectors, batches = ceil_div(rows_of<P>(shape), batch);
  const int64_t of_block = std::clamp(lines_of<P>(shape) * batches / plan.blocks, int64_t{1}, most_batches);
  const int64_t chunks = ceil_div(batches, of_block);
  LUNGKIT_CHECK(chunks < int64_t{1} << 31, "norm_act: too many voxels for one launch: ", shape.layout.voxels);
  shape.chunk_rows = static_cast<int>(batch * of_block);
  shape.chunks = static_cast<int>(chunks);
  return shape;
}

// Where a block with `vectors` of each thread holds its channels, each a group of its own: blocks as wide as
// the 32 bytes that memory is read in, or as they must be to hold all voxels; of no more threads than have a
// vector, since a multiprocessor holds the more of the many blocks of a deep level the smaller they are.
template <class P>
std::optional<Shape> small_shape_of(const Tensor& x, int64_t groups, int vectors) {
  if (groups != x.size(1)) return std::nullopt;
  for (int64_t tile = 32 / static_cast<int64_t>(sizeof(typename P::Stored) * P::vec); tile > 0; tile /= 2) {
    Shape shape = tiled_shape<P>(x, groups, tile);
    if (rows_of<P>(shape) > int64_t{shape.rows} * vectors) continue;
    for (int threads = block_threads / 2; threads >= fewest_threads; threads /= 2) {
      if (rows_of<P>(shape) <= threads / shape.tile) shape = tiled_shape<P>(x, groups, tile, threads);
    }
    shape.chunks = 1;
    shape.chunk_rows = shape.rows * vectors;
    return shape;
  }
  return std::nullopt;
}

// Of a block that holds its channels.
unsigned threads_of(const Shape& shape) {
  return static_cast<unsigned>(ceil_div(int64_t{shape.rows} * shape.tile, 32) * 32);
}

template <class P>
dim3 grid_of(const Shape& shape) {
  const int64_t lines = lines_of<P>(shape);
  LUNGKIT_CHECK(lines < 65536, "norm_act: at most 65535 images times channels, got ", shape.layout.batch,
                " x ", shape.layout.channels);
  return dim3(static_cast<unsigned>(shape.chunks), static_cast<unsigned>(lines));
}

// body(Place<...>), which is not a value but names the type
template <class P>
struct Access {
  using type = P;
};
template <class Stored, class Body>
void with_access(bool vectors, bool by_voxel, const Body& body) {
  if (vectors && by_voxel) return body(Access<Place<Stored, widest<Stored>, true>>{});
  if (vectors) return body(Access<Place<Stored, widest<Stored>, false>>{});
  if (by_voxel) return body(Access<Place<Stored, 1, true>>{});
  return body(Access<Place<Stored, 1, false>>{});
}

template <class Stored>
Input<Stored> input(const MaybeTensor& tensor) {
  if (!tensor) return {nullptr, 0, 0};
  const VoxelLayout layout = readable_layout(*tensor);
  return {static_cast<const Stored*>(tensor->const_data_ptr()), layout.batch_stride, layout.channel_stride};
}
template <class Stored>
Output<Stored> output(const MaybeTensor& tensor) {
  if (!tensor) return {nullptr, 0, 0};
  const VoxelLayout layout = readable_layout(*tensor);
  return {static_cast<Stored*>(tensor->mutable_data_ptr()), layout.batch_stride, layout.channel_stride};
}

// A parameter in the type of the sums, kept alive by `held`.
template <class Sum>
const Sum* parameter_of(const MaybeTensor& parameter, MaybeTensor& held) {
  if (!parameter) return nullptr;
  constexpr ScalarType type = std::is_same_v<Sum, double> ? ScalarType::Double : ScalarType::Float;
  const bool as_it_is = parameter->scalar_type() == type && parameter->stride(0) == 1;
  held = as_it_is ? *parameter : torch::stable::contiguous(torch::stable::to(*parameter, type));
  return static_cast<const Sum*>(held->const_data_ptr());
}

template <class Sum>
Partials<Sum> partials_in(const Tensor& memory) {
  auto* first = static_cast<Sum*>(memory.mutable_data_ptr());
  return {first, first + memory.size(1)};
}

template <class Sum>
Tensor new_sums(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_empty(like, std::vector<int64_t>(size),
                                  std::is_same_v<Sum, double> ? ScalarType::Double : ScalarType::Float);
}

template <class Stored>
void launch_forward(const Tensor& x, const Tensor& y, const Tensor& mean, const Tensor& rstd,
                    const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
                    double eps, double slope) {
  using Sum = accumulate_t<Stored>;
  const bool by_voxel = is_by_voxel(x);
  const MaybeTensor read = x, written = y;
  MaybeTensor held_weight, held_bias;
  const Parameters<Stored> parameters{parameter_of<Sum>(weight, held_weight),
                                      parameter_of<Sum>(bias, held_bias), static_cast<Sum>(eps),
                                      static_cast<Sum>(slope)};
  auto* means = static_cast<Sum*>(mean.mutable_data_ptr());
  auto* rstds = static_cast<Sum*>(rstd.mutable_data_ptr());
  [[maybe_unused]] const cudaStream_t stream = current_stream(x);
  const bool vectors = have_whole_vectors(by_voxel, {&read, &written, &residual});
  with_access<Stored>(vectors, by_voxel, [&](auto access) {
    using P = typename decltype(access)::type;
    const int64_t groups = mean.size(1);
    if (const auto small = small_shape_of<P>(x, groups, small_forward_vectors)) {
      LUNGKIT_LAUNCH((norm_small_kernel<P>), grid_of<P>(*small), threads_of(*small), 0, stream, *small,
                     input<Stored>(read), input<Stored>(residual), output<Stored>(written), means, rstds,
                     parameters);
      return;
    }
    const Shape shape = shape_of<P>(x, groups, moments_plan), writing = shape_of<P>(x, groups, apply_plan);
    const Tensor memory = new_sums<Sum>(x, {2, shape.layout.batch * shape.layout.channels * shape.chunks});
    const Partials<Sum> partials = partials_in<Sum>(memory);
    LUNGKIT_LAUNCH((norm_moments_kernel<P>), grid_of<P>(shape), block_threads, 0, stream, shape,
                   input<Stored>(read), partials);
    LUNGKIT_LAUNCH((norm_combine_kernel<Sum>), static_cast<unsigned>(shape.layout.batch * groups),
                   block_threads, 0, stream, shape, shape.chunk_rows * P::weight, partials, parameters.eps,
                   means, rstds);
    LUNGKIT_LAUNCH((norm_apply_kernel<P>), grid_of<P>(writing), block_threads, 0, stream, writing,
                   input<Stored>(read), input<Stored>(residual), output<Stored>(written), means, rstds,
                   parameters);
  });
}

std::pair<Tensor, Tensor> into(const Tensor& values, const Tensor& y, const MaybeTensor& weight,
                               const MaybeTensor& bias, const MaybeTensor& residual, int64_t groups,
                               double eps, double slope) {
  const ScalarType sums = values.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor mean = torch::stable::new_empty(values, {values.size(0), groups}, sums);
  Tensor rstd = torch::stable::new_empty(values, {values.size(0), groups}, sums);
  if (values.numel() == 0) return {mean, rstd};
  const MaybeTensor added = residual ? MaybeTensor(with_runs_like(values, *residual)) : residual;
  dispatch_floating(values.scalar_type(), "norm_act", [&](auto zero) {
    launch_forward<decltype(zero)>(values, y, mean, rstd, weight, bias, added, eps, slope);
  });
  return {mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_cuda(const Tensor& x, const MaybeTensor& weight,
                                                 const MaybeTensor& bias, const MaybeTensor& residual,
                                                 int64_t groups, double eps, double slope) {
  check_norm_act("norm_act", x, weight, bias, residual, groups, slope);
  LUNGKIT_CHECK(on_device(x), "norm_act: x must be on the GPU");
  const DeviceGuard guard(x);
  const Tensor values = with_runs(x);
  Tensor y = new_features(values);
  const auto [mean, rstd] = into(values, y, weight, bias, residual, groups, eps, slope);
  return {y, mean, rstd};
}

void norm_act_in_place_cuda(Tensor x, const MaybeTensor& weight, const MaybeTensor& bias,
                            const MaybeTensor& residual, int64_t groups, double eps, double slope) {
  check_norm_act("norm_act_", x, weight, bias, residual, groups, slope);
  check_written("norm_act_", x);
  LUNGKIT_CHECK(on_device(x), "norm_act_: x must be on the GPU");
  const DeviceGuard guard(x);
  const Tensor values = with_runs(x);
  into(values, values, weight, bias, residual, groups, eps, slope);
  if (values.const_data_ptr() != x.const_data_ptr()) torch::stable::copy_(x, values);
}

template <class Stored>
void launch_backward(const Tensor& grad_y, const Tensor& x, const MaybeTensor& y, const Tensor& mean,
                     const Tensor& rstd, const MaybeTensor& weight, const MaybeTensor& bias, double slope,
                     const Tensor& grad_x, const MaybeTensor& grad_residual, const Tensor& grad_weight,
                     const Tensor& grad_bias) {
  using Sum = accumulate_t<Stored>;
  const bool by_voxel = is_by_voxel(x);
  const MaybeTensor slopes = grad_y, read = x, written = grad_x;
  MaybeTensor held_weight, held_bias;
  const Parameters<Stored> parameters{parameter_of<Sum>(weight, held_weight),
                                      parameter_of<Sum>(bias, held_bias), Sum(0), static_cast<Sum>(slope)};
  const auto* means = static_cast<const Sum*>(mean.const_data_ptr());
  const auto* rstds = static_cast<const Sum*>(rstd.const_data_ptr());
  [[maybe_unused]] const cudaStream_t stream = current_stream(x);
  const bool vectors = have_whole_vectors(by_voxel, {&slopes, &read, &y, &written, &grad_residual});
  // body(grad_weight, grad_bias), null where they are not asked for
  const auto with_parameter_gradients = [&](const auto& body) {
    const Tensor& like = weight ? grad_weight : grad_bias;
    dispatch_floating(like.scalar_type(), "norm_act_backward", [&](auto zero) {
      const auto to = [](const Tensor& gradient) {
        return gradient.numel() == 0 ? nullptr : static_cast<decltype(zero)*>(gradient.mutable_data_ptr());
      };
      body(to(grad_weight), to(grad_bias));
    });
  };
  with_access<Stored>(vectors, by_voxel, [&](auto access) {
    using P = typename decltype(access)::type;
    const int64_t groups = mean.size(1);
    if (const auto small = small_shape_of<P>(x, groups, small_backward_vectors)) {
      const Tensor memory = new_sums<Sum>(x, {2, small->layout.batch * small->layout.channels});
      const Partials<Sum> partials = partials_in<Sum>(memory);
      const dim3 grid = grid_of<P>(*small);
      const auto launch = [&]<bool with_y>() {
        LUNGKIT_LAUNCH((norm_small_gradient_kernel<P, with_y>), grid, threads_of(*small), 0, stream, *small,
                       input<Stored>(slopes), input<Stored>(read), input<Stored>(y), means, rstds, parameters,
                       partials, output<Stored>(written), output<Stored>(grad_residual));
      };
      y ? launch.template operator()<true>() : launch.template operator()<false>();
      if (!weight && !bias) return;
      with_parameter_gradients([&](auto* of_weight, auto* of_bias) {
        using Parameter = std::remove_pointer_t<decltype(of_weight)>;
        const auto blocks = static_cast<unsigned>(ceil_div(small->layout.channels, block_threads));
        LUNGKIT_LAUNCH((norm_parameter_gradients_kernel<Sum, Parameter>), blocks, block_threads, 0, stream,
                       *small, partials, of_weight, of_bias);
      });
      return;
    }
    const Shape shape = shape_of<P>(x, groups, gradient_sums_plan);
    const Shape writing = shape_of<P>(x, groups, input_gradient_plan);
    const Tensor memory = new_sums<Sum>(x, {2, shape.layout.batch * shape.layout.channels * shape.chunks});
    const Tensor by_group = new_sums<Sum>(x, {2, shape.layout.batch * groups});
    const Partials<Sum> partials = partials_in<Sum>(memory);
    auto* constant = static_cast<Sum*>(by_group.mutable_data_ptr());
    const Coefficients<Sum> coefficients{constant, constant + by_group.size(1)};
    LUNGKIT_LAUNCH((norm_gradient_sums_kernel<P>), grid_of<P>(shape), block_threads, 0, stream, shape,
                   input<Stored>(slopes), input<Stored>(read), input<Stored>(y), means, rstds, parameters,
                   partials);
    with_parameter_gradients([&](auto* of_weight, auto* of_bias) {
      using Parameter = std::remove_pointer_t<decltype(of_weight)>;
      LUNGKIT_LAUNCH((norm_combine_gradients_kernel<Sum, Parameter>), static_cast<unsigned>(groups),
                     block_threads, 0, stream, shape, partials, rstds, parameters.weight, coefficients,
                     of_weight, of_bias);
    });
    const auto launch = [&]<bool with_y>() {
      LUNGKIT_LAUNCH((norm_input_gradient_kernel<P, with_y>), grid_of<P>(writing), block_threads, 0, stream,
                     writing, input<Stored>(slopes), input<Stored>(read), input<Stored>(y), means, rstds,
                     parameters, coefficients, output<Stored>(written), output<Stored>(grad_residual));
    };
    y ? launch.template operator()<true>() : launch.template operator()<false>();
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_backward_cuda(
    const Tensor& grad_y, const Tensor& x, const MaybeTensor& y, const Tensor& mean, const Tensor& rstd,
    const MaybeTensor& weight, const MaybeTensor& bias, double slope, bool needs_residual) {
  check_norm_act_backward(grad_y, x, y, mean, rstd, weight, bias, slope, needs_residual);
  LUNGKIT_CHECK(on_device(x), "norm_act_backward: x must be on the GPU");
  const DeviceGuard guard(x);
  const Tensor values = with_runs(x), slopes = with_runs_like(values, grad_y);
  const MaybeTensor signs = y ? MaybeTensor(with_runs_like(values, *y)) : y;
  Tensor grad_x = new_features(values);
  MaybeTensor grad_residual;
  if (needs_residual) grad_residual = new_features(values);
  // One kernel writes the gradients of both parameters: of different dtypes they pass through that of the
  // sums.
  const bool mixed = weight && bias && weight->scalar_type() != bias->scalar_type();
  const auto gradient_of = [&](const MaybeTensor& parameter) {
    if (!parameter) return torch::stable::new_empty(x, {0});
    return x.numel() == 0 ? torch::stable::new_zeros(*parameter, {x.size(1)})
                          : torch::stable::new_empty(*parameter, {x.size(1)},
                                                     mixed ? mean.scalar_type() : parameter->scalar_type());
  };
  Tensor grad_weight = gradient_of(weight), grad_bias = gradient_of(bias);
  if (x.numel() > 0) {
    dispatch_floating(x.scalar_type(), "norm_act_backward", [&](auto zero) {
      launch_backward<decltype(zero)>(slopes, values, signs, torch::stable::contiguous(mean),
                                      torch::stable::contiguous(rstd), weight, bias, slope, grad_x,
                                      grad_residual, grad_weight, grad_bias);
    });
  }
  if (mixed) {
    grad_weight = torch::stable::to(grad_weight, weight->scalar_type());
    grad_bias = torch::stable::to(grad_bias, bias->scalar_type());
  }
  return {grad_x, grad_weight, grad_bias, grad_residual ? *grad_residual : torch::stable::new_empty(x, {0})};
}

}  // namespace

LUNGKIT_CUDA_LIBRARY(m) {
  m.impl("norm_act", TORCH_BOX(&norm_act_cuda));
  m.impl("norm_act_", TORCH_BOX(&norm_act_in_place_cuda));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward_cuda));
}

}  // namespace lungkit
