// The three products of the gate are one loop: C (rows x width) += A (rows x depth) B (depth x width), with C
// and B in rows of vectors and A read one broadcast element at a time, so that A may be strided either way.
#pragma once

#include "../support/simd.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

template <class T>
struct Strided {
  const T* data;
  int64_t row_stride;
  int64_t depth_stride;
};

template <class T>
struct Matrix {
  T* data;
  int64_t stride;
};

constexpr int max_accumulators = vector_registers == 32 ? 24 : 12;

// One register block: `rows` x `vectors` accumulators stay in registers over the whole depth.
template <int rows, int vectors, class T>
void multiply_block(Strided<T> a, const T* b, int64_t b_stride, T* c, int64_t c_stride, int64_t depth) {
  Vec<T> sum[rows][vectors];
#pragma GCC unroll 24
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] = load(c + r * c_stride + v * lanes<T>);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) right[v] = load(b + k * b_stride + v * lanes<T>);
    const T* left = a.data + k * a.depth_stride;
#pragma GCC unroll 24
    for (int r = 0; r < rows; ++r) {
      const T factor = left[r * a.row_stride];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] += factor * right[v];
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(c + r * c_stride + v * lanes<T>, sum[r][v]);
  }
}

template <int block, int vectors, class T>
void multiply_rows(Strided<T> a, const T* b, int64_t b_stride, T* c, int64_t c_stride, int64_t rows,
                   int64_t depth) {
  for (; rows >= block; rows -= block) {
    multiply_block<block, vectors>(a, b, b_stride, c, c_stride, depth);
    a.data += block * a.row_stride;
    c += block * c_stride;
  }
  if constexpr (block > 4) {
    if (rows > 0) multiply_rows<block - 4, vectors>(a, b, b_stride, c, c_stride, rows, depth);
  }
}

// rows: a multiple of 4; width: counted in vectors.
template <class T>
void multiply_add(Strided<T> a, Matrix<const T> b, Matrix<T> c, int64_t rows, int64_t depth, int64_t width) {
  constexpr int pair = max_accumulators / 2 / 4 * 4;
  int64_t v = 0;
  for (; v + 2 <= width; v += 2) {
    multiply_rows<pair, 2>(a, b.data + v * lanes<T>, b.stride, c.data + v * lanes<T>, c.stride, rows, depth);
  }
  if (v < width) {
    multiply_rows<max_accumulators, 1>(a, b.data + v * lanes<T>, b.stride, c.data + v * lanes<T>, c.stride,
                                       rows, depth);
  }
}

}  // namespace
}  // namespace lungkit::LUNGKIT_ISA
