// The sums of dice_ce and their gradient over one chunk of voxels. Compiled once for each instruction set
// (support/isa.h).
#include "kernel.h"

#include "any_classes.h"
#include "two_classes.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

constexpr int two_class_voxels = 256;  // of a tile  // of a tile

bool is_two_classes(const DiceCeChunk& chunk) {
  return chunk.classes == 2 && chunk.class_indices && chunk.options.activation == Activation::softmax &&
         chunk.options.cross_entropy != CrossEntropy::binary && chunk.options.gamma == 0;
}

template <class A>
struct TwoClassTile {
  alignas(64) int32_t codes[two_class_voxels];
  alignas(64) A buffer[2][two_class_voxels];
  const A* z[2];
  int voxels, padded;
  bool valid;

  // Logits already of type A are read where they lie, but for the last tile of a chunk, which may need
  // padding.
  TwoClassTile(const DiceCeChunk& chunk, int64_t first) {
    constexpr int step = interleaved * lanes<A>;
    const int64_t left = chunk.voxels - first;
    voxels = static_cast<int>(left < two_class_voxels ? left : two_class_voxels);
    padded = (voxels + step - 1) / step * step;
    valid = load_codes(chunk, first, voxels, padded, codes);
    const bool in_place = chunk.logits_type == (sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float) &&
                          chunk.logits_voxel_stride == 1 && voxels == padded;
    for (int c = 0; c < 2; ++c) {
      z[c] = in_place ? static_cast<const A*>(chunk.logits) + c * chunk.logits_channel_stride + first
                      : buffer[c];
      if (!in_place) load_logits(chunk, c, first, voxels, padded, buffer[c]);
    }
  }
};

template <class A>
bool two_class_sums(const DiceCeChunk& chunk, double* sums) {
  TwoClassSums<A> total;
  bool valid = true;
  for (int64_t first = 0; first < chunk.voxels; first += two_class_voxels) {
    const TwoClassTile<A> tile(chunk, first);
    valid &= tile.valid;
    const auto add = [&](auto squared) {
      const auto& z = tile.z;
      if (chunk.options.needs_rest) {
        total.template add<decltype(squared)::value, true>(z[0], z[1], tile.codes, tile.padded);
      } else {
        total.template add<decltype(squared)::value, false>(z[0], z[1], tile.codes, tile.padded);
      }
    };
    chunk.options.squared ? add(std::true_type{}) : add(std::false_type{});
  }
  total.write(chunk.options, sums);
  return valid;
}

template <class A>
void two_class_gradient(const DiceCeChunk& chunk, const double* slopes, void* gradient,
                        int64_t channel_stride, int64_t voxel_stride) {
  const auto slope = [&](Row row, int c) { return static_cast<A>(slopes[2 * row + c]); };
  const TwoClassSlopes<A> two(slope, chunk.options.squared,
                              chunk.options.cross_entropy != CrossEntropy::none);
  const auto write = !chunk.options.squared && two.rest == 0 && two.rest1 == 0
                         ? write_two_class_gradient<A, true>
                         : write_two_class_gradient<A, false>;
  for (int64_t first = 0; first < chunk.voxels; first += two_class_voxels) {
    TwoClassTile<A> tile(chunk, first);
    const bool in_place = chunk.logits_type == (sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float) &&
                          voxel_stride == 1 && tile.voxels == tile.padded;
    A* out[2];
    for (int c = 0; c < 2; ++c) {
      out[c] = in_place ? static_cast<A*>(gradient) + c * channel_stride + first : tile.buffer[c];
    }
    write(tile.z[0], tile.z[1], tile.codes, tile.padded, two, out[0], out[1]);
    for (int c = 0; c < 2 && !in_place; ++c) {
      store_elements(out[c], tile.voxels, gradient, chunk.logits_type,
                     c * channel_stride + first * voxel_stride, voxel_stride);
    }
  }
}

template <class A, bool indices>
bool any_class_sums(const DiceCeChunk& chunk, double* sums) {
  Tile<A, indices> tile(chunk);
  const int width = tile_voxels(chunk.classes);
  bool valid = true;
  for (int64_t i = 0; i < statistic_rows * chunk.classes; ++i) sums[i] = 0;
  for (int64_t first = 0; first < chunk.voxels; first += width) {
    valid &= tile.read(first, static_cast<int>(chunk.voxels - first < width ? chunk.voxels - first : width));
    tile.add_sums(sums);
  }
  return valid;
}

template <class A, bool indices>
void any_class_gradient(const DiceCeChunk& chunk, const double* slopes, void* gradient,
                        int64_t channel_stride, int64_t voxel_stride) {
  Tile<A, indices> tile(chunk);
  const int width = tile_voxels(chunk.classes);
  A* const narrow_slopes = tile.unused_scratch();
  for (int64_t i = 0; i < statistic_rows * chunk.classes; ++i) narrow_slopes[i] = static_cast<A>(slopes[i]);
  for (int64_t first = 0; first < chunk.voxels; first += width) {
    const int n = static_cast<int>(chunk.voxels - first < width ? chunk.voxels - first : width);
    tile.read(first, n);
    tile.differentiate(narrow_slopes);
    for (int64_t c = 0; c < chunk.classes; ++c) {
      store_elements(tile.gradient(c), n, gradient, chunk.logits_type,
                     c * channel_stride + first * voxel_stride, voxel_stride);
    }
  }
}

size_t scratch_bytes(const DiceCeChunk& chunk) {
  if (is_two_classes(chunk)) return 0;
  return scratch_elements(chunk.classes) *
         (chunk.logits_type == ScalarType::Double ? sizeof(double) : sizeof(float));
}

template <class A>
bool sums_of(const DiceCeChunk& chunk, double* sums) {
  if (is_two_classes(chunk)) return two_class_sums<A>(chunk, sums);
  return chunk.class_indices ? any_class_sums<A, true>(chunk, sums) : any_class_sums<A, false>(chunk, sums);
}

template <class A>
void gradient_of(const DiceCeChunk& chunk, const double* slopes, void* gradient, int64_t channel_stride,
                 int64_t voxel_stride) {
  const auto run = is_two_classes(chunk) ? two_class_gradient<A>
                   : chunk.class_indices ? any_class_gradient<A, true>
                                         : any_class_gradient<A, false>;
  run(chunk, slopes, gradient, channel_stride, voxel_stride);
}

bool sums(const DiceCeChunk& chunk, double* to) {
  return chunk.logits_type == ScalarType::Double ? sums_of<double>(chunk, to) : sums_of<float>(chunk, to);
}

void gradient(const DiceCeChunk& chunk, const double* slopes, void* to, int64_t channel_stride,
              int64_t voxel_stride) {
  const auto run = chunk.logits_type == ScalarType::Double ? gradient_of<double> : gradient_of<float>;
  run(chunk, slopes, to, channel_stride, voxel_stride);
}

}  // namespace

const DiceCeKernels dice_ce_kernels = {scratch_bytes, sums, gradient};

}  // namespace lungkit::LUNGKIT_ISA
