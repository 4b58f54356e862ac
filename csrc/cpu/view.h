// How Python hands over a tensor: a pointer (null: absent) and its strides in elements.
#pragma once

#include <cstdint>

namespace endomamba {

struct View {
  char* p = nullptr;
  int64_t s[4] = {0, 0, 0, 0};
  __attribute__((always_inline)) explicit operator bool() const { return p != nullptr; }

  template <class T>
  __attribute__((always_inline)) inline T* at(int64_t i = 0, int64_t j = 0, int64_t k = 0, int64_t m = 0) const {
    return reinterpret_cast<T*>(p) + i * s[0] + j * s[1] + k * s[2] + m * s[3];
  }
};

}  // namespace endomamba
