#include <immintrin.h>

#include <cstring>

#include "bound/layout.h"
#include "bound/planes.h"

namespace moebound {

void put_planes_avx2(const uint8_t* low, size_t count, uint32_t low_bits, uint8_t* planes) {
  alignas(32) uint8_t padded[kGroup] = {};
  std::memcpy(padded, low, count);
  const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(padded));
  for (uint32_t b = 0; b < low_bits; ++b) {
    // Bit b of each byte becomes its sign; what the shift brings in from the byte below is under it.
    const int plane = _mm256_movemask_epi8(_mm256_sll_epi16(bytes, _mm_cvtsi32_si128(int(7 - b))));
    std::memcpy(planes + 4 * b, &plane, 4);
  }
}

}  // namespace moebound
