// Backward: the sums of the gradient over chunks, their combination in order, and a pass that writes; or one
// launch, and a small one for the parameters, where a block holds a channel.
#pragma once

#include "cuda_block.h"

namespace lungkit {
namespace {

constexpr int gradient_vectors = 2;        // of a thread in flight, of each tensor
constexpr int small_backward_vectors = 4;  // of a thread and tensor, held in registers

// The gradient before the activation: the side of the activation is y's sign where y is given.
template <class P, int size, bool with_y>
struct Gradients {
  using Sum = typename P::Sum;
  using Stored = typename P::Stored;

  __device__ void read(const Stored* from_grad_y, const Stored* from_x, const Stored* from_y, const P& place,
                       int from) {
    grad_y.read(from_grad_y, place, from);
    x.read(from_x, place, from);
    if constexpr (with_y) y.read(from_y, place, from);
  }
  // Of element e of vector k: x - mean, and the gradient before the activation.
  __device__ Sum centred(int k, int e, const Affine<P>& affine) const {
    return x.packs[k].at(e) - affine.mean[P::by_voxel ? e : 0];
  }
  __device__ Sum gradient(int k, int e, Sum centred, const Affine<P>& affine, Sum slope) const {
    const int c = P::by_voxel ? e : 0;
    const Sum g = grad_y.packs[k].at(e);
    Sum sign;
    if constexpr (with_y) {
      sign = y.packs[k].at(e);
    } else {
      sign = centred * affine.scale[c] + affine.shift[c];
    }
    return sign > Sum(0) ? g : g * slope;
  }

  Batch<P, size> grad_y, x;
  Batch<P, with_y ? size : 1> y;  // unused without y
};

// Of g and of g (x - mean), over what a thread has read of its channels.
template <class P>
struct GradientSums {
  using Sum = typename P::Sum;

  template <int size, bool with_y>
  __device__ void add(const Gradients<P, size, with_y>& of, const P& place, int from, const Affine<P>& affine,
                      Sum slope) {
#pragma unroll
    for (int k = 0; k < size; ++k) {
      if (!of.x.has(place, from, k)) continue;
#pragma unroll
      for (int e = 0; e < P::vec; ++e) {
        const Sum centred = of.centred(k, e, affine), gradient = of.gradient(k, e, centred, affine, slope);
        g[P::by_voxel ? e : 0] += gradient;
        gx[P::by_voxel ? e : 0] += gradient * centred;
      }
    }
  }
  __device__ void combine(const Shape& shape, Columns<Sum, P::sums>& columns) const {
    columns.put(g, gx);
    columns.reduce(shape, [&](int, int e, int slot, int step, int end) {
      Sum* const of_g = columns.first + e * columns.stride;
      Sum* const of_gx = columns.second + e * columns.stride;
      Sum total_g = 0, total_gx = 0;
      for (int i = slot; i < end; i += step) {
        total_g += of_g[i];
        total_gx += of_gx[i];
      }
      of_g[slot] = total_g;
      of_gx[slot] = total_gx;
    });
  }

  Sum g[P::sums] = {}, gx[P::sums] = {};
};

template <class P>
__global__ void __launch_bounds__(block_threads, 3)
    norm_gradient_sums_kernel(Shape shape, Input<typename P::Stored> grad_y, Input<typename P::Stored> x,
                              Input<typename P::Stored> y, const typename P::Sum* __restrict__ mean,
                              const typename P::Sum* __restrict__ rstd,
                              Parameters<typename P::Stored> parameters, Partials<typename P::Sum> partials) {
  using Sum = typename P::Sum;
  __shared__ Columns<Sum, P::sums> columns;
  const P place(shape);
  Affine<P> affine;
  affine.read(shape, place, mean, rstd, parameters);
  const auto* const from_grad_y = place.begin(grad_y);
  const auto* const from_x = place.begin(x);
  GradientSums<P> sums;
  const auto sum_up = [&]<bool with_y>(const typename P::Stored* from_y) {
#pragma unroll 1
    for (int from = place.row; from < place.here; from += gradient_vectors * place.rows) {
      Gradients<P, gradient_vectors, with_y> gradients;
      gradients.read(from_grad_y, from_x, from_y, place, from);
      sums.add(gradients, place, from, affine, parameters.slope);
    }
  };
  if (y.data == nullptr) {
    sum_up.template operator()<false>(nullptr);
  } else {
    sum_up.template operator()<true>(place.begin(y));
  }
  sums.combine(shape, columns);
  partials.write(shape, place, columns);
}

// Of every group of an image what the input's gradient needs: grad_x = rstd weight g - constant - (x - mean)
// to_x.
template <class Sum>
struct Coefficients {
  // `elements` of a group, whose g and g (x - mean) add up to these with the weights as factors.
  __device__ void set(int64_t row, double inverse, double of_g, double of_gx, double elements) const {
    constant[row] = static_cast<Sum>(inverse * of_g / elements);
    to_x[row] = static_cast<Sum>(inverse * inverse * inverse * of_gx / elements);
  }

