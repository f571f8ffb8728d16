// What a thread counts in registers before a block adds it up.
#pragma once

#include "cuda_groups.h"

namespace lungkit {
namespace {

// In lane 0.
__device__ unsigned warp_sum(unsigned value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  return value;
}

// What a thread has seen of two classes, of up to four, of up to four in masks of bytes, or of any number.
// All threads of a warp call end_of_group() and finish(), which hand it on as add(k, number), for counts[k].
enum class Classes { two, few, few_bytes, any };
constexpr int few_classes = 4;

template <Classes classes>
struct Counter {
  unsigned voxels = 0, guesses = 0, labels = 0, both = 0;  // the last three of class 1

  template <class Add>
  __device__ __forceinline__ void see(int guess, int label, const Add&) {
    const bool counted = (guess | label) >= 0;
    voxels += counted;
    guesses += counted ? guess : 0;
    labels += counted ? label : 0;
    both += counted ? guess & label : 0;
  }
  // The same for four voxels whose class indices are the bytes of a word.
  __device__ __forceinline__ void see_bytes(unsigned guess, unsigned label, int64_t ignored) {
    constexpr unsigned each = 0x01010101u;
    const unsigned others = (guess | label) & 0xfe * each;  // not 0 in bytes that hold another class
    const unsigned has_others = (((others & 0x7f * each) + 0x7f * each) | others) >> 7;
    const unsigned is_ignored = ignored == 0 ? ~label : ignored == 1 ? label : 0;
    const unsigned counted = each & ~has_others & ~is_ignored;
    voxels += __popc(counted);
    guesses += __popc(counted & guess);
    labels += __popc(counted & label);
    both += __popc(counted & guess & label);
  }
  template <class Add>
  __device__ void finish(const Add& add) const {
    const unsigned n = warp_sum(voxels), g = warp_sum(guesses), l = warp_sum(labels), b = warp_sum(both);
    if (threadIdx.x % 32 != 0) return;
    const unsigned counts[] = {n - g - l + b, l - b, g - b, b, g - b, l - b};
    for (int k = 0; k < 6; ++k) add(k, counts[k]);
  }
  template <class Add>
  __device__ void end_of_group(const Add&) {}
};

// Voxels of each label, a byte each, by prediction.
template <>
struct Counter<Classes::few> {
  unsigned of_guess[few_classes] = {}, voxels = 0;
  int groups = 0;

  template <class Add>
  __device__ __forceinline__ void see(int guess, int label, const Add&) {
    const unsigned one = (guess | label) >= 0 ? 1u << 8 * (label & 3) : 0;
#pragma unroll
    for (int g = 0; g < few_classes; ++g) of_guess[g] += guess == g ? one : 0;
  }
  template <class Add>
  __device__ __forceinline__ void end_of_group(const Add& add) {
    if (++groups == 255 / group_voxels) finish(add);
  }
  template <class Add>
  __device__ void finish(const Add& add) {
    groups = 0;
#pragma unroll
    for (int g = 0; g < few_classes; ++g) {
      // Two sums in one: a warp's are below 2^16.
      const unsigned even = warp_sum(of_guess[g] & 0xff00ff), odd = warp_sum(of_guess[g] >> 8 & 0xff00ff);
      of_guess[g] = 0;
      if (threadIdx.x % 32 != 0) continue;
      const unsigned of_label[] = {even & 0xffff, odd & 0xffff, even >> 16, odd >> 16};
      for (int label = 0; label < few_classes; ++label) add_pair(add, g, label, of_label[label]);
    }
  }

 private:
  template <class Add>
  __device__ void add_pair(const Add& add, int guess, int label, unsigned count) {
    if (count == 0) return;
    voxels += count;
    if (guess == label) {
      add(3 * guess, count);
    } else {
      add(3 * guess + 1, count);
      add(3 * label + 2, count);
    }
  }
};

// Of masks of three or four classes in bytes: flags of four voxels at a time, a byte each, whose sums say how
// often each bit of the class index is set, both are, and prediction and label agree.
template <>
struct Counter<Classes::few_bytes> {
  static constexpr unsigned each = 0x01010101u;
  static constexpr int most_groups = 255 / (group_voxels / 4);
  unsigned counted = 0, guess[3] = {}, label[3] = {}, both[4] = {};
  unsigned voxels = 0;
  int groups = 0;

