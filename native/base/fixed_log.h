// log2 in fixed point, so that an encoder's choices, and with them its bytes, are the same on
// every machine. libm's log2 may differ in its last bit.
#pragma once
#include <bit>
#include <cstdint>

namespace moebound {

constexpr uint32_t kLogOne = 1u << 16;  // log2 results and bit costs are in units of 1/65536 bit

// floor(65536 · log2 x) within 2 units, for x >= 1.
inline uint32_t fixed_log2(uint64_t x) {
  const uint32_t whole = uint32_t(std::bit_width(x)) - 1;
  uint64_t m = whole >= 31 ? x >> (whole - 31) : x << (31 - whole);  // in [2^31, 2^32)
  uint32_t fraction = 0;
  for (int i = 0; i < 16; ++i) {
    m = m * m >> 31;
    fraction <<= 1;
    if (m >> 32) {
      m >>= 1;
      fraction |= 1;
    }
  }
  return whole * kLogOne + fraction;
}

}  // namespace moebound
