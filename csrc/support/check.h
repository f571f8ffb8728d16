// Argument checks: a failed check throws std::runtime_error, which torch turns into a Python RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>

namespace lungkit {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// "(2, 1, 96, 96)", as Python prints a shape.
inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

// The same kind of device, and the same one of several: an op runs where one of its tensors is, and the
// dispatcher does not ask where the others are.
inline bool on_same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.device() == b.device();
}

}  // namespace lungkit

// The message says which op, what was found and what is expected: LUNGKIT_CHECK(ok, "op: labels are ",
// shape).
#define LUNGKIT_CHECK(condition, ...) \
  do {                                \
    if (!(condition)) {               \
      ::lungkit::fail(__VA_ARGS__);   \
    }                                 \
  } while (false)
