// up(phi) and its adjoint, a tile of voxels at a time. Both walk the tile row by row of the fine grid. The
// inner channels lie across the lanes, so that any ratio of the grids costs the same few operations a voxel.
#pragma once

#include "tile.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

// Calls body(z, y, first_x, last_x, offset) for each piece of a row of the fine grid in [first, last), the
// piece starting `offset` voxels after `first`.
template <class Body>
void for_each_row(const AxisView (&axes)[3], int64_t first, int64_t last, const Body& body) {
  const int64_t width = axes[2].fine;
  for (int64_t v = first; v < last;) {
    const int64_t row = v / width, x = v % width;
    const int64_t end = x + last - v < width ? x + last - v : width;
    body(row / axes[1].fine, row % axes[1].fine, x, end, v - first);
    v += end - x;
  }
}

// Interpolates one axis after the other: a plane of phi for each z, of it a row for each y, of it the voxels.
// Plane and row are kept from one tile to the next.
template <class Stored>
class Upsampler {
 public:
  using T = Real<Stored>;

  static int64_t scratch(const GateProblem& p) {
    return p.same_grid ? 0 : padded_row(p.inner_channels) * p.axes[2].coarse * (p.axes[1].coarse + 1);
  }

  Upsampler(const GateProblem& problem, const ImageView& phi, T* scratch)
      : p_(problem),
        phi_(phi),
        stride_(padded_row(problem.inner_channels)),
        plane_(scratch),
        row_(scratch + stride_ * problem.axes[2].coarse * problem.axes[1].coarse) {}

  // up[v * padded_row(Ci) + i] for the voxels in [first, last).
  void load(int64_t first, int64_t last, T* up) {
    if (p_.same_grid) {
      const Stored* from = at<Stored>(phi_, first);
      load_voxel_rows(from, from, T(0), phi_, p_.inner_channels, last - first, up, stride_);
      return;
    }
    for_each_row(p_.axes, first, last, [&](int64_t z, int64_t y, int64_t x, int64_t end, int64_t offset) {
      if (z != z_) set_plane(z);
      if (y != y_) set_row(y);
      interpolate_row(x, end, up + offset * stride_);
    });
  }

 private:
  void set_plane(int64_t z) {
    const AxisView& axis = p_.axes[0];
    const int64_t voxels = p_.axes[1].coarse * p_.axes[2].coarse;
    const Stored* low = at<Stored>(phi_, axis.lower[z] * voxels);
    const Stored* high = axis.weight[z] != 0 ? at<Stored>(phi_, (axis.lower[z] + 1) * voxels) : low;
    load_voxel_rows(low, high, static_cast<T>(axis.weight[z]), phi_, p_.inner_channels, voxels, plane_,
                    stride_);
    z_ = z;
    y_ = -1;
  }

  void set_row(int64_t y) {
    const AxisView& axis = p_.axes[1];
    const int64_t size = p_.axes[2].coarse * stride_;
    const T* low = plane_ + axis.lower[y] * size;
    y_ = y;
    mixed_ = low;
    if (axis.weight[y] == 0) return;
    const T* high = low + size;
    const T weight = static_cast<T>(axis.weight[y]);
    for (int64_t i = 0; i < size; i += lanes<T>) {
      const Vec<T> a = LUNGKIT_ISA::load(low + i);
      store(row_ + i, a + weight * (LUNGKIT_ISA::load(high + i) - a));
    }
    mixed_ = row_;
  }

  void interpolate_row(int64_t first, int64_t last, T* up) const {
    const AxisView& axis = p_.axes[2];
    for (int64_t c = 0; c < p_.inner_channels; c += lanes<T>) {
      for (int64_t x = first; x < last; ++x) {
        const T* low = mixed_ + axis.lower[x] * stride_ + c;
        const T weight = static_cast<T>(axis.weight[x]);
        const T* high = weight != 0 ? low + stride_ : low;
        const Vec<T> a = LUNGKIT_ISA::load(low);
        store(up + (x - first) * stride_ + c, a + weight * (LUNGKIT_ISA::load(high) - a));
      }
    }
  }

  const GateProblem& p_;
  const ImageView& phi_;
  const int64_t stride_;
  T* const plane_;
  T* const row_;
  const T* mixed_ = nullptr;
  int64_t z_ = -1;
  int64_t y_ = -1;
};

// The adjoint. A chunk holds whole planes of the fine grid and takes them in order, so at any time two planes
// of phi's gradient are open, lower[z] and the one after it; a plane is finished when lower[z] has passed it.
template <class Stored>
class Downsampler {
 public:
  using T = Real<Stored>;

