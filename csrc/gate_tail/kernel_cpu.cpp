// The tail of an attention gate whose projections were computed before it: psi = weight . relu(a + b), and
// out = alpha x, each forward and backward in one pass. Compiled once for each instruction set
// (support/isa.h).
//
// A channels-first chunk is walked in tiles of voxels whose maps stay in L1 while one channel after another
// passes; a channels-last one voxel by voxel, with the channels in vectors.
#include "kernel.h"

#include "../support/simd_maths.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t tile_voxels = 1024;

template <class Stored>
Vec<Real<Stored>> load_up_to(const Stored* from, int64_t count) {
  return count >= lanes<Real<Stored>> ? load(from) : load_first(from, count);
}

template <class Stored>
void store_up_to(Stored* to, Vec<Real<Stored>> v, int64_t count) {
  if (count >= lanes<Real<Stored>>) {
    store(to, v);
  } else {
    store_first(to, v, count);
  }
}

template <class V>
V relu(V v) {
  return v < 0 ? V{} : v;  // keeps NaN
}

template <class T>
T sum_of_lanes(Vec<T> v) {
  T sum = 0;
  for (int l = 0; l < lanes<T>; ++l) sum += v[l];
  return sum;
}

// The rows of a chunk, each a run of values side by side: the voxels of a channel, or the channels of a
// voxel.
template <class Stored>
struct Rows {
  Rows(TailFeatures view, bool by_voxel)
      : data(static_cast<const Stored*>(view.data)),
        stride(by_voxel ? view.voxel_stride : view.channel_stride) {}
  const Stored* operator[](int64_t row) const { return data + row * stride; }
  const Stored* data;
  int64_t stride;
};
template <class Stored>
struct MutableRows {
  MutableRows(MutableTailFeatures view, bool by_voxel)
      : data(static_cast<Stored*>(view.data)), stride(by_voxel ? view.voxel_stride : view.channel_stride) {}
  Stored* operator[](int64_t row) const { return data + row * stride; }
  explicit operator bool() const { return data != nullptr; }
  Stored* data;
  int64_t stride;
};

// Calls body(first, count) for tiles of the chunk's voxels.
template <class Body>
void for_each_tile(int64_t voxels, const Body& body) {
  for (int64_t v = 0; v < voxels; v += tile_voxels)
    body(v, voxels - v < tile_voxels ? voxels - v : tile_voxels);
}

// A map of a tile, in the type that is computed with.
template <class T>
struct alignas(64) MapTile {
  template <class Stored>
  void read(const Stored* from, int64_t count) {
    for (int64_t v = 0; v < count; v += lanes<T>) store(values + v, load_up_to(from + v, count - v));
  }
  template <class Stored>
  void write(Stored* to, int64_t count) const {
    for (int64_t v = 0; v < count; v += lanes<T>) store_up_to(to + v, load(values + v), count - v);
  }
  void clear(int64_t count) {
    for (int64_t v = 0; v < count; v += lanes<T>) store(values + v, Vec<T>{});
  }
  T values[tile_voxels];
};

template <class Stored>
void psi_forward(const TailChunk& chunk, TailFeatures a_view, TailFeatures b_view, const void* weights,
                 void* psi_out, MutableTailFeatures q_view) {
  using T = Real<Stored>;
  const bool by_voxel = q_view.voxel_stride != 1;
  const Rows<Stored> a(a_view, by_voxel), b(b_view, by_voxel);
  const MutableRows<Stored> q(q_view, by_voxel);
  const T* weight = static_cast<const T*>(weights);
  Stored* psi = static_cast<Stored*>(psi_out);
  for_each_tile(chunk.voxels, [&](int64_t first, int64_t count) {
    MapTile<T> sums;
    if (by_voxel) {
      for (int64_t v = 0; v < count; ++v) {
        Vec<T> sum{};
        for (int64_t c = 0; c < chunk.channels; c += lanes<T>) {
          const int64_t rest = chunk.channels - c;
          const Vec<T> value = relu(load_up_to(a[first + v] + c, rest) + load_up_to(b[first + v] + c, rest));
          store_up_to(q[first + v] + c, value, rest);
          sum += load(weight + c) * value;
        }
        sums.values[v] = sum_of_lanes<T>(sum);
      }
    } else {
      sums.clear(count);
      for (int64_t c = 0; c < chunk.channels; ++c) {
        for (int64_t v = 0; v < count; v += lanes<T>) {
          const int64_t rest = count - v;
          const Vec<T> value = relu(load_up_to(a[c] + first + v, rest) + load_up_to(b[c] + first + v, rest));
          store_up_to(q[c] + first + v, value, rest);
          store(sums.values + v, load(sums.values + v) + weight[c] * value);
        }
      }
    }
    sums.write(psi + first, count);
  });
}

