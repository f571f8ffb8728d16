// Splits a batch into chunks, packs the weights, runs the kernels and adds up what the chunks leave. The
// split depends on the shapes alone and the sums run in its order: the result has the same bits for any
// number of threads.
#include <algorithm>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../support/huge_pages.h"
#include "../support/parallel.h"
#include "arguments.h"
#include "interpolation.h"
#include "kernel.h"

namespace lungkit {
namespace {

// Memory on cache-line boundaries, not initialised.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t bytes) : memory_(::operator new(std::max<size_t>(bytes, 64), alignment)) {}
  char* data() const { return static_cast<char*>(memory_.get()); }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, alignment); }
  };
  std::unique_ptr<void, Free> memory_;
};

// LinearAxis as a table: the kernels read it once a voxel.
struct Axis {
  std::vector<int64_t> lower;
  std::vector<double> weight;

  Axis(int64_t fine, int64_t coarse) : lower(fine), weight(fine) {
    const LinearAxis<int64_t> axis{fine, coarse};
    for (int64_t p = 0; p < fine; ++p) {
      lower[p] = axis.lower(p);
      weight[p] = axis.weight<double>(p);
    }
  }
  AxisView view(int64_t coarse) const {
    return {static_cast<int64_t>(lower.size()), coarse, lower.data(), weight.data()};
  }
};

// The problem as the kernels see it, and the memory that it points to.
struct PreparedGate {
  GateProblem problem;
  Axis axes[3];
  AlignedBuffer weights;
  int64_t real_size;  // bytes of the type that the kernel computes with
};

template <class Body>
void dispatch_real(ScalarType type, Body&& body) {
  if (type == ScalarType::Double) {
    body(double{});
  } else {
    body(float{});
  }
}

// Features of this size are gone from any cache before the next layer reads them.
constexpr int64_t streamed_bytes = int64_t{16} << 20;

// The largest tile, up to 192 voxels, whose features and inner channels fill no more than half of a common
// L2.
int64_t tile_voxels_for(int64_t x_channels, int64_t inner_channels, int64_t real_size) {
  const int64_t bytes_per_voxel = 2 * (padded_row(x_channels) + padded_row(inner_channels)) * real_size;
  const int64_t fitting = (int64_t{256} << 10) / bytes_per_voxel / 48 * 48;
  return std::clamp<int64_t>(fitting, 48, 192);
}

void pack_weights(const Tensor& w_x, const Tensor& w_psi, const Tensor& b_psi, PreparedGate& gate) {
  GateProblem& p = gate.problem;
  const int64_t channels = p.x_channels, inner = p.inner_channels;
  const int64_t by_channel = padded_rows(channels) * padded_row(inner),
                by_inner = inner * padded_row(channels);
  const Tensor w = torch::stable::contiguous(w_x), psi = torch::stable::contiguous(w_psi);
  gate.weights = AlignedBuffer((by_channel + by_inner + padded_row(inner)) * gate.real_size);
  dispatch_real(p.type, [&](auto zero) {
    using Real = decltype(zero);
    Real* transposed = reinterpret_cast<Real*>(gate.weights.data());
    Real* rows = transposed + by_channel;
    Real* map = rows + by_inner;
    std::fill(transposed, map + padded_row(inner), Real(0));
    dispatch_floating(w.scalar_type(), "attention_gate", [&](auto stored_zero) {
      using Stored = decltype(stored_zero);
      const auto* from = static_cast<const Stored*>(w.const_data_ptr());
      for (int64_t i = 0; i < inner; ++i) {
        for (int64_t c = 0; c < channels; ++c) {
          const Real value = static_cast<Real>(from[i * channels + c]);
          transposed[c * padded_row(inner) + i] = value;
          rows[i * padded_row(channels) + c] = value;
        }
        map[i] = static_cast<Real>(static_cast<const Stored*>(psi.const_data_ptr())[i]);
      }
      p.b_psi = static_cast<double>(*static_cast<const Stored*>(b_psi.const_data_ptr()));
    });
    p.w_x = transposed;
    p.w_x_rows = rows;
    p.w_psi = map;
  });
}