  static int64_t scratch(const GateProblem& p) { return p.same_grid ? 0 : 2 * plane_size(p); }

  static int64_t plane_size(const GateProblem& p) {
    return padded_row(p.inner_channels) * p.axes[1].coarse * p.axes[2].coarse;
  }

  Downsampler(const GateProblem& problem, const GateBackwardChunk& chunk, T* scratch)
      : p_(problem), chunk_(chunk), stride_(padded_row(problem.inner_channels)), ring_(scratch) {
    if (chunk.grad_phi.data == nullptr || p_.same_grid) return;
    const int64_t plane = p_.axes[1].fine * p_.axes[2].fine;
    first_ = open_ = p_.axes[0].lower[chunk.first_voxel / plane];
    last_ = p_.axes[0].lower[chunk.last_voxel / plane - 1];
    clear(open_);
    clear(open_ + 1);
  }

  // grad[v * padded_row(Ci) + i] is the gradient of up(phi) at the voxels in [first, last).
  void add(int64_t first, int64_t last, const T* grad) {
    for_each_row(p_.axes, first, last, [&](int64_t z, int64_t y, int64_t x, int64_t end, int64_t offset) {
      for (; open_ < p_.axes[0].lower[z]; ++open_) {
        finish(open_);
        clear(open_ + 2);
      }
      add_row(z, y, x, end, grad + offset * stride_);
    });
  }

  void finish() { finish(open_); }

 private:
  T* plane(int64_t k) const {
    if (chunk_.first_plane != nullptr) {
      if (k == first_) return static_cast<T*>(chunk_.first_plane);
      if (k == last_ + 1) return static_cast<T*>(chunk_.next_plane);
    }
    return ring_ + (k & 1) * plane_size(p_);
  }

  void clear(int64_t k) const { LUNGKIT_ISA::clear(plane(k), plane_size(p_)); }

  void finish(int64_t k) const {
    if (k == first_ && chunk_.first_plane != nullptr) return;
    const int64_t voxels = p_.axes[1].coarse * p_.axes[2].coarse;
    store_voxel_rows(plane(k), stride_, p_.inner_channels, voxels, at<Stored>(chunk_.grad_phi, k * voxels),
                     chunk_.grad_phi);
  }

  // Where one coarse row of the sum goes: up to two planes and two rows of each.
  struct Target {
    T* row;
    T weight;
  };

  void add_row(int64_t z, int64_t y, int64_t first, int64_t last, const T* grad) const {
    Target targets[4];
    int count = 0;
    const int64_t row_size = p_.axes[2].coarse * stride_;
    const T wz = static_cast<T>(p_.axes[0].weight[z]), wy = static_cast<T>(p_.axes[1].weight[y]);
    T* low = plane(open_) + p_.axes[1].lower[y] * row_size;
    targets[count++] = {low, (1 - wz) * (1 - wy)};
    if (wy != 0) targets[count++] = {low + row_size, (1 - wz) * wy};
    if (wz != 0) {
      T* high = plane(open_ + 1) + p_.axes[1].lower[y] * row_size;
      targets[count++] = {high, wz * (1 - wy)};
      if (wy != 0) targets[count++] = {high + row_size, wz * wy};
    }
    const AxisView& axis = p_.axes[2];
    for (int64_t c = 0; c < p_.inner_channels; c += lanes<T>) {
      const auto flush = [&](int64_t k, Vec<T> sum) {
        for (int t = 0; t < count; ++t) {
          T* to = targets[t].row + k * stride_ + c;
          store(to, load(to) + targets[t].weight * sum);
        }
      };
      Vec<T> here{}, next{};
      int64_t k = axis.lower[first];
      for (int64_t x = first; x < last; ++x) {
        if (axis.lower[x] != k) {
          flush(k, here);
          here = next;
          next = Vec<T>{};
          ++k;
        }
        const Vec<T> g = load(grad + (x - first) * stride_ + c);
        const T weight = static_cast<T>(axis.weight[x]);
        here += (1 - weight) * g;
        next += weight * g;
      }
      flush(k, here);
      if (k + 1 < axis.coarse) flush(k + 1, next);
    }
  }

  const GateProblem& p_;
  const GateBackwardChunk& chunk_;
  const int64_t stride_;
  T* const ring_;
  int64_t first_ = 0;
  int64_t last_ = 0;
  int64_t open_ = 0;
};

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
