// Two launches forward beside a small one between them, likewise backward: statistics of chunks, their
// combination in order, and one pass that writes. A channel that one block holds (the deep levels of a
// network) takes a single launch and is read once. No atomics: the same bits for any number of
// multiprocessors.
#include <algorithm>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../support/cuda_launch.h"
#include "../support/parallel.h"
#include "arguments.h"

namespace lungkit {
namespace {

constexpr int block_threads = 256;
constexpr int warps = block_threads / 32;
constexpr int vectors_per_thread = 4;
constexpr unsigned all_lanes = 0xffffffffu;

template <class Stored>
constexpr int widest = 16 / sizeof(Stored);

template <class Stored, int vec>
struct __align__(sizeof(Stored) * vec) Pack {
  Stored values[vec];
};

// Where blocks and threads find their elements. Channels-first: a line is a channel of an image, blocks take
// chunks of it, a thread's vectors are of one channel. Channels-last: a line is an image, blocks take chunks
// of voxels and a tile of channels, and a thread stays with the channels of its vector.
struct Shape {
  VoxelLayout layout;  // of x; the others lie in the same order of memory, with batch strides of their own
  int64_t groups;
  int64_t chunks;
  int chunk_rows;  // channels-first: vectors in a chunk; channels-last: voxels
  int tile;        // channels-last: channel vectors of a block
};

template <class Stored, int vec, bool by_voxel>
struct Place {
  __device__ explicit Place(const Shape& shape) {
    chunk = blockIdx.x;
    if constexpr (by_voxel) {
      const int vectors = static_cast<int>(shape.layout.channels) / vec;
      const int tiles = (vectors + shape.tile - 1) / shape.tile;
      image = blockIdx.y / tiles;
      tile = shape.tile;
      row = threadIdx.x / shape.tile;
      rows = block_threads / shape.tile;
      column = threadIdx.x % shape.tile;
      const int vector = static_cast<int>(blockIdx.y) % tiles * shape.tile + column;
      channel = vector * vec;
      active = vector < vectors && row < rows;
    } else {
      image = blockIdx.y / shape.layout.channels;
      channel = blockIdx.y % shape.layout.channels;
      tile = 1;
      row = threadIdx.x;
      rows = block_threads;
      column = 0;
      active = true;
    }
    const int64_t first = chunk * shape.chunk_rows;
    const int64_t all = by_voxel ? shape.layout.voxels : shape.layout.voxels / vec;
    here = static_cast<int>(min(int64_t{shape.chunk_rows}, all - first));
    line = (by_voxel ? 0 : channel * shape.layout.channel_stride);
    origin = by_voxel ? first * shape.layout.channels + channel : first * vec;
    step = by_voxel ? shape.layout.channels : vec;
  }
  // Whether the thread's k-th vector exists.
  __device__ bool has(int k) const { return active && row + k * rows < here; }
  __device__ int64_t at(int64_t batch_stride, int k) const {
    return image * batch_stride + line + origin + int64_t{row + k * rows} * step;
  }
  __device__ double elements() const { return static_cast<double>(here) * (by_voxel ? 1 : vec); }

