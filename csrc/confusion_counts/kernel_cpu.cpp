// Counts TP, FP and FN in one pass: a tile of voxels becomes 16-bit class codes, and each class is counted by
// comparing codes, 8 to 32 voxels an instruction. Compiled once for each instruction set (support/isa.h).
#include "kernel.h"

#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace lungkit::LUNGKIT_ISA {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

constexpr int tile_voxels = 2048;      // codes of a tile fit in L1; their number fits in 16-bit counters
constexpr int64_t compare_up_to = 32;  // more classes than this are counted by table, not by comparison

// Class indices to codes. Bytes are compared as 16-bit numbers, so that 32 of them fill the widest register.
template <class Label>
void encode_labels(const Label* labels, int64_t stride, int n, int64_t num_classes,
                   std::optional<int64_t> ignore, ClassCode* codes) {
  using Wide = std::conditional_t<sizeof(Label) == 1, uint16_t, int64_t>;
  const Wide classes = static_cast<Wide>(num_classes);
  const bool has_ignore = ignore.has_value() && static_cast<Label>(*ignore) == *ignore;
  const Wide ignored = has_ignore ? static_cast<Wide>(*ignore) : Wide(-1);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const Wide label = static_cast<Wide>(labels[i * stride]);
    const ClassCode code = label >= 0 && label < classes ? static_cast<ClassCode>(label) : invalid_code;
    codes[i] = has_ignore && label == ignored ? ignored_code : code;
  }
}

// The most probable class of each voxel; the lowest index wins a tie and NaN counts as the largest, as in
// torch.argmax. One channel is a sigmoid model: class 1 where the logit is positive.
template <class T>
void encode_logits(const T* logits, int n, const ConfusionChunk& chunk, ClassCode* codes) {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t stride = chunk.pred_voxel_stride;
  if (chunk.pred_channels == 1) {
    for (int i = 0; i < n; ++i) codes[i] = static_cast<Real>(logits[i * stride]) > Real(0) ? 1 : 0;
    return;
  }
  Real best[tile_voxels];
  for (int i = 0; i < n; ++i) {
    best[i] = static_cast<Real>(logits[i * stride]);
    codes[i] = 0;
  }
  for (int64_t c = 1; c < chunk.pred_channels; ++c) {
    const T* channel = logits + c * chunk.pred_channel_stride;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const Real value = static_cast<Real>(channel[i * stride]);
      const bool greater = (value > best[i]) | ((value != value) & (best[i] == best[i]));
      best[i] = greater ? value : best[i];
      codes[i] = greater ? static_cast<ClassCode>(c) : codes[i];
    }
  }
}

void count_by_comparison(const ClassCode* pred, const ClassCode* labels, int n, int64_t classes,
                         int64_t* counts) {
  for (int64_t c = 0; c < classes; ++c) {
    const ClassCode code = static_cast<ClassCode>(c);
    uint16_t both = 0, in_pred = 0, in_labels = 0;
#pragma omp simd reduction(+ : both, in_pred, in_labels)
    for (int i = 0; i < n; ++i) {
      const uint16_t p = pred[i] == code;
      const uint16_t l = labels[i] == code;
      both += p & l;
      in_pred += p;
      in_labels += l;
    }
    counts[3 * c] += both;
    counts[3 * c + 1] += in_pred - both;
    counts[3 * c + 2] += in_labels - both;
  }
}

void count_by_table(const ClassCode* pred, const ClassCode* labels, int n, int64_t* counts) {
  for (int i = 0; i < n; ++i) {
    if (labels[i] == ignored_code) continue;
    if (pred[i] == labels[i]) {
      ++counts[3 * pred[i]];
    } else {
      ++counts[3 * pred[i] + 1];
      ++counts[3 * labels[i] + 2];
    }
  }
}

// The codes of n class indices, whatever their dtype.
void encode(const void* labels, ScalarType type, int64_t offset, int64_t stride, int n, int64_t num_classes,
            std::optional<int64_t> ignore, ClassCode* codes) {
  const auto encode_as = [&](auto zero) {
    encode_labels(static_cast<const decltype(zero)*>(labels) + offset, stride, n, num_classes, ignore, codes);
  };
  switch (type) {
    case ScalarType::Short: return encode_as(int16_t{});
    case ScalarType::Int: return encode_as(int32_t{});
    case ScalarType::Long: return encode_as(int64_t{});
    default: return encode_as(uint8_t{});  // uint8 and bool; cpu.cpp has refused all others
  }
}

void encode_argmax(int64_t first, int n, const ConfusionChunk& chunk, ClassCode* codes) {
  const int64_t offset = first * chunk.pred_voxel_stride;
  switch (chunk.pred_type) {
    case ScalarType::Double:
      return encode_logits(static_cast<const double*>(chunk.pred) + offset, n, chunk, codes);
    case ScalarType::Half:
      return encode_logits(static_cast<const Half*>(chunk.pred) + offset, n, chunk, codes);
    case ScalarType::BFloat16:
      return encode_logits(static_cast<const BFloat16*>(chunk.pred) + offset, n, chunk, codes);
    default: return encode_logits(static_cast<const float*>(chunk.pred) + offset, n, chunk, codes);
  }
}

int64_t count(const ConfusionChunk& chunk, int64_t* counts) {
  alignas(64) ClassCode pred[tile_voxels];
  alignas(64) ClassCode labels[tile_voxels];
  int64_t counted = 0;
  for (int64_t first = 0; first < chunk.voxels; first += tile_voxels) {
    const int64_t left = chunk.voxels - first;
    const int n = static_cast<int>(left < tile_voxels ? left : tile_voxels);
    encode(chunk.labels, chunk.label_type, first * chunk.label_voxel_stride, chunk.label_voxel_stride, n,
           chunk.num_classes, chunk.ignore_index, labels);
    if (chunk.pred_channels > 0) {
      encode_argmax(first, n, chunk, pred);
    } else {
      encode(chunk.pred, chunk.pred_type, first * chunk.pred_voxel_stride, chunk.pred_voxel_stride, n,
             chunk.num_classes, std::nullopt, pred);
    }
    uint16_t ignored = 0, invalid = 0;
#pragma omp simd reduction(+ : ignored, invalid)
    for (int i = 0; i < n; ++i) {
      const bool skip = labels[i] == ignored_code;
      pred[i] = skip ? ignored_code : pred[i];
      ignored += skip;
      invalid += (pred[i] == invalid_code) | (labels[i] == invalid_code);
    }
    if (invalid != 0) return -1;
    counted += n - ignored;
    if (chunk.num_classes <= compare_up_to) {
      count_by_comparison(pred, labels, n, chunk.num_classes, counts);
    } else {
      count_by_table(pred, labels, n, counts);
    }
  }
  return counted;
}

}  // namespace

const ConfusionKernels confusion_kernels = {count};

}  // namespace lungkit::LUNGKIT_ISA
