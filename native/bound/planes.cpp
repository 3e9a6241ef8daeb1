#include "bound/planes.h"

#include <cstring>

#include "base/bit_matrix.h"
#include "base/bytes.h"
#include "bound/layout.h"

namespace moebound {

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