  int64_t chunk, image, channel, line, origin, step;
  int row, rows, column, tile, here;
  bool active;
};

template <class Stored>
struct Input {
  const Stored* data;
  int64_t batch_stride;
};
template <class Stored>
struct Output {
  Stored* data;
  int64_t batch_stride;
};

template <class Stored, int vec, class P>
__device__ Pack<Stored, vec> read_pack(const Input<Stored>& from, const P& place, int k) {
  return *reinterpret_cast<const Pack<Stored, vec>*>(from.data + place.at(from.batch_stride, k));
}
template <class Stored, int vec, class P>
__device__ void write_pack(const Output<Stored>& to, const P& place, int k, const Pack<Stored, vec>& pack) {
  *reinterpret_cast<Pack<Stored, vec>*>(to.data + place.at(to.batch_stride, k)) = pack;
}

template <class T>
__device__ T warp_sum(T value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(all_lanes, value, step);
  return value;
}

template <class T>
__device__ T block_sum(T value) {
  __shared__ T of_warp[warps];
  value = warp_sum(value);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  for (int w = 0; w < warps; ++w) total += of_warp[w];
  return total;
}

// Adds up what the threads of one channel hold; every thread gets the sums of its own channels.
template <class Sum, int vec, bool by_voxel, class P>
__device__ void sum_over_block(Sum (&sums)[by_voxel ? vec : 1], const P& place) {
  if constexpr (!by_voxel) {
    sums[0] = block_sum(sums[0]);
  } else {
    __shared__ Sum shared[block_threads * vec];
    Sum* mine = shared + threadIdx.x * vec;
    const int tile = place.tile;
    __syncthreads();
    for (int e = 0; e < vec; ++e) mine[e] = sums[e];
    for (int left = place.rows; left > 1;) {
      const int half = (left + 1) / 2;
      __syncthreads();
      if (place.row + half < left) {
        for (int e = 0; e < vec; ++e) mine[e] += mine[half * tile * vec + e];
      }
      left = half;
    }
    __syncthreads();
    for (int e = 0; e < vec; ++e) sums[e] = shared[place.column * vec + e];
  }
}

// Mean and sum of squared distances to it of every channel of every chunk, at [(image C + channel) chunks +
// chunk].
template <class Sum>
struct Partials {
  Sum* first;
  Sum* second;
};

template <class Sum, int vec, bool by_voxel, class P>
__device__ void write_partials(const Shape& shape, const P& place, const Partials<Sum>& to,
                               const Sum (&first)[by_voxel ? vec : 1],
                               const Sum (&second)[by_voxel ? vec : 1]) {
  if (place.row != 0 || !place.active) return;
  for (int e = 0; e < (by_voxel ? vec : 1); ++e) {
    const int64_t i = (place.image * shape.layout.channels + place.channel + e) * shape.chunks + place.chunk;
    to.first[i] = first[e];
    to.second[i] = second[e];
  }
}

template <class Stored>
struct Parameters {
  using Sum = accumulate_t<Stored>;
  const Sum* weight;  // null: 1
  const Sum* bias;    // null: 0
  Sum eps;
  Sum slope;
};

template <class Sum>
__device__ Sum activated(Sum value, Sum slope) {
  return value > Sum(0) ? value : value * slope;
}

template <class Stored, int vec, bool by_voxel>
struct Chunk {
  using Sum = accumulate_t<Stored>;
  static constexpr int sums = by_voxel ? vec : 1;

