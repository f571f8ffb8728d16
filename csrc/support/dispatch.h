// From run-time dtypes to compile-time types. Each function calls `body` with a value of the matching type:
//   dispatch_floating(logits.scalar_type(), "op", [&](auto zero) { using scalar_t = decltype(zero); ... });
#pragma once

#include <cstdint>
#include <type_traits>

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "check.h"

namespace lungkit {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// Sums run in fp32 for half types and in the input's own precision otherwise.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class Body>
void dispatch_floating(ScalarType type, const char* op, Body&& body) {
  switch (type) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::Half: return body(Half{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default: fail(op, ": the dtype must be float32, float64, float16 or bfloat16, got ", toString(type));
  }
}

// Bytes of one element of any type that the dispatch functions know.
inline int64_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
    case ScalarType::Byte: return 1;
    case ScalarType::Short:
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Int:
    case ScalarType::Float: return 4;
    case ScalarType::Long:
    case ScalarType::Double: return 8;
    default: fail("no kernel takes the dtype ", toString(type));
  }
}

// Class indices. bool is stored as one byte of 0 or 1 and read as uint8.
template <class Body>
void dispatch_labels(ScalarType type, const char* op, Body&& body) {
  switch (type) {
    case ScalarType::Bool:
    case ScalarType::Byte: return body(uint8_t{});
    case ScalarType::Short: return body(int16_t{});
    case ScalarType::Int: return body(int32_t{});
    case ScalarType::Long: return body(int64_t{});
    default: fail(op, ": labels must be uint8, int16, int32, int64 or bool, got ", toString(type));
  }
}

// Either of the two.
template <class Body>
void dispatch_elements(ScalarType type, const char* op, Body&& body) {
  switch (type) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::Half:
    case ScalarType::BFloat16: return dispatch_floating(type, op, body);
    default: return dispatch_labels(type, op, body);
  }
}

}  // namespace lungkit
