// Small matrices of bits, for planes: bit p of value i against bit i of plane p.
#pragma once
#include <cstdint>

namespace moebound {

// Eight bytes as an 8 × 8 matrix of bits, transposed (Hacker's Delight, section 7-3).
__attribute__((always_inline)) inline uint64_t transpose_bits(uint64_t x) {
  uint64_t t = (x ^ x >> 7) & 0x00AA00AA00AA00AAull;
  x ^= t ^ t << 7;
  t = (x ^ x >> 14) & 0x0000CCCC0000CCCCull;
  x ^= t ^ t << 14;
  t = (x ^ x >> 28) & 0x00000000F0F0F0F0ull;
  return x ^ t ^ t << 28;
}

}  // namespace moebound
