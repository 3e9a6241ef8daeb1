// Tables of bytes in NEON registers. Included by files compiled for AArch64 alone.
#pragma once
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

namespace moebound {
namespace {

// A table of 64 kParts bytes, of which at most two parts make sense: what is beyond them is 0.
template <size_t kParts>
struct ByteTable {
  uint8x16x4_t part[kParts];

  // From n_blocks blocks of 16, `stride` bytes apart; zeros behind them.
  ByteTable(const uint8_t* from, size_t n_blocks, size_t stride) {
    for (size_t b = 0; b < 4 * kParts; ++b) {
      part[b / 4].val[b % 4] = b < n_blocks ? vld1q_u8(from + stride * b) : vdupq_n_u8(0);
    }
  }
  __attribute__((always_inline)) uint8x16_t operator[](uint8x16_t index) const {
    uint8x16_t found = vqtbl4q_u8(part[0], index);
    if constexpr (kParts > 1) found = vqtbx4q_u8(found, part[1], vsubq_u8(index, vdupq_n_u8(64)));
    return found;
  }
};

// A float's bits as a bfloat16 in the upper half, rounded to even; below it is anything.
__attribute__((always_inline)) inline uint32x4_t rounded_bf16(float32x4_t value) {
  const uint32x4_t bits = vreinterpretq_u32_f32(value);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
}

}  // namespace
}  // namespace moebound