  __device__ void read(const Input<Stored>& x, const Place<Stored, vec, by_voxel>& place) {
    for (int k = 0; k < vectors_per_thread; ++k) {
      if (place.has(k)) packs[k] = read_pack<Stored, vec>(x, place, k);
    }
  }
  __device__ void measure(const Place<Stored, vec, by_voxel>& place, Sum (&mean)[sums],
                          Sum (&squares)[sums]) const {
    for (int e = 0; e < sums; ++e) mean[e] = squares[e] = Sum(0);
    for_each(place, [&](int e, Sum value) { mean[e] += value; });
    sum_over_block<Sum, vec, by_voxel>(mean, place);
    const Sum share = Sum(1) / static_cast<Sum>(place.elements());
    for (int e = 0; e < sums; ++e) mean[e] *= share;
    for_each(place, [&](int e, Sum value) { squares[e] += (value - mean[e]) * (value - mean[e]); });
    sum_over_block<Sum, vec, by_voxel>(squares, place);
  }
  template <class Body>
  __device__ void for_each(const Place<Stored, vec, by_voxel>& place, const Body& body) const {
    for (int k = 0; k < vectors_per_thread; ++k) {
      if (!place.has(k)) continue;
      for (int e = 0; e < vec; ++e) body(by_voxel ? e : 0, static_cast<Sum>(packs[k].values[e]));
    }
  }
  // leaky((x - mean) scale + shift + residual)
  __device__ void write(const Place<Stored, vec, by_voxel>& place, const Sum (&mean)[sums],
                        const Sum (&scale)[sums], const Sum (&shift)[sums], const Input<Stored>& residual,
                        const Output<Stored>& y, Sum slope) const {
    for (int k = 0; k < vectors_per_thread; ++k) {
      if (!place.has(k)) continue;
      Pack<Stored, vec> out, other;
      if (residual.data != nullptr) other = read_pack<Stored, vec>(residual, place, k);
      for (int e = 0; e < vec; ++e) {
        const int c = by_voxel ? e : 0;
        Sum value = (static_cast<Sum>(packs[k].values[e]) - mean[c]) * scale[c] + shift[c];
        if (residual.data != nullptr) value += static_cast<Sum>(other.values[e]);
        out.values[e] = static_cast<Stored>(activated(value, slope));
      }
      write_pack<Stored, vec>(y, place, k, out);
    }
  }
  Pack<Stored, vec> packs[vectors_per_thread];
};

template <class Stored, int vec, bool by_voxel>
__global__ void __launch_bounds__(block_threads)
    norm_moments_kernel(Shape shape, Input<Stored> x, Partials<accumulate_t<Stored>> partials) {
  using Sum = accumulate_t<Stored>;
  const Place<Stored, vec, by_voxel> place(shape);
  Chunk<Stored, vec, by_voxel> chunk;
  chunk.read(x, place);
  Sum mean[by_voxel ? vec : 1], squares[by_voxel ? vec : 1];
  chunk.measure(place, mean, squares);
  write_partials<Sum, vec, by_voxel>(shape, place, partials, mean, squares);
}

// One block a group of an image.
template <class Sum>
__global__ void __launch_bounds__(block_threads)
    norm_combine_kernel(Shape shape, int64_t chunk_elements, Partials<Sum> partials, Sum eps, Sum* mean,
                        Sum* rstd) {
  const int64_t channels = shape.layout.channels / shape.groups, count = channels * shape.chunks;
  const int64_t first = int64_t{blockIdx.x} * count;
  const auto elements = [&](int64_t i) {
    return static_cast<double>(min(chunk_elements, shape.layout.voxels - i % shape.chunks * chunk_elements));
  };
  const double all = static_cast<double>(channels * shape.layout.voxels);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += block_threads) sum += partials.first[first + i] * elements(i);
  const double centre = block_sum(sum) / all;
  double squares = 0;
  for (int64_t i = threadIdx.x; i < count; i += block_threads) {
    const double distance = partials.first[first + i] - centre;
    squares += partials.second[first + i] + distance * distance * elements(i);
  }
  squares = block_sum(squares);
  if (threadIdx.x != 0) return;
  mean[blockIdx.x] = static_cast<Sum>(centre);
  rstd[blockIdx.x] = static_cast<Sum>(1 / sqrt(squares / all + static_cast<double>(eps)));
}

// mean, scale and shift of a thread's channels.
template <class Stored, int sums, class P>
__device__ void read_affine(const Shape& shape, const P& place, const accumulate_t<Stored>* mean,
                            const accumulate_t<Stored>* rstd, const Parameters<Stored>& parameters,
                            accumulate_t<Stored> (&means)[sums], accumulate_t<Stored> (&scales)[sums],
                            accumulate_t<Stored> (&shifts)[sums]) {
  using Sum = accumulate_t<Stored>;
  for (int e = 0; e < sums; ++e) {
    const int64_t channel = place.active ? place.channel + e : 0;
    const int64_t row = place.image * shape.groups + channel / (shape.layout.channels / shape.groups);
    means[e] = mean[row];
    scales[e] = rstd[row] * (parameters.weight == nullptr ? Sum(1) : parameters.weight[channel]);
    shifts[e] = parameters.bias == nullptr ? Sum(0) : parameters.bias[channel];
  }
}

template <class Stored, int vec, bool by_voxel>
__global__ void __launch_bounds__(block_threads)
    norm_apply_kernel(Shape shape, Input<Stored> x, Input<Stored> residual, Output<Stored> y,
                      const accumulate_t<Stored>* __restrict__ mean,
                      const accumulate_t<Stored>* __restrict__ rstd, Parameters<Stored> parameters) {
  using Sum = accumulate_t<Stored>;
  constexpr int sums = by_voxel ? vec : 1;
  const Place<Stored, vec, by_voxel> place(shape);
  Chunk<Stored, vec, by_voxel> chunk;
  chunk.read(x, place);
  Sum means[sums], scales[sums], shifts[sums];
  read_affine<Stored, sums>(shape, place, mean, rstd, parameters, means, scales, shifts);
  chunk.write(place, means, scales, shifts, residual, y, parameters.slope);
}

// A channel that one block holds: read once.
template <class Stored, int vec>
__global__ void __launch_bounds__(block_threads)
    norm_small_kernel(Shape shape, Input<Stored> x, Input<Stored> residual, Output<Stored> y,
                      accumulate_t<Stored>* __restrict__ mean, accumulate_t<Stored>* __restrict__ rstd,
                      Parameters<Stored> parameters) {
  using Sum = accumulate_t<Stored>;
  const Place<Stored, vec, false> place(shape);
  Chunk<Stored, vec, false> chunk;
  chunk.read(x, place);
  Sum means[1], squares[1];
  chunk.measure(place, means, squares);
  const Sum inverse = static_cast<Sum>(
      1 / sqrt(static_cast<double>(squares[0]) / place.elements() + static_cast<double>(parameters.eps)));
  if (threadIdx.x == 0) {
    mean[blockIdx.y] = means[0];
    rstd[blockIdx.y] = inverse;
  }
  const Sum scales[1] = {inverse *
                         (parameters.weight == nullptr ? Sum(1) : parameters.weight[place.channel])};
  const Sum shifts[1] = {parameters.bias == nullptr ? Sum(0) : parameters.bias[place.channel]};
  chunk.write(place, means, scales, shifts, residual, y, parameters.slope);
}

// The gradient before the activation: the side of the activation is y's sign where y is given.
template <class Stored, int vec, bool by_voxel>
struct GradientChunk {
  using Sum = accumulate_t<Stored>;
  static constexpr int sums = by_voxel ? vec : 1;

