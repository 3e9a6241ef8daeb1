// Little-endian loads and stores at any address.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace moebound {

static_assert(std::endian::native == std::endian::little, "the formats are little-endian");

template <class T>
inline T load(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

template <class T>
inline void store(void* p, T value) {
  std::memcpy(p, &value, sizeof(T));
}

}  // namespace moebound
