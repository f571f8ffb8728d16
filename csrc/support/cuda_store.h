// Stores of several elements at once. Of a plain store of a struct nvcc makes as many stores of 4 bytes as it
// has words, each of which fills a quarter of what it touches.
#pragma once

#include <cstring>
#include <type_traits>

namespace lungkit {

// `value` has 16 or 8 bytes, and `to` lies on as many.
template <class Value>
__device__ __forceinline__ void store_whole(void* to, const Value& value) {
  using Word = std::conditional_t<sizeof(Value) == 16, uint4, uint2>;
  static_assert(sizeof(Value) == sizeof(Word));
  Word word;
  memcpy(&word, &value, sizeof word);
  __stwb(static_cast<Word*>(to), word);
}

}  // namespace lungkit