  __device__ __forceinline__ void see_bytes(unsigned guesses, unsigned labels, const ConfusionView& view) {
    const unsigned g0 = guesses & each, g1 = guesses >> 1 & each, g3 = g0 & g1;
    const unsigned l0 = labels & each, l1 = labels >> 1 & each, l3 = l0 & l1;
    const unsigned others = (guesses | labels) & 0xfc * each;  // not 0 in bytes that hold another class
    unsigned left_out = (((others & 0x7f * each) + 0x7f * each) | others) >> 7;
    if (view.num_classes == 3) left_out |= g3 | l3;
    if (view.ignored >= 0) {
      left_out |= (view.ignored & 1 ? l0 : ~l0) & (view.ignored & 2 ? l1 : ~l1);
    }
    const unsigned counts = each & ~left_out, equal = counts & ~((guesses ^ labels) | (g1 ^ l1));
    counted += counts;
    guess[0] += counts & g0;
    guess[1] += counts & g1;
    guess[2] += counts & g3;
    label[0] += counts & l0;
    label[1] += counts & l1;
    label[2] += counts & l3;
    both[0] += equal & g0;
    both[1] += equal & g1;
    both[2] += equal & g3;
    both[3] += equal;
  }
  template <class Add>
  __device__ __forceinline__ void end_of_group(const Add& add) {
    if (++groups == most_groups) finish(add);
  }
  template <class Add>
  __device__ void finish(const Add& add) {
    groups = 0;
    const auto total = [](unsigned& flags) {  // two sums in one: a warp's are below 2^16
      const unsigned sum = warp_sum((flags & 0xff00ff) + (flags >> 8 & 0xff00ff));
      flags = 0;
      return (sum & 0xffff) + (sum >> 16);
    };
    const unsigned n = total(counted);
    unsigned g[4], l[4], b[4];
    by_class(total, guess, n, g);
    by_class(total, label, n, l);
    by_class(total, both, total(both[3]), b);
    if (threadIdx.x % 32 != 0) return;
    voxels += n;
    for (int c = 0; c < few_classes; ++c) {
      if (b[c] != 0) add(3 * c, b[c]);
      if (g[c] != b[c]) add(3 * c + 1, g[c] - b[c]);
      if (l[c] != b[c]) add(3 * c + 2, l[c] - b[c]);
    }
  }

 private:
  template <class Total, int size>
  __device__ static void by_class(const Total& total, unsigned (&flags)[size], unsigned all,
                                  unsigned (&of)[4]) {
    const unsigned low = total(flags[0]), high = total(flags[1]);
    of[3] = total(flags[2]);
    of[1] = low - of[3];
    of[2] = high - of[3];
    of[0] = all - low - of[2];
  }
};

// A run of equal pairs at a time.
template <>
struct Counter<Classes::any> {
  int guess = not_counted, label = not_counted;
  unsigned count = 0, voxels = 0;

  template <class Add>
  __device__ __forceinline__ void see(int new_guess, int new_label, const Add& add) {
    if (new_guess != guess || new_label != label) {
      finish(add);
      guess = new_guess;
      label = new_label;
      count = 0;
    }
    ++count;
    voxels += (new_guess | new_label) >= 0;
  }
  template <class Add>
  __device__ void end_of_group(const Add&) {}
  template <class Add>
  __device__ void finish(const Add& add) const {
    if ((guess | label) < 0) return;
    if (guess == label) {
      add(3 * guess, count);
    } else {
      add(3 * guess + 1, count);
      add(3 * label + 2, count);
    }
  }
};
}  // namespace
}  // namespace lungkit
