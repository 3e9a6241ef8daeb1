// Steps of a payload of version 2: a weight is q · step, rounded to the output dtype, and its step is
// that of its column, or of its row. In version 3 the other side has factors, which it is multiplied by.
// docs/format.md, sections 4.7 and 4.8, has the same in words.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "base/dtype.h"

namespace moebound {

constexpr uint32_t kMostLevel = 255;

// Steps are widest · 2^(-level / 4), the widest being such that a weight which is kappa half steps off
// is off by the bound.
struct Steps {
  bool by_row = false;
  uint16_t kappa = 0;  // float16, 1 to 16
  std::vector<uint8_t> levels;
  std::vector<uint8_t> factor_levels;  // of the other side, version 3; else none
};

// The steps of these levels. Throws std::invalid_argument where one is no normal float32, alone or
// times the least factor, or kappa is not within 1 .. 16.
std::vector<float> step_sizes(const Steps& steps, double bound);

// 2^(-level / 4), rounded once, of the factor levels.
std::vector<float> step_factors(const Steps& steps);

// q · step, rounded to the dtype, ties to even: its pattern. Integers, where hardware may differ.
inline uint16_t bf16_pattern(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // no NaN comes here
}

inline uint16_t f16_pattern(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7FFFFFFF;
  // Below 2^-14 halves are multiples of 2^-24, and so are floats of 0.5 and more.
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000 ? small : normal;
  return uint16_t((bits >> 16 & 0x8000) | (magnitude < 0x47800000 ? finite : 0x7C00));
}

template <class T>
inline typename T::Bits pattern_of(float value) {
  if constexpr (T::kDType == DType::kBF16) return bf16_pattern(value);
  if constexpr (T::kDType == DType::kF16) return f16_pattern(value);
  if constexpr (T::kDType == DType::kF32) return std::bit_cast<uint32_t>(value);
}

// The same, of NaN too.
template <class T>
inline typename T::Bits rounded(float value) {
  if (!std::isnan(value)) return pattern_of<T>(value);
  if constexpr (T::kDType == DType::kF16) return 0x7E00;
  else return pattern_of<T>(std::numeric_limits<float>::quiet_NaN());
}

}  // namespace moebound
