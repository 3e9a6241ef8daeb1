#include "planes.h"

#include <cstring>

#include "bound_layout.h"
#include "bytes.h"

namespace moebound {
namespace {

// Eight bytes as an 8 × 8 matrix of bits, transposed (Hacker's Delight, section 7-3).
uint64_t transpose_bits(uint64_t x) {
  uint64_t t = (x ^ x >> 7) & 0x00AA00AA00AA00AAull;
  x ^= t ^ t << 7;
  t = (x ^ x >> 14) & 0x0000CCCC0000CCCCull;
  x ^= t ^ t << 14;
  t = (x ^ x >> 28) & 0x00000000F0F0F0F0ull;
  return x ^ t ^ t << 28;
}

}  // namespace

void put_planes_any(const uint8_t* low, size_t count, uint32_t low_bits, uint8_t* planes) {
  uint8_t padded[kGroup] = {};
  std::memcpy(padded, low, count);
  uint8_t transposed[8][4];
  for (size_t v = 0; v < 4; ++v) {
    const uint64_t bits = transpose_bits(load<uint64_t>(padded + 8 * v));
    for (size_t b = 0; b < 8; ++b) transposed[b][v] = uint8_t(bits >> (8 * b));
  }
  std::memcpy(planes, transposed, 4 * low_bits);
}

}  // namespace moebound
