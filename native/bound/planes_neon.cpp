#include <arm_neon.h>

#include <cstring>

#include "bound/layout.h"
#include "bound/planes.h"

namespace moebound {

void put_planes_neon(const uint8_t* low, size_t count, uint32_t low_bits, uint8_t* planes) {
  uint8_t padded[kGroup] = {};
  std::memcpy(padded, low, count);
  const uint8x16_t place = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201ull));
  const uint8x16_t bytes[2] = {vld1q_u8(padded), vld1q_u8(padded + 16)};
  for (uint32_t b = 0; b < low_bits; ++b) {
    const uint8x16_t bit = vdupq_n_u8(uint8_t(1u << b));
    // Each byte's own bit of the plane, then eight of them added to a byte.
    const uint8x16_t pairs = vpaddq_u8(vandq_u8(vtstq_u8(bytes[0], bit), place), vandq_u8(vtstq_u8(bytes[1], bit), place));
    const uint8x16_t fours = vpaddq_u8(pairs, pairs);
    const uint32_t plane = vgetq_lane_u32(vreinterpretq_u32_u8(vpaddq_u8(fours, fours)), 0);
    std::memcpy(planes + 4 * b, &plane, 4);
  }
}

}  // namespace moebound