  Sum* constant;
  Sum* to_x;
};

// The gradients of a channel's parameters, where they are asked for: sums over the images of what `partials`
// hold at (image C + channel) step.
template <class Sum, class Parameter>
__device__ void write_parameter_gradients(const Shape& shape, const Partials<Sum>& partials, int64_t step,
                                          int64_t channel, Parameter* grad_weight, Parameter* grad_bias) {
  double g = 0, gx = 0;
  for (int64_t image = 0; image < shape.layout.batch; ++image) {
    const int64_t i = (image * shape.layout.channels + channel) * step;
    g += partials.first[i];
    gx += partials.second[i];
  }
  if (grad_weight != nullptr) grad_weight[channel] = static_cast<Parameter>(gx);
  if (grad_bias != nullptr) grad_bias[channel] = static_cast<Parameter>(g);
}

template <class Sum, class Parameter>
__global__ void __launch_bounds__(block_threads)
    norm_parameter_gradients_kernel(Shape shape, Partials<Sum> partials, Parameter* grad_weight,
                                    Parameter* grad_bias) {
  const int64_t channel = int64_t{blockIdx.x} * block_threads + threadIdx.x;
  if (channel < shape.layout.channels) {
    write_parameter_gradients(shape, partials, 1, channel, grad_weight, grad_bias);
  }
}

// One block a group: the whole of it adds up the chunks of its one channel, or each warp those of a channel.
template <class Sum, class Parameter>
__global__ void __launch_bounds__(block_threads)
    norm_combine_gradients_kernel(Shape shape, Partials<Sum> partials, const Sum* __restrict__ rstd,
                                  const Sum* __restrict__ weight, Coefficients<Sum> coefficients,
                                  Parameter* grad_weight, Parameter* grad_bias) {
  const bool alone = shape.group_channels == 1;
  const int thread = static_cast<int>(threadIdx.x);
  const int members = alone ? block_threads : 32, member = thread % members;
  const int64_t group = blockIdx.x, begin = group * shape.group_channels, end = begin + shape.group_channels;
  const double elements =
      static_cast<double>(shape.group_channels) * static_cast<double>(shape.layout.voxels);
  for (int64_t image = 0; image < shape.layout.batch; ++image) {
    const double inverse = rstd[image * shape.groups + group];
    double of_g = 0, of_gx = 0;
    for (int64_t channel = begin + thread / members; channel < end; channel += block_threads / members) {
      const int64_t first = (image * shape.layout.channels + channel) * shape.chunks;
      double g = 0, gx = 0;
      for (int i = member; i < shape.chunks; i += members) {
        g += partials.first[first + i];
        gx += partials.second[first + i];
      }
      g = alone ? block_sum(g) : warp_sum(g);
      gx = alone ? block_sum(gx) : warp_sum(gx);
      if (member != 0) continue;
      const double factor = weight == nullptr ? 1.0 : static_cast<double>(weight[channel]);
      of_g += factor * g;
      of_gx += factor * gx;
      // The chunks' sums are needed no more: the first holds the channel's.
      partials.first[first] = static_cast<Sum>(g);
      partials.second[first] = static_cast<Sum>(gx * inverse);
    }
    if (!alone) {  // else the first thread has the only terms
      of_g = block_sum(of_g);
      of_gx = block_sum(of_gx);
    }
    if (thread == 0) coefficients.set(image * shape.groups + group, inverse, of_g, of_gx, elements);
  }
  __syncthreads();
  for (int64_t channel = begin + thread; channel < end; channel += block_threads) {
    write_parameter_gradients(shape, partials, shape.chunks, channel, grad_weight, grad_bias);
  }
}

// Where and from what the gradients of a thread's channels are written.
template <class P>
struct GradientWriter {
  using Sum = typename P::Sum;
  using Stored = typename P::Stored;