  template <class Body>
  __device__ static void for_each(const Shape& shape, const Place<Stored, vec, by_voxel>& place,
                                  const Input<Stored>& grad_y, const Input<Stored>& x, const Input<Stored>& y,
                                  const Sum (&mean)[sums], const Sum (&scale)[sums], const Sum (&shift)[sums],
                                  Sum slope, const Body& body) {
    Pack<Stored, vec> slopes[vectors_per_thread], values[vectors_per_thread];
    for (int k = 0; k < vectors_per_thread; ++k) {
      if (!place.has(k)) continue;
      slopes[k] = read_pack<Stored, vec>(grad_y, place, k);
      values[k] = read_pack<Stored, vec>(x, place, k);
    }
    for (int k = 0; k < vectors_per_thread; ++k) {
      if (!place.has(k)) continue;
      Pack<Stored, vec> signs;
      if (y.data != nullptr) signs = read_pack<Stored, vec>(y, place, k);
      Sum gradient[vec], centred[vec];
      for (int e = 0; e < vec; ++e) {
        const int c = by_voxel ? e : 0;
        centred[e] = static_cast<Sum>(values[k].values[e]) - mean[c];
        const Sum sign =
            y.data != nullptr ? static_cast<Sum>(signs.values[e]) : centred[e] * scale[c] + shift[c];
        const Sum g = static_cast<Sum>(slopes[k].values[e]);
        gradient[e] = sign > Sum(0) ? g : g * slope;
      }
      body(k, gradient, centred);
    }
  }
};

template <class Stored, int vec, bool by_voxel>
__global__ void __launch_bounds__(block_threads)
    norm_gradient_sums_kernel(Shape shape, Input<Stored> grad_y, Input<Stored> x, Input<Stored> y,
                              const accumulate_t<Stored>* __restrict__ mean,
                              const accumulate_t<Stored>* __restrict__ rstd, Parameters<Stored> parameters,
                              Partials<accumulate_t<Stored>> partials) {
  using Sum = accumulate_t<Stored>;
  constexpr int sums = by_voxel ? vec : 1;
  const Place<Stored, vec, by_voxel> place(shape);
  Sum means[sums], scales[sums], shifts[sums], sum_g[sums], sum_gx[sums];
  read_affine<Stored, sums>(shape, place, mean, rstd, parameters, means, scales, shifts);
  for (int e = 0; e < sums; ++e) sum_g[e] = sum_gx[e] = Sum(0);
  GradientChunk<Stored, vec, by_voxel>::for_each(
      shape, place, grad_y, x, y, means, scales, shifts, parameters.slope,
      [&](int, const Sum(&gradient)[vec], const Sum(&centred)[vec]) {
        for (int e = 0; e < vec; ++e) {
          sum_g[by_voxel ? e : 0] += gradient[e];
          sum_gx[by_voxel ? e : 0] += gradient[e] * centred[e];
        }
      });
  sum_over_block<Sum, vec, by_voxel>(sum_g, place);
  sum_over_block<Sum, vec, by_voxel>(sum_gx, place);
  write_partials<Sum, vec, by_voxel>(shape, place, partials, sum_g, sum_gx);
}

// Of every group of an image what the input's gradient needs: grad_x = rstd weight g - constant - (x - mean)
// to_x.
template <class Sum>
struct Coefficients {
  Sum* constant;
  Sum* to_x;
};

// One block a group. The gradients of weight and bias are written where they are asked for.
template <class Sum, class Parameter>
__global__ void __launch_bounds__(block_threads)
    norm_combine_gradients_kernel(Shape shape, Partials<Sum> partials, const Sum* __restrict__ rstd,
                                  const Sum* __restrict__ weight, Coefficients<Sum> coefficients,
                                  Parameter* grad_weight, Parameter* grad_bias) {
  const int64_t channels = shape.layout.channels / shape.groups, group = blockIdx.x;
  const double all = static_cast<double>(channels * shape.layout.voxels);
  const auto chunk_sum = [&](const Sum* from, int64_t image, int64_t channel) {
    const int64_t first = (image * shape.layout.channels + channel) * shape.chunks;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < shape.chunks; i += block_threads) sum += from[first + i];
    return block_sum(sum);
  };
  for (int64_t image = 0; image < shape.layout.batch; ++image) {
    const double inverse = rstd[image * shape.groups + group];
    double of_g = 0, of_gx = 0;
    for (int64_t channel = group * channels; channel < (group + 1) * channels; ++channel) {
      const double g = chunk_sum(partials.first, image, channel),
                   gx = chunk_sum(partials.second, image, channel);
      const double factor = weight == nullptr ? 1.0 : static_cast<double>(weight[channel]);
      of_g += factor * g;
      of_gx += factor * gx;
      if (threadIdx.x == 0) {  // the chunks' sums are needed no more: the first holds the channel's
        const int64_t first = (image * shape.layout.channels + channel) * shape.chunks;
        partials.first[first] = static_cast<Sum>(g);
        partials.second[first] = static_cast<Sum>(gx * inverse);
      }
    }
    if (threadIdx.x == 0) {
      coefficients.constant[image * shape.groups + group] = static_cast<Sum>(inverse * of_g / all);
      coefficients.to_x[image * shape.groups + group] =
          static_cast<Sum>(inverse * inverse * inverse * of_gx / all);
    }
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < channels; c += block_threads) {
    const int64_t channel = group * channels + c;
    double g = 0, gx = 0;
    for (int64_t image = 0; image < shape.layout.batch; ++image) {
      const int64_t first = (image * shape.layout.channels + channel) * shape.chunks;
      g += partials.first[first];
      gx += partials.second[first];
    }
    if (grad_weight != nullptr) grad_weight[channel] = static_cast<Parameter>(gx);
    if (grad_bias != nullptr) grad_bias[channel] = static_cast<Parameter>(g);
  }
}