PreparedGate prepare(const GateArguments& a, const Tensor& w_x, const Tensor& w_psi, const Tensor& b_psi) {
  const ScalarType type = a.x.scalar_type();
  const int64_t real_size = type == ScalarType::Double ? 8 : 4;
  const int64_t channels = a.x_layout.channels, inner = a.phi_layout.channels;
  PreparedGate gate{.problem = {.type = type,
                                .x_channels = channels,
                                .inner_channels = inner,
                                .axes = {},
                                .same_grid = a.fine == a.coarse,
                                .tile_voxels = tile_voxels_for(channels, inner, real_size),
                                .past_caches = a.x.numel() * element_size(type) >= streamed_bytes,
                                .w_x = nullptr,
                                .w_x_rows = nullptr,
                                .w_psi = nullptr,
                                .b_psi = 0},
                    .axes = {{a.fine[0], a.coarse[0]}, {a.fine[1], a.coarse[1]}, {a.fine[2], a.coarse[2]}},
                    .weights = AlignedBuffer(0),
                    .real_size = real_size};
  for (int d = 0; d < 3; ++d) gate.problem.axes[d] = gate.axes[d].view(a.coarse[d]);
  pack_weights(w_x, w_psi, b_psi, gate);
  return gate;
}

ImageView image_view(const Tensor& features, int64_t image) {
  const VoxelLayout layout = readable_layout(features);
  const char* data = static_cast<const char*>(features.const_data_ptr());
  return {data + image * layout.batch_stride * element_size(features.scalar_type()), layout.channel_stride,
          layout.voxel_stride};
}

MutableImageView mutable_image_view(const Tensor& features, int64_t image) {
  const ImageView view = image_view(features, image);
  return {const_cast<void*>(view.data), view.channel_stride, view.voxel_stride};
}

// Voxels of one image that one call of a kernel takes.
struct Chunk {
  int64_t image;
  int64_t first_voxel;
  int64_t last_voxel;
  int64_t first_plane;  // backward, phi coarser than x: the planes of phi whose gradient the chunk owns
  int64_t last_plane;
};

// Enough work a chunk to be worth a thread's while: 4 million multiplications of the product, or 16384
// voxels.
int64_t chunk_voxels(const GateArguments& a) {
  const int64_t work_per_voxel = std::max<int64_t>(1, a.x_layout.channels * a.phi_layout.channels);
  return std::clamp<int64_t>((int64_t{1} << 22) / work_per_voxel, 192, 1 << 14);
}

// Whole planes of x a chunk, so that each plane of phi is interpolated along z once.
std::vector<Chunk> forward_chunks(const GateArguments& a) {
  const int64_t plane = a.fine == a.coarse ? 1 : a.fine[1] * a.fine[2];
  const int64_t step = std::max<int64_t>(1, chunk_voxels(a) / plane) * plane;
  std::vector<Chunk> chunks;
  for (int64_t b = 0; b < a.x_layout.batch; ++b) {
    for (int64_t v = 0; v < a.x_layout.voxels; v += step) {
      chunks.push_back({b, v, std::min(a.x_layout.voxels, v + step), 0, 0});
    }
  }
  return chunks;
}

// Where phi is coarser, a chunk is all of x that reads its own planes of phi first: with `lower` as in
// AxisView, the planes of x with first_plane <= lower < last_plane. It also reads plane last_plane, which
// belongs to the next chunk: each chunk therefore leaves two planes to be added up, and `most` bounds the
// memory of all of them.
std::vector<Chunk> backward_chunks(const GateArguments& a, int64_t most) {
  if (a.fine == a.coarse) return forward_chunks(a);
  const int64_t plane = a.fine[1] * a.fine[2];
  const int64_t splits = std::clamp<int64_t>(
      std::min(most / a.x_layout.batch, a.x_layout.voxels / chunk_voxels(a)), 1, a.coarse[0]);
  const int64_t step = ceil_div(a.coarse[0], splits);
  const LinearAxis<int64_t> axis{a.fine[0], a.coarse[0]};
  std::vector<Chunk> chunks;
  for (int64_t b = 0; b < a.x_layout.batch; ++b) {
    for (int64_t k = 0; k < a.coarse[0]; k += step) {
      const int64_t end = std::min(a.coarse[0], k + step);
      chunks.push_back({b, axis.first_reading(k) * plane, axis.first_reading(end) * plane, k, end});
    }
  }
  return chunks;
}