template <class Stored>
void psi_backward(const TailChunk& chunk, const void* grad_psi, TailFeatures q_view, const void* weights,
                  MutableTailFeatures grad_view, void* grad_weights) {
  using T = Real<Stored>;
  const bool by_voxel = q_view.voxel_stride != 1;
  const Rows<Stored> q(q_view, by_voxel);
  const MutableRows<Stored> grad(grad_view, by_voxel);
  const T* weight = static_cast<const T*>(weights);
  T* grad_weight = static_cast<T*>(grad_weights);
  for_each_tile(chunk.voxels, [&](int64_t first, int64_t count) {
    MapTile<T> slopes;
    slopes.read(static_cast<const Stored*>(grad_psi) + first, count);
    if (by_voxel) {
      for (int64_t v = 0; v < count; ++v) {
        const T slope = slopes.values[v];
        for (int64_t c = 0; c < chunk.channels; c += lanes<T>) {
          const int64_t rest = chunk.channels - c;
          const Vec<T> value = load_up_to(q[first + v] + c, rest);
          if (grad) {
            store_up_to(grad[first + v] + c, value <= 0 ? Vec<T>{} : slope * load(weight + c), rest);
          }
          if (grad_weight) store(grad_weight + c, load(grad_weight + c) + slope * value);
        }
      }
      return;
    }
    for (int64_t c = 0; c < chunk.channels; ++c) {
      Vec<T> sum{};
      for (int64_t v = 0; v < count; v += lanes<T>) {
        const int64_t rest = count - v;
        const Vec<T> value = load_up_to(q[c] + first + v, rest), slope = load(slopes.values + v);
        if (grad) store_up_to(grad[c] + first + v, value <= 0 ? Vec<T>{} : slope * weight[c], rest);
        sum += slope * value;
      }
      if (grad_weight) grad_weight[c] += sum_of_lanes<T>(sum);
    }
  });
}

template <class Stored>
void scale_forward(const TailChunk& chunk, TailFeatures x_view, const void* alpha,
                   MutableTailFeatures out_view) {
  using T = Real<Stored>;
  const bool by_voxel = out_view.voxel_stride != 1;
  const Rows<Stored> x(x_view, by_voxel);
  const MutableRows<Stored> out(out_view, by_voxel);
  for_each_tile(chunk.voxels, [&](int64_t first, int64_t count) {
    MapTile<T> map;
    map.read(static_cast<const Stored*>(alpha) + first, count);
    const int64_t rows = by_voxel ? count : chunk.channels, width = by_voxel ? chunk.channels : count;
    const int64_t row = by_voxel ? first : 0, column = by_voxel ? 0 : first;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < width; k += lanes<T>) {
        const Vec<T> factor = by_voxel ? broadcast(map.values[r]) : load(map.values + k);
        const Vec<T> value = load_up_to(x[row + r] + column + k, width - k);
        store_up_to(out[row + r] + column + k, factor * value, width - k);
      }
    }
  });
}

template <class Stored>
void scale_backward(const TailChunk& chunk, TailFeatures grad_out_view, TailFeatures x_view,
                    const void* alpha, MutableTailFeatures grad_x_view, void* grad_alpha) {
  using T = Real<Stored>;
  const bool by_voxel = x_view.voxel_stride != 1;
  const Rows<Stored> grad_out(grad_out_view, by_voxel), x(x_view, by_voxel);
  const MutableRows<Stored> grad_x(grad_x_view, by_voxel);
  for_each_tile(chunk.voxels, [&](int64_t first, int64_t count) {
    MapTile<T> map, sums;
    map.read(static_cast<const Stored*>(alpha) + first, count);
    sums.clear(count);
    const int64_t rows = by_voxel ? count : chunk.channels, width = by_voxel ? chunk.channels : count;
    const int64_t row = by_voxel ? first : 0, column = by_voxel ? 0 : first;
    for (int64_t r = 0; r < rows; ++r) {
      Vec<T> sum{};
      for (int64_t k = 0; k < width; k += lanes<T>) {
        const Vec<T> slope = load_up_to(grad_out[row + r] + column + k, width - k);
        const Vec<T> product = slope * load_up_to(x[row + r] + column + k, width - k);
        const Vec<T> factor = by_voxel ? broadcast(map.values[r]) : load(map.values + k);
        if (grad_x) store_up_to(grad_x[row + r] + column + k, factor * slope, width - k);
        if (by_voxel) {
          sum += product;
        } else {
          store(sums.values + k, load(sums.values + k) + product);
        }
      }
      if (by_voxel) sums.values[r] = sum_of_lanes<T>(sum);
    }
    if (grad_alpha != nullptr) sums.write(static_cast<Stored*>(grad_alpha) + first, count);
  });
}

template <class Body>
void dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double: return body(double{});
    case ScalarType::Half: return body(Float16{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default: return body(float{});  // cpu.cpp has refused all others
  }
}

void psi_any(const TailChunk& chunk, TailFeatures a, TailFeatures b, const void* weight, void* psi,
             MutableTailFeatures q) {
  dispatch(chunk.type, [&](auto zero) { psi_forward<decltype(zero)>(chunk, a, b, weight, psi, q); });
}

void psi_backward_any(const TailChunk& chunk, const void* grad_psi, TailFeatures q, const void* weight,
                      MutableTailFeatures grad, void* grad_weight) {
  dispatch(chunk.type,
           [&](auto zero) { psi_backward<decltype(zero)>(chunk, grad_psi, q, weight, grad, grad_weight); });
}

void scale_any(const TailChunk& chunk, TailFeatures x, const void* alpha, MutableTailFeatures out) {
  dispatch(chunk.type, [&](auto zero) { scale_forward<decltype(zero)>(chunk, x, alpha, out); });
}

void scale_backward_any(const TailChunk& chunk, TailFeatures grad_out, TailFeatures x, const void* alpha,
                        MutableTailFeatures grad_x, void* grad_alpha) {
  dispatch(chunk.type,
           [&](auto zero) { scale_backward<decltype(zero)>(chunk, grad_out, x, alpha, grad_x, grad_alpha); });
}

}  // namespace

const TailKernels tail_kernels = {psi_any, psi_backward_any, scale_any, scale_backward_any};

}  // namespace lungkit::LUNGKIT_ISA