template <class Stored, int vec, bool by_voxel>
__global__ void __launch_bounds__(block_threads)
    norm_input_gradient_kernel(Shape shape, Input<Stored> grad_y, Input<Stored> x, Input<Stored> y,
                               const accumulate_t<Stored>* __restrict__ mean,
                               const accumulate_t<Stored>* __restrict__ rstd, Parameters<Stored> parameters,
                               Coefficients<accumulate_t<Stored>> coefficients, Output<Stored> grad_x,
                               Output<Stored> grad_residual) {
  using Sum = accumulate_t<Stored>;
  constexpr int sums = by_voxel ? vec : 1;
  const Place<Stored, vec, by_voxel> place(shape);
  Sum means[sums], scales[sums], shifts[sums], constants[sums], to_x[sums];
  read_affine<Stored, sums>(shape, place, mean, rstd, parameters, means, scales, shifts);
  for (int e = 0; e < sums; ++e) {
    const int64_t channel = place.active ? place.channel + e : 0;
    const int64_t row = place.image * shape.groups + channel / (shape.layout.channels / shape.groups);
    constants[e] = coefficients.constant[row];
    to_x[e] = coefficients.to_x[row];
  }
  GradientChunk<Stored, vec, by_voxel>::for_each(
      shape, place, grad_y, x, y, means, scales, shifts, parameters.slope,
      [&](int k, const Sum(&gradient)[vec], const Sum(&centred)[vec]) {
        Pack<Stored, vec> out, residual;
        for (int e = 0; e < vec; ++e) {
          const int c = by_voxel ? e : 0;
          out.values[e] = static_cast<Stored>(scales[c] * gradient[e] - constants[c] - centred[e] * to_x[c]);
          residual.values[e] = static_cast<Stored>(gradient[e]);
        }
        write_pack<Stored, vec>(grad_x, place, k, out);
        if (grad_residual.data != nullptr) write_pack<Stored, vec>(grad_residual, place, k, residual);
      });
}

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

