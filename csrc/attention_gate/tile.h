// A tile of voxels in L1/L2: features are converted to float (or double) and padded with zeros on their way
// in, so that the arithmetic knows one type and no edges, and converted back on their way out. A tile keeps
// the order that the features have in memory, and with it their rows: of channels-first features a row is a
// channel, of channels-last features a voxel.
#pragma once

#include "../support/simd_maths.h"
#include "kernel.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

template <class T>
int64_t round_up(int64_t n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// Calls use(i, vector) for a row in memory, padded with zeros up to `padded`, a multiple of the lanes.
template <class Stored, class Use>
void read_row(const Stored* from, int64_t count, int64_t padded, const Use& use) {
  constexpr int64_t n = lanes<Real<Stored>>;
  int64_t i = 0;
  for (; i + n <= count; i += n) use(i, load(from + i));
  if (i < count) {
    use(i, load_first(from + i, count - i));
    i += n;
  }
  for (; i < padded; i += n) use(i, Vec<Real<Stored>>{});
}

// Writes value(i), value(i + lanes) ... to a row in memory.
template <class Stored, class Value>
void write_row(Stored* to, int64_t count, bool past_caches, const Value& value) {
  constexpr int64_t n = lanes<Real<Stored>>;
  int64_t i = 0;
  if (past_caches && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (; i + n <= count; i += n) stream(to + i, value(i));
  } else {
    for (; i + n <= count; i += n) store(to + i, value(i));
  }
  if (i < count) store_first(to + i, value(i), count - i);
}

template <class T>
void clear(T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += lanes<T>) store(to + i, Vec<T>{});
}

// The copy. Element (channel c, voxel v) lies at c * channel_step + v * voxel_step, one of which is 1.
template <class T>
struct Tile {
  T* data;
  int64_t channel_step;
  int64_t voxel_step;
  T* row(int64_t r) const { return data + r * (channel_step == 1 ? voxel_step : channel_step); }
};

template <class Stored>
const Stored* at(const ImageView& view, int64_t voxel) {
  return static_cast<const Stored*>(view.data) + voxel * view.voxel_stride;
}
template <class Stored>
Stored* at(const MutableImageView& view, int64_t voxel) {
  return static_cast<Stored*>(view.data) + voxel * view.voxel_stride;
}

// Some voxels of an image in memory, as rows.
template <class Stored>
struct Rows {
  template <class View>
  Rows(const View& view, int64_t channels, int64_t first_voxel, int64_t voxels)
      : by_channel(view.voxel_stride == 1),
        count(by_channel ? channels : voxels),
        length(by_channel ? voxels : channels),
        step(by_channel ? view.channel_stride : view.voxel_stride),
        data(at<std::remove_const_t<Stored>>(view, first_voxel)) {}

  Stored* row(int64_t r) const { return data + r * step; }

  // Memory is slow to start on a row: ask for row r before its turn, beyond the last one for the next tile's.
  void prefetch(int64_t r) const {
    constexpr int64_t line = 64 / sizeof(Stored);
    const Stored* from = by_channel && r >= count ? row(r - count) + length : row(r);
    for (int64_t i = 0; i < length; i += line) __builtin_prefetch(from + i);
  }

  bool by_channel;
  int64_t count;
  int64_t length;
  int64_t step;
  Stored* data;
};

constexpr int64_t prefetch_rows = 8;

// to[v * stride + c] = a + weight * (b - a), for any order of the features: the inner channels of phi, laid
// side by side. `a` and `b` are the same voxels of two planes; equal pointers mean one plane.
template <class Stored>
void load_voxel_rows(const Stored* a, const Stored* b, Real<Stored> weight, const ImageView& view,
                     int64_t channels, int64_t voxels, Real<Stored>* to, int64_t stride) {
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
    for (int64_t v = 0; v < voxels; ++v) {
      write_row(to + v * view.voxel_stride, channels, false,
                [&](int64_t i) { return load(from + v * stride + i); });
    }
    return;
  }
  for (int64_t c = 0; c < channels; c += n) {
    for (int64_t v = 0; v < voxels; v += n) {
      const int columns = static_cast<int>(voxels - v < n ? voxels - v : n);
      Vec<T> rows[n] = {};
      for (int r = 0; r < columns; ++r) rows[r] = load(from + (v + r) * stride + c);
      transpose<T>(rows);
      for (int r = 0; r < n && c + r < channels; ++r) {
        write_row(to + (c + r) * view.channel_stride + v, columns, false, [&](int64_t) { return rows[r]; });
      }
    }
  }
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
