// The exponential function of attention and of gates, the same bits everywhere: no function of the C library is in it.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace moebound {
namespace {

// e^x of x at most 0, within 8.3e-8 times itself (check_attend measures it): 1 of 0, and 0 below -87, where it is
// 1e-38. NaN stays NaN.
inline float exp_of(float x) {
  constexpr float kMagic = 0x1.8p23f;  // beside it whole numbers alone have room
  const float shifted = std::fma(x, 1.44269504f, kMagic), whole = shifted - kMagic;
  const float r = std::fma(whole, 2.12194440e-4f, std::fma(whole, -0.693359375f, x));  // x - whole · ln 2
  float p = std::fma(1.98756915e-4f, r, 1.39819995e-3f);
  p = std::fma(p, r, 8.33345191e-3f);
  p = std::fma(p, r, 4.16657959e-2f);
  p = std::fma(p, r, 1.66666655e-1f);
  p = std::fma(p, r, 0.5f);
  p = std::fma(p * r, r, r) + 1.0f;
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;  // 2^whole
  return x < -87.0f ? 0.0f : p * std::bit_cast<float>(power);
}

}  // namespace
}  // namespace moebound
