// The gate on one chunk of voxels, a tile at a time. Everything of the inner width lives in the tile's
// scratch memory and stays in L1 or L2; the backward pass computes it again instead of reading it. Compiled
// once for each instruction set (support/isa.h).
#include "matmul.h"
#include "resample.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

using torch::headeronly::ScalarType;

// Hands out pieces of one scratch allocation, each on a cache line of its own.
template <class T>
class Arena {
 public:
  explicit Arena(void* memory) : next_(static_cast<T*>(memory)) {}
  T* take(int64_t count) {
    T* piece = next_;
    next_ += padded_row(count);
    return piece;
  }
  T* position() const { return next_; }

 private:
  T* next_;
};

template <class Stored>
class Gate {
 public:
  using T = Real<Stored>;

  Gate(const GateProblem& problem, Arena<T>& arena, bool by_channel)
      : p_(problem),
        stride_(padded_row(problem.inner_channels)),
        width_(round_up<T>(problem.inner_channels) / lanes<T>),
        by_channel_(by_channel),
        x_(new_tile(arena)),
        q_(arena.take(problem.tile_voxels * stride_)),
        alpha_(arena.take(problem.tile_voxels)) {}

  Tile<T> new_tile(Arena<T>& arena) const {
    const int64_t channels = padded_row(p_.x_channels);
    T* data = arena.take(p_.tile_voxels * channels);
    return by_channel_ ? Tile<T>{data, p_.tile_voxels, 1} : Tile<T>{data, 1, channels};
  }

  // Leaves x, q = relu(theta + up(phi)) and alpha of the tile in scratch.
  void compute(const ImageView& x, Upsampler<Stored>& up, int64_t first, int64_t last) {
    voxels_ = last - first;
    padded_ = (voxels_ + voxel_step - 1) / voxel_step * voxel_step;
    load_x(x, first);
    up.load(first, last, q_);
    clear(q_ + voxels_ * stride_, (padded_ - voxels_) * stride_);
    multiply_add<T>({x_.data, x_.voxel_step, x_.channel_step}, {w_x(), stride_}, {q_, stride_}, padded_,
                    p_.x_channels, width_);
    const T* w_psi = static_cast<const T*>(p_.w_psi);
    for (int64_t v = 0; v < padded_; v += lanes<T>) {
      Vec<T> rows[lanes<T>];
      for (int r = 0; r < lanes<T>; ++r) {
        T* q = q_ + (v + r) * stride_;
        rows[r] = Vec<T>{};
        for (int64_t i = 0; i < width_ * lanes<T>; i += lanes<T>) {
          const Vec<T> sum = load(q + i);
          const Vec<T> relu = sum < 0 ? Vec<T>{} : sum;  // keeps NaN
          store(q + i, relu);
          rows[r] += load(w_psi + i) * relu;
        }
      }
      store(alpha_ + v, sigmoid(sum_of_rows<T>(rows) + static_cast<T>(p_.b_psi)));
    }
  }

  const T* alpha() const { return alpha_; }

  // out = alpha x
  void write_gated(const MutableImageView& out, int64_t first) const {
    const Rows<Stored> rows(out, p_.x_channels, first, voxels_);
    for (int64_t r = 0; r < rows.count; ++r) {
      const T* x = x_.row(r);
      if (by_channel_) {
        write_row(rows.row(r), rows.length, p_.past_caches,
                  [&](int64_t i) { return load(alpha_ + i) * load(x + i); });
      } else {
        write_row(rows.row(r), rows.length, p_.past_caches,
                  [&](int64_t i) { return alpha_[r] * load(x + i); });
      }
    }
  }

 protected:
  void load_x(const ImageView& x, int64_t first) {
    const Rows<const Stored> rows(x, p_.x_channels, first, voxels_);
    const int64_t count = by_channel_ ? padded_rows(rows.count) : padded_;
    const int64_t length = by_channel_ ? padded_ : x_.voxel_step;
    for (int64_t r = 0; r < rows.count; ++r) {
      rows.prefetch(r + prefetch_rows);
      read_row(rows.row(r), rows.length, length, [&](int64_t i, Vec<T> v) { store(x_.row(r) + i, v); });
    }
    for (int64_t r = rows.count; r < count; ++r) clear(x_.row(r), length);
  }