template <int vec>
Shape shape_of_launch(const Tensor& x, int64_t groups, bool by_voxel) {
  Shape shape{readable_layout(x), groups, 0, 0, 1};
  int rows = block_threads;
  if (by_voxel) {
    shape.tile = static_cast<int>(std::min<int64_t>(shape.layout.channels / vec, block_threads));
    rows = block_threads / shape.tile;
  }
  shape.chunk_rows = rows * vectors_per_thread;
  shape.chunks = ceil_div(by_voxel ? shape.layout.voxels : shape.layout.voxels / vec, shape.chunk_rows);
  return shape;
}

template <int vec>
dim3 grid_of(const Shape& shape, bool by_voxel) {
  const int64_t lines = by_voxel ? ceil_div(shape.layout.channels / vec, shape.tile) : shape.layout.channels;
  LUNGKIT_CHECK(lines * shape.layout.batch < 65536, "norm_act: at most 65535 images times channels, got ",
                shape.layout.batch, " x ", shape.layout.channels);
  return dim3(static_cast<unsigned>(shape.chunks), static_cast<unsigned>(lines * shape.layout.batch));
}

// body(vec, by_voxel) with both as types.
template <class Stored, class Body>
void with_access(bool vectors, bool by_voxel, const Body& body) {
  const auto with = [&](auto vec) {
    return by_voxel ? body(vec, std::true_type{}) : body(vec, std::false_type{});
  };
  return vectors ? with(std::integral_constant<int, widest<Stored>>{})
                 : with(std::integral_constant<int, 1>{});
}