  // The residual has a gradient only where y is given.
  template <int size, bool with_y>
  __device__ void write(const Gradients<P, size, with_y>& of, const P& place, int from,
                        const Affine<P>& affine, Sum slope) const {
#pragma unroll
    for (int k = 0; k < size; ++k) {
      if (!of.x.has(place, from, k)) continue;
      const int64_t offset = place.offset(from + k * place.rows);
      Pack<Stored, P::vec> out, residual;
#pragma unroll
      for (int e = 0; e < P::vec; ++e) {
        const int c = P::by_voxel ? e : 0;
        const Sum centred = of.centred(k, e, affine), gradient = of.gradient(k, e, centred, affine, slope);
        out.set(e, affine.scale[c] * gradient - constant[c] - centred * to_x[c]);
        if constexpr (with_y) residual.set(e, gradient);
      }
      out.write(grad_x + offset);
      if constexpr (with_y) {
        if (grad_residual != nullptr) residual.write(grad_residual + offset);
      }
    }
  }

  Stored* grad_x;
  Stored* grad_residual;  // null where it is not asked for
  Sum constant[P::sums], to_x[P::sums];
};

template <class P, bool with_y>
__global__ void __launch_bounds__(block_threads, with_y ? 2 : 3)
    norm_input_gradient_kernel(Shape shape, Input<typename P::Stored> grad_y, Input<typename P::Stored> x,
                               Input<typename P::Stored> y, const typename P::Sum* __restrict__ mean,
                               const typename P::Sum* __restrict__ rstd,
                               Parameters<typename P::Stored> parameters,
                               Coefficients<typename P::Sum> coefficients, Output<typename P::Stored> grad_x,
                               Output<typename P::Stored> grad_residual) {
  const P place(shape, Order::backward);
  Affine<P> affine;
  affine.read(shape, place, mean, rstd, parameters);
  GradientWriter<P> writer{place.begin(grad_x),
                           grad_residual.data == nullptr ? nullptr : place.begin(grad_residual)};
  for_each_channel(shape, place, [&](int e, int, int64_t row) {
    writer.constant[e] = coefficients.constant[row];
    writer.to_x[e] = coefficients.to_x[row];
  });
  const auto* const from_grad_y = place.begin(grad_y);
  const auto* const from_x = place.begin(x);
  const auto* const from_y = with_y ? place.begin(y) : nullptr;
#pragma unroll 1
  for (int from = place.row; from < place.here; from += gradient_vectors * place.rows) {
    Gradients<P, gradient_vectors, with_y> gradients;
    gradients.read(from_grad_y, from_x, from_y, place, from);
    writer.write(gradients, place, from, affine, parameters.slope);
  }
}

// Channels that one block holds, each a group of its own: read once. `partials`, of one chunk a channel, are
// left to norm_parameter_gradients_kernel.
template <class P, bool with_y>
__global__ void __launch_bounds__(block_threads, 2)
    norm_small_gradient_kernel(Shape shape, Input<typename P::Stored> grad_y, Input<typename P::Stored> x,
                               Input<typename P::Stored> y, const typename P::Sum* __restrict__ mean,
                               const typename P::Sum* __restrict__ rstd,
                               Parameters<typename P::Stored> parameters, Partials<typename P::Sum> partials,
                               Output<typename P::Stored> grad_x, Output<typename P::Stored> grad_residual) {
  using Sum = typename P::Sum;
  __shared__ Columns<Sum, P::sums> columns;
  const P place(shape);
  Gradients<P, small_backward_vectors, with_y> gradients;
  gradients.read(place.begin(grad_y), place.begin(x), with_y ? place.begin(y) : nullptr, place, place.row);
  Affine<P> affine;
  affine.read(shape, place, mean, rstd, parameters);
  GradientSums<P> sums;
  sums.add(gradients, place, place.row, affine, parameters.slope);
  sums.combine(shape, columns);
  const Coefficients<Sum> coefficients{columns.first, columns.second};
  columns.for_each_channel(shape, place, [&](int channel, int entry) {
    const int64_t row = place.image * shape.layout.channels + channel;
    const double inverse = rstd[row], g = columns.first[entry], gx = columns.second[entry];
    const double factor =
        parameters.weight == nullptr ? 1.0 : static_cast<double>(parameters.weight[channel]);
    partials.first[row] = static_cast<Sum>(g);
    partials.second[row] = static_cast<Sum>(gx * inverse);
    coefficients.set(entry, inverse, factor * g, factor * gx, place.elements());
  });
  __syncthreads();
  GradientWriter<P> writer{place.begin(grad_x),
                           grad_residual.data == nullptr ? nullptr : place.begin(grad_residual)};
#pragma unroll
  for (int e = 0; e < P::sums; ++e) {
    writer.constant[e] = columns.first[e * columns.stride + place.column];
    writer.to_x[e] = columns.second[e * columns.stride + place.column];
  }
  writer.write(gradients, place, place.row, affine, parameters.slope);
}

}  // namespace
}  // namespace lungkit