  const T* w_x() const { return static_cast<const T*>(p_.w_x); }

  static constexpr int64_t voxel_step = 48;  // tiles hold a multiple of every register block and vector

  const GateProblem& p_;
  const int64_t stride_;
  const int64_t width_;
  const bool by_channel_;
  Tile<T> x_;
  T* q_;
  T* alpha_;
  int64_t voxels_ = 0;
  int64_t padded_ = 0;
};

template <class Stored>
void forward_chunk(const GateProblem& p, const GateForwardChunk& chunk, void* scratch) {
  using T = Real<Stored>;
  Arena<T> arena(scratch);
  Upsampler<Stored> up(p, chunk.phi, arena.take(Upsampler<Stored>::scratch(p)));
  Gate<Stored> gate(p, arena, chunk.x.voxel_stride == 1);
  for (int64_t first = chunk.first_voxel; first < chunk.last_voxel; first += p.tile_voxels) {
    const int64_t last = first + p.tile_voxels < chunk.last_voxel ? first + p.tile_voxels : chunk.last_voxel;
    gate.compute(chunk.x, up, first, last);
    gate.write_gated(chunk.out, first);
    write_row(static_cast<Stored*>(chunk.alpha) + first, last - first, false,
              [&](int64_t i) { return load(gate.alpha() + i); });
  }
  fence();
}

template <class Stored>
class GateGradient : Gate<Stored> {
  using T = Real<Stored>;
  using Base = Gate<Stored>;
  using Base::alpha_, Base::by_channel_, Base::p_, Base::padded_, Base::q_, Base::stride_, Base::voxels_,
      Base::width_, Base::x_;

 public:
  GateGradient(const GateProblem& problem, const GateBackwardChunk& chunk, Arena<T>& arena)
      : Base(problem, arena, chunk.x.voxel_stride == 1),
        chunk_(chunk),
        grad_(this->new_tile(arena)),
        grad_psi_(arena.take(problem.tile_voxels)),
        transposed_(arena.take(stride_ * problem.tile_voxels)) {}

  void add_tile(Upsampler<Stored>& up, Downsampler<Stored>& down, int64_t first, int64_t last) {
    this->compute(chunk_.x, up, first, last);
    load_gradients(first);
    if (chunk_.grad_psi != nullptr) add_grad_psi();
    to_grad_theta();
    if (chunk_.grad_x.data != nullptr) write_grad_x(first);
    if (chunk_.grad_w_x != nullptr) {
      multiply_add<T>({x_.data, x_.channel_step, x_.voxel_step}, {q_, stride_},
                      {static_cast<T*>(chunk_.grad_w_x), stride_}, padded_rows(p_.x_channels), padded_,
                      width_);
    }
    if (chunk_.grad_phi.data == nullptr) return;
    if (p_.same_grid) {
      store_voxel_rows(q_, stride_, p_.inner_channels, voxels_, at<Stored>(chunk_.grad_phi, first),
                       chunk_.grad_phi);
    } else {
      down.add(first, last, q_);
    }
  }

 private:
  // grad_psi = alpha (1 - alpha) (sum of grad_out * x over the channels + grad_alpha), and the tile's copy of
  // grad_out becomes alpha grad_out.
  void load_gradients(int64_t first) {
    clear(grad_psi_, padded_);
    if (chunk_.grad_alpha != nullptr) {
      read_row(static_cast<const Stored*>(chunk_.grad_alpha) + first, voxels_, padded_,
               [&](int64_t i, Vec<T> grad) { store(grad_psi_ + i, grad); });
    }
    if (chunk_.grad_out.data == nullptr) {
      clear(grad_.data, padded_row(p_.x_channels) * p_.tile_voxels);
    } else if (by_channel_) {
      load_grad_out_by_channel(first);
    } else {
      load_grad_out_by_voxel(first);
    }
    for (int64_t v = 0; v < padded_; v += lanes<T>) {
      const Vec<T> alpha = load(alpha_ + v);
      store(grad_psi_ + v, alpha * (1 - alpha) * load(grad_psi_ + v));
    }
  }