std::tuple<Tensor, Tensor> attention_gate_cpu(const Tensor& x, const Tensor& phi, const Tensor& w_x,
                                              const Tensor& w_psi, const Tensor& b_psi, bool) {
  const GateArguments a = check_attention_gate(x, phi, w_x, w_psi, b_psi);
  Tensor out = new_features(a.x);
  Tensor alpha = new_map(a.x);
  if (alpha.numel() == 0) return {out, alpha};
  prefer_huge_pages(out);

  const PreparedGate gate = prepare(a, w_x, w_psi, b_psi);
  const GateKernels& kernels = LUNGKIT_SELECT_KERNELS(gate_kernels);
  const std::vector<Chunk> chunks = forward_chunks(a);
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    const AlignedBuffer scratch(kernels.scratch_bytes(gate.problem));
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = chunks[i];
      kernels.forward(gate.problem,
                      {.first_voxel = chunk.first_voxel,
                       .last_voxel = chunk.last_voxel,
                       .x = image_view(a.x, chunk.image),
                       .phi = image_view(a.phi, chunk.image),
                       .out = mutable_image_view(out, chunk.image),
                       .alpha = mutable_image_view(alpha, chunk.image).data},
                      scratch.data());
    }
  });
  return {out, alpha};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What the backward pass fills besides the gradients it returns.
struct Partials {
  int64_t weights_size;  // of one group of chunks: grad_w_x, then grad_psi
  int64_t plane_size;    // of one plane of phi's gradient
  AlignedBuffer weights;
  AlignedBuffer planes;  // two a chunk
};

template <class Real>
void write_weight_gradients(const Partials& partials, int64_t groups, const GateProblem& p,
                            const Tensor& grad_w_x, const Tensor& grad_w_psi, const Tensor& grad_b_psi) {
  const auto* parts = reinterpret_cast<const Real*>(partials.weights.data());
  const auto total = [&](int64_t offset) {
    double sum = 0;
    for (int64_t g = 0; g < groups; ++g)
      sum += static_cast<double>(parts[g * partials.weights_size + offset]);
    return sum;
  };
  const int64_t inner = p.inner_channels, stride = padded_row(inner),
                psi = padded_rows(p.x_channels) * stride;
  dispatch_floating(grad_w_x.scalar_type(), "attention_gate", [&](auto zero) {
    using Stored = decltype(zero);
    const auto set = [](const Tensor& tensor, int64_t i, double value) {
      static_cast<Stored*>(tensor.mutable_data_ptr())[i] = static_cast<Stored>(value);
    };
    for (int64_t k = 0; k < grad_w_x.numel(); ++k) {
      set(grad_w_x, k, total(k % p.x_channels * stride + k / p.x_channels));
    }
    for (int64_t i = 0; i < grad_w_psi.numel(); ++i) set(grad_w_psi, i, total(psi + i));
    if (grad_b_psi.numel() > 0) set(grad_b_psi, 0, total(psi + stride));
  });
}

