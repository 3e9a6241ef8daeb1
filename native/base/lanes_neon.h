// Sixteen lanes of float32 in four vectors of four. For AArch64, where every CPU has NEON and fused multiply-add.
#pragma once
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

namespace moebound {
namespace {

struct Sixteen {
  float32x4_t four[4];
};

struct LanesNeon {
  using F = Sixteen;

  static F zero() { return all(0); }
  static F all(float x) { return {{vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}}; }
  static F load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
  static void store(float* p, F f) {
    for (size_t i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, f.four[i]);
  }
  static F fma(F a, F b, F c) {
    for (size_t i = 0; i < 4; ++i) c.four[i] = vfmaq_f32(c.four[i], a.four[i], b.four[i]);
    return c;
  }
  // Lanes i and i + 8 are added, then i and i + 4, i + 2, i + 1.
  static float sum(F f) {
    const float32x4_t four = vaddq_f32(vaddq_f32(f.four[0], f.four[2]), vaddq_f32(f.four[1], f.four[3]));
    return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
  }
  // 32 patterns of bfloat16: the even ones, then the odd ones.
  __attribute__((always_inline)) static void widen(const void* p, F& even, F& odd) {
    const auto* const from = static_cast<const uint8_t*>(p);
#pragma GCC unroll 4
    for (size_t q = 0; q < 4; ++q) {
      const uint32x4_t words = vreinterpretq_u32_u8(vld1q_u8(from + 16 * q));
      even.four[q] = vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
      odd.four[q] = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xFFFF0000u)));
    }
  }
};

}  // namespace
}  // namespace moebound
