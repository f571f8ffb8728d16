// A tile of voxels in L1/L2: features are converted to float (or double) and padded with zeros on their way in, so
// that the arithmetic knows one type and no edges, and converted back on their way out. A tile keeps the order that
// the features have in memory: channels-first features by channel, channels-last features by voxel.
#pragma once

#include "kernel.h"
#include "simd.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

// Element (channel c, voxel v) lies at c * channel_step + v * voxel_step, one of which is 1.
template <class T>
struct Tile {
  T* data;
  int64_t channel_step;
  int64_t voxel_step;
  bool by_channel() const { return voxel_step == 1; }
};

template <class T>
int64_t round_up(int64_t n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// One row of `count` elements, padded with zeros up to `padded` (a multiple of the lanes).
template <class Stored>
void load_row(const Stored* from, int64_t count, int64_t padded, Real<Stored>* to) {
  constexpr int n = lanes<Real<Stored>>;
  int64_t i = 0;
  for (; i + n <= count; i += n) store(to + i, load(from + i));
  if (i < count) {
    store(to + i, load_first(from + i, static_cast<int>(count - i)));
    i += n;
  }
  for (; i < padded; i += n) store(to + i, Vec<Real<Stored>>{});
}

template <class Stored>
void store_row(const Real<Stored>* from, int64_t count, Stored* to) {
  constexpr int n = lanes<Real<Stored>>;
  int64_t i = 0;
  for (; i + n <= count; i += n) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load(from + i), static_cast<int>(count - i));
}

template <class Stored>
const Stored* at(const ImageView& view, int64_t first_voxel) {
  return static_cast<const Stored*>(view.data) + first_voxel * view.voxel_stride;
}
template <class Stored>
Stored* at(const MutableImageView& view, int64_t first_voxel) {
  return static_cast<Stored*>(view.data) + first_voxel * view.voxel_stride;
}

// Rows and columns of the copy: by channel, a row is a channel; by voxel, a row is a voxel.
template <class Stored>
void load_tile(const ImageView& view, int64_t channels, int64_t first_voxel, int64_t voxels, int64_t padded_voxels,
               Tile<Real<Stored>> tile) {
  const Stored* from = at<Stored>(view, first_voxel);
  const int64_t channels_padded = tile.by_channel() ? padded_rows(channels) : tile.voxel_step;
  if (tile.by_channel()) {
    for (int64_t c = 0; c < channels_padded; ++c) {
      const int64_t count = c < channels ? voxels : 0;
      load_row(from + c * view.channel_stride, count, padded_voxels, tile.data + c * tile.channel_step);
    }
  } else {
    for (int64_t v = 0; v < padded_voxels; ++v) {
      const int64_t count = v < voxels ? channels : 0;
      load_row(from + v * view.voxel_stride, count, channels_padded, tile.data + v * tile.voxel_step);
    }
  }
}

template <class Stored>
void store_tile(Tile<Real<Stored>> tile, int64_t channels, int64_t first_voxel, int64_t voxels,
                const MutableImageView& view) {
  Stored* to = at<Stored>(view, first_voxel);
  if (tile.by_channel()) {
    for (int64_t c = 0; c < channels; ++c) {
      store_row(tile.data + c * tile.channel_step, voxels, to + c * view.channel_stride);
    }
  } else {
    for (int64_t v = 0; v < voxels; ++v) {
      store_row(tile.data + v * tile.voxel_step, channels, to + v * view.voxel_stride);
    }
  }
}

// to[v * stride + c] = a + weight * (b - a), for any order of the features: the inner channels of phi, laid side by
// side. `a` and `b` are the same voxels of two planes; equal pointers mean one plane.
template <class Stored>
void load_voxel_rows(const Stored* a, const Stored* b, Real<Stored> weight, const ImageView& view, int64_t channels,
                     int64_t voxels, Real<Stored>* to, int64_t stride) {
  using T = Real<Stored>;
  constexpr int n = lanes<T>;
  const auto mix = [&](int64_t offset, int count) {
    const Vec<T> low = count == n ? load(a + offset) : load_first(a + offset, count);
    if (a == b) return low;
    const Vec<T> high = count == n ? load(b + offset) : load_first(b + offset, count);
    return low + weight * (high - low);
  };
  const auto count_of = [](int64_t left) { return static_cast<int>(left < n ? left : n); };
  for (int64_t c = 0; c < channels; c += n) {
    const int here = count_of(channels - c);
    if (view.voxel_stride != 1) {
      for (int64_t v = 0; v < voxels; ++v) store(to + v * stride + c, mix(v * view.voxel_stride + c, here));
      continue;
    }
    for (int64_t v = 0; v < voxels; v += n) {
      const int columns = count_of(voxels - v);
      Vec<T> rows[n] = {};
      if (columns == n) {
        for (int r = 0; r < here; ++r) rows[r] = mix((c + r) * view.channel_stride + v, n);
      } else {
        for (int r = 0; r < here; ++r) rows[r] = mix((c + r) * view.channel_stride + v, columns);
      }
      transpose<T>(rows);
      for (int r = 0; r < columns; ++r) store(to + (v + r) * stride + c, rows[r]);
    }
  }
}

// The way back: from rows of channels to features in any order.
template <class Stored>
void store_voxel_rows(const Real<Stored>* from, int64_t stride, int64_t channels, int64_t voxels, Stored* to,
                      const MutableImageView& view) {
  using T = Real<Stored>;
  constexpr int n = lanes<T>;
  if (view.voxel_stride != 1) {
    for (int64_t v = 0; v < voxels; ++v) store_row(from + v * stride, channels, to + v * view.voxel_stride);
    return;
  }
  for (int64_t c = 0; c < channels; c += n) {
    for (int64_t v = 0; v < voxels; v += n) {
      const int columns = static_cast<int>(voxels - v < n ? voxels - v : n);
      Vec<T> rows[n] = {};
      for (int r = 0; r < columns; ++r) rows[r] = load(from + (v + r) * stride + c);
      transpose<T>(rows);
      for (int r = 0; r < n && c + r < channels; ++r) {
        store_row(reinterpret_cast<const T*>(&rows[r]), columns, to + (c + r) * view.channel_stride + v);
      }
    }
  }
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