template <class Stored>
Input<Stored> input(const MaybeTensor& tensor) {
  if (!tensor) return {nullptr, 0};
  return {static_cast<const Stored*>(tensor->const_data_ptr()), readable_layout(*tensor).batch_stride};
}
template <class Stored>
Output<Stored> output(const MaybeTensor& tensor) {
  if (!tensor) return {nullptr, 0};
  return {static_cast<Stored*>(tensor->mutable_data_ptr()), readable_layout(*tensor).batch_stride};
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
  const cudaStream_t stream = current_stream(x);
  const bool vectors = have_whole_vectors(by_voxel, {&read, &written, &residual});
  with_access<Stored>(vectors, by_voxel, [&](auto vec, auto last) {
    const Shape shape = shape_of_launch<vec>(x, mean.size(1), last);
    const dim3 grid = grid_of<vec>(shape, last);
    if constexpr (!last) {
      if (shape.chunks == 1 && shape.groups == shape.layout.channels) {
        LUNGKIT_LAUNCH((norm_small_kernel<Stored, vec>), grid, block_threads, 0, stream, shape,
                       input<Stored>(read), input<Stored>(residual), output<Stored>(written), means, rstds,
                       parameters);
        return;
      }
    }
    const Tensor memory = new_sums<Sum>(x, {2, shape.layout.batch * shape.layout.channels * shape.chunks});
    const Partials<Sum> partials = partials_in<Sum>(memory);
    const int64_t chunk_elements = int64_t{shape.chunk_rows} * (last ? 1 : vec);
    LUNGKIT_LAUNCH((norm_moments_kernel<Stored, vec, last>), grid, block_threads, 0, stream, shape,
                   input<Stored>(read), partials);
    LUNGKIT_LAUNCH((norm_combine_kernel<Sum>), static_cast<unsigned>(shape.layout.batch * shape.groups),
                   block_threads, 0, stream, shape, chunk_elements, partials, parameters.eps, means, rstds);
    LUNGKIT_LAUNCH((norm_apply_kernel<Stored, vec, last>), grid, block_threads, 0, stream, shape,
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
  const cudaStream_t stream = current_stream(x);
  const bool vectors = have_whole_vectors(by_voxel, {&slopes, &read, &y, &written, &grad_residual});
  with_access<Stored>(vectors, by_voxel, [&](auto vec, auto last) {
    const Shape shape = shape_of_launch<vec>(x, mean.size(1), last);
    const dim3 grid = grid_of<vec>(shape, last);
    const Tensor memory = new_sums<Sum>(x, {2, shape.layout.batch * shape.layout.channels * shape.chunks});
    const Tensor by_group = new_sums<Sum>(x, {2, shape.layout.batch * shape.groups});
    const Partials<Sum> partials = partials_in<Sum>(memory);
    auto* constant = static_cast<Sum*>(by_group.mutable_data_ptr());
    const Coefficients<Sum> coefficients{constant, constant + by_group.size(1)};
    LUNGKIT_LAUNCH((norm_gradient_sums_kernel<Stored, vec, last>), grid, block_threads, 0, stream, shape,
                   input<Stored>(slopes), input<Stored>(read), input<Stored>(y), means, rstds, parameters,
                   partials);
    const Tensor& like = weight ? grad_weight : grad_bias;
    dispatch_floating(like.scalar_type(), "norm_act_backward", [&](auto zero) {
      using Parameter = decltype(zero);
      const auto to = [](const Tensor& gradient) {
        return gradient.numel() == 0 ? nullptr : static_cast<Parameter*>(gradient.mutable_data_ptr());
      };
      LUNGKIT_LAUNCH((norm_combine_gradients_kernel<Sum, Parameter>), static_cast<unsigned>(shape.groups),
                     block_threads, 0, stream, shape, partials, rstds, parameters.weight, coefficients,
                     to(grad_weight), to(grad_bias));
    });
    LUNGKIT_LAUNCH((norm_input_gradient_kernel<Stored, vec, last>), grid, block_threads, 0, stream, shape,
                   input<Stored>(slopes), input<Stored>(read), input<Stored>(y), means, rstds, parameters,
                   coefficients, output<Stored>(written), output<Stored>(grad_residual));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_backward_cuda(
    const Tensor& grad_y, const Tensor& x, const MaybeTensor& y, const Tensor& mean, const Tensor& rstd,
    const MaybeTensor& weight, const MaybeTensor& bias, double slope, bool needs_residual) {
  check_norm_act_backward(grad_y, x, y, mean, rstd, weight, bias, slope, needs_residual);
  LUNGKIT_CHECK(on_device(x), "norm_act_backward: x must be on the GPU");
  LUNGKIT_CHECK(!weight || !bias || weight->scalar_type() == bias->scalar_type(),
                "norm_act_backward: weight and bias must have the same dtype");
  const DeviceGuard guard(x);
  const Tensor values = with_runs(x), slopes = with_runs_like(values, grad_y);
  const MaybeTensor signs = y ? MaybeTensor(with_runs_like(values, *y)) : y;
  Tensor grad_x = new_features(values);
  MaybeTensor grad_residual;
  if (needs_residual) grad_residual = new_features(values);
  const auto gradient_of = [&](const MaybeTensor& parameter) {
    if (!parameter) return torch::stable::new_empty(x, {0});
    return x.numel() == 0 ? torch::stable::new_zeros(*parameter, {x.size(1)})
                          : torch::stable::new_empty(*parameter, {x.size(1)});
  };
  const Tensor grad_weight = gradient_of(weight), grad_bias = gradient_of(bias);
  if (x.numel() > 0) {
    dispatch_floating(x.scalar_type(), "norm_act_backward", [&](auto zero) {
      launch_backward<decltype(zero)>(slopes, values, signs, torch::stable::contiguous(mean),
                                      torch::stable::contiguous(rstd), weight, bias, slope, grad_x,
                                      grad_residual, grad_weight, grad_bias);
    });
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