Gradients attention_gate_backward_cpu(std::optional<Tensor> grad_out, std::optional<Tensor> grad_alpha,
                                      const Tensor& x, const Tensor& phi, const Tensor& w_x,
                                      const Tensor& w_psi, const Tensor& b_psi, bool needs_x, bool needs_phi,
                                      bool needs_w_x, bool needs_psi, bool) {
  const GateArguments a = check_attention_gate(x, phi, w_x, w_psi, b_psi);
  check_gate_gradients(grad_out, grad_alpha, x);
  const int64_t channels = a.x_layout.channels, inner = a.phi_layout.channels;
  const auto wanted = [&](bool needed, std::vector<int64_t> shape) {
    return torch::stable::new_zeros(w_x, needed ? shape : std::vector<int64_t>{0});
  };
  Tensor grad_x = needs_x ? new_features(a.x) : wanted(false, {});
  Tensor grad_phi = needs_phi ? new_features(a.phi) : wanted(false, {});
  Tensor grad_w_x = wanted(needs_w_x, {inner, channels});
  Tensor grad_w_psi = wanted(needs_psi, {inner});
  Tensor grad_b_psi = wanted(needs_psi, {1});
  const Gradients gradients{grad_x, grad_phi, grad_w_x, grad_w_psi, grad_b_psi};
  if (x.size(0) * a.x_layout.voxels == 0) return gradients;
  prefer_huge_pages(grad_x);
  prefer_huge_pages(grad_phi);

  if (grad_out) grad_out = in_order_of(a.x, *grad_out);
  if (grad_alpha) grad_alpha = torch::stable::contiguous(*grad_alpha);
  const PreparedGate gate = prepare(a, w_x, w_psi, b_psi);
  const GateProblem& p = gate.problem;
  const GateKernels& kernels = LUNGKIT_SELECT_KERNELS(gate_kernels);

  // Partial sums take at most a few per cent of x's memory, and no less than lets a small problem use some
  // threads.
  const int64_t weights_size = padded_row(padded_rows(channels) * padded_row(inner) + padded_row(inner) + 1);
  const int64_t plane_size = padded_row(inner) * a.coarse[1] * a.coarse[2];
  const int64_t budget = x.numel() * element_size(x.scalar_type()) / 40;
  const auto within_budget = [&](int64_t elements) {
    return std::clamp<int64_t>(budget / (elements * gate.real_size), 8, 64);
  };
  const std::vector<Chunk> chunks = backward_chunks(a, within_budget(2 * plane_size));
  const int64_t count = static_cast<int64_t>(chunks.size());
  const bool split = !p.same_grid && count > x.size(0);
  const int64_t groups = std::min(count, within_budget(weights_size));
  const Partials partials{weights_size, plane_size, AlignedBuffer(groups * weights_size * gate.real_size),
                          AlignedBuffer(split && needs_phi ? count * 2 * plane_size * gate.real_size : 0)};
  const auto plane_of = [&](int64_t chunk, int64_t which) {
    return partials.planes.data() + (2 * chunk + which) * plane_size * gate.real_size;
  };

  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const AlignedBuffer scratch(kernels.scratch_bytes(p));
    for (int64_t g = begin; g < end; ++g) {
      char* weights = partials.weights.data() + g * weights_size * gate.real_size;
      std::fill(weights, weights + weights_size * gate.real_size, 0);
      for (int64_t i = g * count / groups; i < (g + 1) * count / groups; ++i) {
        const Chunk& chunk = chunks[i];
        const bool shared = split && needs_phi;
        kernels.backward(
            p,
            {.first_voxel = chunk.first_voxel,
             .last_voxel = chunk.last_voxel,
             .x = image_view(a.x, chunk.image),
             .phi = image_view(a.phi, chunk.image),
             .grad_out = grad_out ? image_view(*grad_out, chunk.image) : ImageView{},
             .grad_alpha = grad_alpha ? image_view(*grad_alpha, chunk.image).data : nullptr,
             .grad_x = needs_x ? mutable_image_view(grad_x, chunk.image) : MutableImageView{},
             .grad_phi = needs_phi ? mutable_image_view(grad_phi, chunk.image) : MutableImageView{},
             .first_plane = shared ? plane_of(i, 0) : nullptr,
             .next_plane = shared ? plane_of(i, 1) : nullptr,
             .grad_w_x = needs_w_x ? weights : nullptr,
             .grad_psi =
                 needs_psi ? weights + padded_rows(channels) * padded_row(inner) * gate.real_size : nullptr},
            scratch.data());
      }
    }
  });
  if (split && needs_phi) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const void* before = chunks[i].first_plane > 0 ? plane_of(i - 1, 1) : nullptr;
        kernels.store_plane(p, plane_of(i, 0), before, chunks[i].first_plane,
                            mutable_image_view(grad_phi, chunks[i].image));
      }
    });
  }
  dispatch_real(p.type, [&](auto zero) {
    write_weight_gradients<decltype(zero)>(partials, groups, p, grad_w_x, grad_w_psi, grad_b_psi);
  });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lungkit, CPU, m) {
  m.impl("attention_gate", TORCH_BOX(&attention_gate_cpu));
  m.impl("attention_gate_backward", TORCH_BOX(&attention_gate_backward_cpu));
}

}  // namespace lungkit