  void load_grad_out_by_channel(int64_t first) {
    const Rows<const Stored> rows(chunk_.grad_out, p_.x_channels, first, voxels_);
    for (int64_t c = 0; c < rows.count; ++c) {
      rows.prefetch(c + prefetch_rows);
      const T* x = x_.row(c);
      T* scaled = grad_.row(c);
      read_row(rows.row(c), rows.length, padded_, [&](int64_t v, Vec<T> grad) {
        store(grad_psi_ + v, load(grad_psi_ + v) + grad * load(x + v));
        store(scaled + v, load(alpha_ + v) * grad);
      });
    }
    for (int64_t c = rows.count; c < padded_rows(rows.count); ++c) clear(grad_.row(c), padded_);
  }

  void load_grad_out_by_voxel(int64_t first) {
    const Rows<const Stored> rows(chunk_.grad_out, p_.x_channels, first, voxels_);
    for (int64_t v = 0; v < padded_; v += lanes<T>) {
      Vec<T> dot[lanes<T>] = {};
      for (int r = 0; r < lanes<T>; ++r) {
        const T* x = x_.row(v + r);
        T* scaled = grad_.row(v + r);
        const T alpha = alpha_[v + r];
        read_row(rows.row(v + r), v + r < rows.count ? rows.length : 0, grad_.voxel_step,
                 [&](int64_t c, Vec<T> grad) {
                   dot[r] += grad * load(x + c);
                   store(scaled + c, alpha * grad);
                 });
      }
      store(grad_psi_ + v, load(grad_psi_ + v) + sum_of_rows<T>(dot));
    }
  }

