// The three weight dtypes: their bits, their values, their order.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace moebound {

enum class DType : uint8_t { kBF16 = 0, kF16 = 1, kF32 = 2 };

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 0) {  // zero or denormal: mantissa · 2^-24, exact in float
    const float magnitude = float(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t exponent32 = exponent == 31 ? 255u : exponent + 112u;
  return std::bit_cast<float>(sign | exponent32 << 23 | mantissa << 13);
}

// Bits: the unsigned type of the pattern. kMaxFinite: the largest finite magnitude's pattern;
// magnitudes are ordered as their patterns are.
struct BF16 {
  using Bits = uint16_t;
  static constexpr DType kDType = DType::kBF16;
  static constexpr Bits kSign = 0x8000, kMaxFinite = 0x7F7F;
  static float value(Bits b) { return std::bit_cast<float>(uint32_t(b) << 16); }
};
struct F16 {
  using Bits = uint16_t;
  static constexpr DType kDType = DType::kF16;
  static constexpr Bits kSign = 0x8000, kMaxFinite = 0x7BFF;
  static float value(Bits b) { return half_to_float(b); }
};
struct F32 {
  using Bits = uint32_t;
  static constexpr DType kDType = DType::kF32;
  static constexpr Bits kSign = 0x80000000u, kMaxFinite = 0x7F7FFFFFu;
  static float value(Bits b) { return std::bit_cast<float>(b); }
};

// Calls f with the dtype's type, e.g. with_dtype(d, [&](auto t) { using T = decltype(t); ... }).
template <class F>
inline decltype(auto) with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBF16: return f(BF16{});
    case DType::kF16: return f(F16{});
    default: return f(F32{});
  }
}

inline size_t item_size(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

}  // namespace moebound
