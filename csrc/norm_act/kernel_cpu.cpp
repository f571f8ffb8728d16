// Group norm, residual and leaky ReLU over one run of elements; compiled once for each instruction set
// (support/isa.h).
#include "kernel.h"

#include "../support/simd.h"

namespace lungkit::LUNGKIT_ISA {
namespace {

using torch::headeronly::ScalarType;

// Calls whole(element, slot) for each whole vector, and last(element, slot, count) for what is left at the
// end.
template <class T, class Whole, class Last>
inline void for_each_vector(int64_t count, int64_t slots, const Whole& whole, const Last& last) {
  constexpr int64_t n = lanes<T>;
  int64_t i = 0;
  if (slots > n) {
    for (; i + slots <= count; i += slots) {
      for (int64_t s = 0; s < slots; s += n) whole(i + s, s);
    }
  } else {
    for (; i + n <= count; i += n) whole(i, 0);
  }
  const int64_t begin = i;
  for (; i + n <= count; i += n) whole(i, i - begin);
  if (i < count) last(i, i - begin, count - i);
}

// The processor alone does not read far enough ahead of these loops: they work for a few cycles a line of the
// cache and wait for the next.
constexpr int64_t bytes_ahead = 1024;
template <class Stored>
inline void read_ahead(const Stored* from) {
  __builtin_prefetch(reinterpret_cast<const char*>(from) + bytes_ahead);
}

template <class T>
Vec<T> first_lanes(Vec<T> v, int64_t count) {
  for (int64_t l = count; l < lanes<T>; ++l) v[l] = T(0);
  return v;
}

// body(one_channel, option) with both as types.
template <class Stored, class Body>
void with_options(const NormRun& run, bool option, const Body& body) {
  const auto with = [&](auto one_channel) {
    return option ? body(one_channel, std::true_type{}) : body(one_channel, std::false_type{});
  };
  return run.slots == lanes<Real<Stored>> ? with(std::true_type{}) : with(std::false_type{});
}

// Adds term(element, slot), a vector, to the slots of the run; four turns at once, since an addition takes as
// long as several loads.
template <class T, class Term, class Last>
void add_to_slots(int64_t count, int64_t slots, T* sums, const Term& term, const Last& last) {
  constexpr int64_t n = lanes<T>;
  int64_t i = 0;
  if (slots == n) {
    Vec<T> a = load(sums), b{}, c{}, d{};
    for (; i + 4 * n <= count; i += 4 * n) {
      a += term(i, 0);
      b += term(i + n, 0);
      c += term(i + 2 * n, 0);
      d += term(i + 3 * n, 0);
    }
    store(sums, (a + b) + (c + d));
  } else {
    for (; i + 4 * slots <= count; i += 4 * slots) {
      for (int64_t s = 0; s < slots; s += n) {
        const Vec<T> first = term(i + s, s) + term(i + slots + s, s);
        const Vec<T> second = term(i + 2 * slots + s, s) + term(i + 3 * slots + s, s);
        store(sums + s, load(sums + s) + (first + second));
      }
    }
  }
  const int64_t done = i;
  for_each_vector<T>(
      count - done, slots, [&](int64_t e, int64_t s) { store(sums + s, load(sums + s) + term(done + e, s)); },
      [&](int64_t e, int64_t s, int64_t rest) {
        store(sums + s, load(sums + s) + first_lanes<T>(last(done + e, s, rest), rest));
      });
}

template <class Stored>
void sums(const NormRun& run, void* out) {
  using T = Real<Stored>;
  const auto* x = static_cast<const Stored*>(run.x);
  add_to_slots<T>(
      run.count, run.slots, static_cast<T*>(out), [&](int64_t i, int64_t) { return load(x + i); },
      [&](int64_t i, int64_t, int64_t rest) { return load_first(x + i, rest); });
}

template <class Stored>
void squares(const NormRun& run, const void* means, void* out) {
  using T = Real<Stored>;
  const auto* x = static_cast<const Stored*>(run.x);
  const auto* mean = static_cast<const T*>(means);
  const auto square = [](Vec<T> v) { return v * v; };
  add_to_slots<T>(
      run.count, run.slots, static_cast<T*>(out),
      [&](int64_t i, int64_t s) {
        __builtin_prefetch(x + run.count + i);  // the next chunk: this one came with its sums
        return square(load(x + i) - load(mean + s));
      },
      [&](int64_t i, int64_t s, int64_t rest) { return square(load_first(x + i, rest) - load(mean + s)); });
}

// A number for each slot; of a run of one channel it stays in a register.
template <class T, bool one_channel>
struct PerSlot {
  explicit PerSlot(const void* from) : values(static_cast<const T*>(from)), first(load(values)) {}
  Vec<T> operator[](int64_t s) const {
    if constexpr (one_channel) return first;
    return load(values + s);
  }
  const T* values;
  Vec<T> first;
};

template <class T, bool one_channel>
struct Affine {
  explicit Affine(const NormAffine& from) : mean(from.mean), scale(from.scale), shift(from.shift) {}
  Vec<T> operator()(Vec<T> x, int64_t s) const { return (x - mean[s]) * scale[s] + shift[s]; }
  PerSlot<T, one_channel> mean, scale, shift;
};

template <class Stored, bool one_channel, bool with_residual>
void forward_run(const NormRun& run, const NormForward& to) {
  using T = Real<Stored>;
  const auto* x = static_cast<const Stored*>(run.x);
  const auto* residual = static_cast<const Stored*>(to.residual);
  auto* y = static_cast<Stored*>(to.y);
  const Affine<T, one_channel> normalise(to.affine);
  const T slope = static_cast<T>(to.slope);
  const auto activate = [&](Vec<T> v) { return v > T(0) ? v : v * slope; };
  for_each_vector<T>(
      run.count, run.slots,
      [&](int64_t i, int64_t s) {
        Vec<T> v = normalise(load(x + i), s);
        if constexpr (with_residual) v += load(residual + i);
        store(y + i, activate(v));
      },
      [&](int64_t i, int64_t s, int64_t rest) {
        Vec<T> v = normalise(load_first(x + i, rest), s);
        if constexpr (with_residual) v += load_first(residual + i, rest);
        store_first(y + i, activate(v), rest);
      });
}

template <class Stored>
void forward(const NormRun& run, const NormForward& to) {
  with_options<Stored>(run, to.residual != nullptr, [&](auto one_channel, auto with_residual) {
    forward_run<Stored, one_channel, with_residual>(run, to);
  });
}

// The gradient before the activation, of whole vectors and of the first lanes of one.
template <class Stored, bool one_channel, bool from_y>
struct Gradient {
  using T = Real<Stored>;
  Gradient(const NormRun& run, const NormGradient& from)
      : normalise(from.affine),
        x(static_cast<const Stored*>(run.x)),
        grad_y(static_cast<const Stored*>(from.grad_y)),
        y(static_cast<const Stored*>(from.y)),
        slope(static_cast<T>(from.slope)) {}
  Vec<T> operator()(int64_t i, int64_t s, Vec<T> value) const {
    Vec<T> sign;
    if constexpr (from_y) {
      read_ahead(y + i);
      sign = load(y + i);
    } else {
      sign = normalise(value, s);
    }
    read_ahead(grad_y + i);
    const Vec<T> g = load(grad_y + i);
    return sign > T(0) ? g : g * slope;
  }
  Vec<T> first(int64_t i, int64_t s, Vec<T> value, int64_t rest) const {
    const Vec<T> sign = from_y ? load_first(y + i, rest) : normalise(value, s),
                 g = load_first(grad_y + i, rest);
    return sign > T(0) ? g : g * slope;
  }
  Affine<T, one_channel> normalise;
  const Stored* x;
  const Stored* grad_y;
  const Stored* y;
  T slope;
};

template <class Stored, bool one_channel, bool from_y>
void gradient_sums_run(const NormRun& run, const NormGradient& from, void* sum_g, void* sum_gx) {
  using T = Real<Stored>;
  constexpr int64_t n = lanes<T>;
  const Gradient<Stored, one_channel, from_y> gradient(run, from);
  const auto& mean = gradient.normalise.mean;
  auto* to_g = static_cast<T*>(sum_g);
  auto* to_gx = static_cast<T*>(sum_gx);
  int64_t done = 0;
  const auto add_two = [&](int64_t i, int64_t s, Vec<T>& g_sum, Vec<T>& gx_sum) {
    read_ahead(gradient.x + i);
    const Vec<T> value = load(gradient.x + i);
    const Vec<T> g = gradient(i, s, value);
    g_sum += g;
    gx_sum += g * (value - mean[s]);
  };
  if (run.slots == n) {  // sums stay in registers
    Vec<T> g0 = load(to_g), gx0 = load(to_gx), g1{}, gx1{};
    for (; done + 2 * n <= run.count; done += 2 * n) {
      add_two(done, 0, g0, gx0);
      add_two(done + n, 0, g1, gx1);
    }
    store(to_g, g0 + g1);
    store(to_gx, gx0 + gx1);
  } else {
    for (; done + 2 * run.slots <= run.count; done += 2 * run.slots) {
      for (int64_t s = 0; s < run.slots; s += n) {
        Vec<T> g = load(to_g + s), gx = load(to_gx + s);
        add_two(done + s, s, g, gx);
        add_two(done + run.slots + s, s, g, gx);
        store(to_g + s, g);
        store(to_gx + s, gx);
      }
    }
  }
  const int64_t begin = done;
  for_each_vector<T>(
      run.count - begin, run.slots,
      [&](int64_t e, int64_t s) {
        Vec<T> g = load(to_g + s), gx = load(to_gx + s);
        add_two(begin + e, s, g, gx);
        store(to_g + s, g);
        store(to_gx + s, gx);
      },
      [&](int64_t e, int64_t s, int64_t rest) {
        const Vec<T> value = load_first(gradient.x + begin + e, rest);
        const Vec<T> g = first_lanes<T>(gradient.first(begin + e, s, value, rest), rest);
        store(to_g + s, load(to_g + s) + g);
        store(to_gx + s, load(to_gx + s) + g * (value - mean[s]));
      });
}

template <class Stored>
void gradient_sums(const NormRun& run, const NormGradient& from, void* sum_g, void* sum_gx) {
  with_options<Stored>(run, from.y != nullptr, [&](auto one_channel, auto from_y) {
    gradient_sums_run<Stored, one_channel, from_y>(run, from, sum_g, sum_gx);
  });
}

template <class Stored, bool one_channel, bool from_y>
void input_gradient_run(const NormRun& run, const NormGradient& from, const NormInputGradient& to) {
  using T = Real<Stored>;
  const Gradient<Stored, one_channel, from_y> gradient(run, from);
  const auto& mean = gradient.normalise.mean;
  const PerSlot<T, one_channel> to_gradient(to.to_gradient), constant(to.constant), to_x(to.to_x);
  auto* grad_x = static_cast<Stored*>(to.grad_x);
  auto* grad_residual = static_cast<Stored*>(to.grad_residual);
  const auto of_input = [&](Vec<T> g, Vec<T> value, int64_t s) {
    return to_gradient[s] * g - constant[s] - (value - mean[s]) * to_x[s];
  };
  for_each_vector<T>(
      run.count, run.slots,
      [&](int64_t i, int64_t s) {
        read_ahead(gradient.x + i);
        const Vec<T> value = load(gradient.x + i), g = gradient(i, s, value);
        store(grad_x + i, of_input(g, value, s));
        if constexpr (from_y) {
          if (grad_residual != nullptr) store(grad_residual + i, g);
        }
      },
      [&](int64_t i, int64_t s, int64_t rest) {
        const Vec<T> value = load_first(gradient.x + i, rest), g = gradient.first(i, s, value, rest);
        store_first(grad_x + i, of_input(g, value, s), rest);
        if constexpr (from_y) {
          if (grad_residual != nullptr) store_first(grad_residual + i, g, rest);
        }
      });
}

template <class Stored>
void input_gradient(const NormRun& run, const NormGradient& from, const NormInputGradient& to) {
  with_options<Stored>(run, from.y != nullptr, [&](auto one_channel, auto from_y) {
    input_gradient_run<Stored, one_channel, from_y>(run, from, to);
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

void sums_any(const NormRun& run, void* out) {
  dispatch(run.type, [&](auto zero) { sums<decltype(zero)>(run, out); });
}
void squares_any(const NormRun& run, const void* mean, void* out) {
  dispatch(run.type, [&](auto zero) { squares<decltype(zero)>(run, mean, out); });
}
void forward_any(const NormRun& run, const NormForward& to) {
  dispatch(run.type, [&](auto zero) { forward<decltype(zero)>(run, to); });
}
void gradient_sums_any(const NormRun& run, const NormGradient& from, void* sum_g, void* sum_gx) {
  dispatch(run.type, [&](auto zero) { gradient_sums<decltype(zero)>(run, from, sum_g, sum_gx); });
}
void input_gradient_any(const NormRun& run, const NormGradient& from, const NormInputGradient& to) {
  dispatch(run.type, [&](auto zero) { input_gradient<decltype(zero)>(run, from, to); });
}

}  // namespace

const NormKernels norm_kernels = {lanes<float>, lanes<double>,     sums_any,          squares_any,
                                  forward_any,  gradient_sums_any, input_gradient_any};

}  // namespace lungkit::LUNGKIT_ISA