  // Four running sums a vector, so that one addition need not wait for the one before.
  void add_grad_psi() const {
    T* to = static_cast<T*>(chunk_.grad_psi);
    for (int64_t i = 0; i < width_ * lanes<T>; i += lanes<T>) {
      Vec<T> sum[4] = {};
      for (int64_t v = 0; v < padded_; v += 4) {
        for (int k = 0; k < 4; ++k) sum[k] += grad_psi_[v + k] * load(q_ + (v + k) * stride_ + i);
      }
      store(to + i, load(to + i) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
    Vec<T> sum{};
    for (int64_t v = 0; v < padded_; v += lanes<T>) sum += load(grad_psi_ + v);
    T total = 0;
    for (int l = 0; l < lanes<T>; ++l) total += sum[l];
    to[stride_] += total;
  }

  // q becomes the gradient of theta + up(phi).
  void to_grad_theta() const {
    for (int64_t i = 0; i < width_ * lanes<T>; i += lanes<T>) {
      const Vec<T> w_psi = load(static_cast<const T*>(p_.w_psi) + i);
      for (int64_t v = 0; v < padded_; ++v) {
        T* q = q_ + v * stride_ + i;
        store(q, load(q) > 0 ? w_psi * grad_psi_[v] : Vec<T>{});
      }
    }
  }

  // grad_x = alpha grad_out + W_x^T grad_theta
  void write_grad_x(int64_t first) {
    if (by_channel_) {
      for (int64_t i = 0; i < width_ * lanes<T>; i += lanes<T>) {
        for (int64_t v = 0; v < padded_; v += lanes<T>) {
          Vec<T> rows[lanes<T>];
          for (int r = 0; r < lanes<T>; ++r) rows[r] = load(q_ + (v + r) * stride_ + i);
          transpose<T>(rows);
          for (int r = 0; r < lanes<T>; ++r) store(transposed_ + (i + r) * p_.tile_voxels + v, rows[r]);
        }
      }
      multiply_add<T>({this->w_x(), stride_, 1}, {transposed_, p_.tile_voxels},
                      {grad_.data, grad_.channel_step}, padded_rows(p_.x_channels), p_.inner_channels,
                      padded_ / lanes<T>);
    } else {
      multiply_add<T>({q_, stride_, 1}, {static_cast<const T*>(p_.w_x_rows), grad_.voxel_step},
                      {grad_.data, grad_.voxel_step}, padded_, p_.inner_channels,
                      round_up<T>(p_.x_channels) / lanes<T>);
    }
    const Rows<Stored> rows(chunk_.grad_x, p_.x_channels, first, voxels_);
    for (int64_t r = 0; r < rows.count; ++r) {
      write_row(rows.row(r), rows.length, p_.past_caches, [&](int64_t i) { return load(grad_.row(r) + i); });
    }
  }

  const GateBackwardChunk& chunk_;
  Tile<T> grad_;
  T* grad_psi_;
  T* transposed_;
};

template <class Stored>
void backward_chunk(const GateProblem& p, const GateBackwardChunk& chunk, void* scratch) {
  using T = Real<Stored>;
  Arena<T> arena(scratch);
  Upsampler<Stored> up(p, chunk.phi, arena.take(Upsampler<Stored>::scratch(p)));
  Downsampler<Stored> down(p, chunk, arena.take(Downsampler<Stored>::scratch(p)));
  GateGradient<Stored> gradient(p, chunk, arena);
  for (int64_t first = chunk.first_voxel; first < chunk.last_voxel; first += p.tile_voxels) {
    const int64_t last = first + p.tile_voxels < chunk.last_voxel ? first + p.tile_voxels : chunk.last_voxel;
    gradient.add_tile(up, down, first, last);
  }
  if (chunk.grad_phi.data != nullptr && !p.same_grid) down.finish();
  fence();
}

template <class Stored>
void store_plane_sum(const GateProblem& p, const void* a, const void* b, int64_t plane,
                     MutableImageView grad_phi) {
  using T = Real<Stored>;
  const int64_t stride = padded_row(p.inner_channels), voxels = p.axes[1].coarse * p.axes[2].coarse;
  T* sum = static_cast<T*>(const_cast<void*>(a));
  if (b != nullptr) {
    const T* other = static_cast<const T*>(b);
    for (int64_t i = 0; i < voxels * stride; i += lanes<T>) store(sum + i, load(sum + i) + load(other + i));
  }
  store_voxel_rows(sum, stride, p.inner_channels, voxels, at<Stored>(grad_phi, plane * voxels), grad_phi);
}

template <class Body>
void dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Half: return body(Float16{});
    default: return body(float{});  // cpu.cpp has refused all others
  }
}

size_t scratch_bytes(const GateProblem& p) {
  const int64_t inner = padded_row(p.inner_channels), channels = padded_row(p.x_channels);
  const int64_t planes = p.same_grid ? 0 : inner * p.axes[2].coarse * (3 * p.axes[1].coarse + 1);
  const int64_t tiles = p.tile_voxels * (2 * channels + 2 * inner + 2);
  return (planes + tiles + 16 * 8) * (p.type == ScalarType::Double ? 8 : 4);
}

void forward(const GateProblem& p, const GateForwardChunk& chunk, void* scratch) {
  dispatch(p.type, [&](auto zero) { forward_chunk<decltype(zero)>(p, chunk, scratch); });
}

void backward(const GateProblem& p, const GateBackwardChunk& chunk, void* scratch) {
  dispatch(p.type, [&](auto zero) { backward_chunk<decltype(zero)>(p, chunk, scratch); });
}

void store_plane(const GateProblem& p, const void* a, const void* b, int64_t plane,
                 MutableImageView grad_phi) {
  dispatch(p.type, [&](auto zero) { store_plane_sum<decltype(zero)>(p, a, b, plane, grad_phi); });
}

}  // namespace

const GateKernels gate_kernels = {scratch_bytes, forward, backward, store_plane};

}  // namespace lungkit::LUNGKIT_ISA
