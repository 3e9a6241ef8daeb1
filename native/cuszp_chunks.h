// What one chunk of cuSZp's stream is made of: 1024 blocks of 32 values. Compiled once for each
// instruction set; the includer brings its own Lanes, and gets its own copy of everything here.
#pragma once
#include <algorithm>
#include <bit>
#include <cstring>

#include "bytes.h"
#include "cuszp_paths.h"

#define MOEBOUND_INLINE __attribute__((always_inline)) inline

namespace moebound {
namespace {

constexpr float kSaturated = 0x1p30f - 64;  // the largest float below 2^30

// The bin of a value. NaN and ±Inf have none and count as 0.
MOEBOUND_INLINE int32_t bin_of(float x, float reciprocal) {
  const float finite = (std::bit_cast<uint32_t>(x) & 0x7FFFFFFFu) < 0x7F800000u ? x : 0.0f;
  const float y = finite * reciprocal;
  float shifted = y + 0.5f;
  shifted = shifted < kSaturated ? shifted : kSaturated;
  shifted = shifted > -kSaturated ? shifted : -kSaturated;
  return int32_t(shifted) - int32_t(y < -0.5f);
}

struct Block {
  uint32_t magnitude[kCuszpBlock];
  uint32_t negative[kCuszpBlock];  // 0 or 1
  uint32_t all, others;            // bits that any magnitude has, and any but the first
};

// Quantizes a block, `count` values of it in the array, and takes differences.
template <class Lanes, class T>
MOEBOUND_INLINE void read_block(const typename T::Bits* values, size_t count, float reciprocal, CuszpMode mode,
                                Block& block) {
  typename T::Bits padded[kCuszpBlock] = {};
  if (count < kCuszpBlock) {
    std::memcpy(padded, values, count * sizeof *values);
    values = padded;
  }
  float x[kCuszpBlock];
  Lanes::widen(T{}, values, x);
  int32_t bins[kCuszpBlock + 1];
  bins[0] = 0;
  for (size_t i = 0; i < kCuszpBlock; ++i) bins[i + 1] = bin_of(x[i], reciprocal);
  int32_t differences[kCuszpBlock];
  if (mode == CuszpMode::kFixed) {
    std::memcpy(differences, bins + 1, sizeof differences);
  } else {
    for (size_t i = 0; i < kCuszpBlock; ++i) differences[i] = bins[i + 1] - bins[i];
  }
  if (count < kCuszpBlock) std::fill(differences + count, differences + kCuszpBlock, 0);
  uint32_t all = 0;
  for (size_t i = 0; i < kCuszpBlock; ++i) {
    block.negative[i] = uint32_t(differences[i]) >> 31;
    block.magnitude[i] = uint32_t(differences[i] < 0 ? -differences[i] : differences[i]);
    all |= block.magnitude[i];
  }
  block.all = all;
  if (mode == CuszpMode::kOutlier) {
    block.others = 0;
    for (size_t i = 1; i < kCuszpBlock; ++i) block.others |= block.magnitude[i];
  }
}

MOEBOUND_INLINE uint32_t bit_length(uint32_t x) { return uint32_t(std::bit_width(x)); }

MOEBOUND_INLINE CuszpRate rate_of(const Block& block, CuszpMode mode) {
  const CuszpRate plain{bit_length(block.all), 0};
  if (mode != CuszpMode::kOutlier) return plain;
  const CuszpRate with_outlier{bit_length(block.others), (bit_length(block.magnitude[0]) + 7) / 8};
  return with_outlier.n_bytes() < plain.n_bytes() ? with_outlier : plain;
}

// Calls each(first, count) for each block of a chunk, `count` of its values in the array.
template <class Each>
MOEBOUND_INLINE void for_blocks(size_t n_values, const Each& each) {
  for (size_t first = 0; first < n_values; first += kCuszpBlock) each(first, std::min(kCuszpBlock, n_values - first));
}

template <class Lanes>
size_t measure_chunk(DType source, const void* values, size_t n, const CuszpCoding& coding, uint8_t* codes) {
  size_t n_bytes = 0;
  with_dtype(source, [&](auto type) {
    using T = decltype(type);
    for_blocks(n, [&](size_t first, size_t count) {
      Block block;
      read_block<Lanes, T>(static_cast<const typename T::Bits*>(values) + first, count, coding.reciprocal, coding.mode,
                           block);
      const CuszpRate rate = rate_of(block, coding.mode);
      codes[first / kCuszpBlock] = rate.code();
      n_bytes += rate.n_bytes();
    });
  });
  return n_bytes;
}

template <class Lanes>
void write_chunk(DType source, const void* values, size_t n, const CuszpCoding& coding, const uint8_t* codes,
                 uint8_t* payload) {
  with_dtype(source, [&](auto type) {
    using T = decltype(type);
    for_blocks(n, [&](size_t first, size_t count) {
      const CuszpRate rate = CuszpRate::from_code(codes[first / kCuszpBlock]);
      if (rate.n_bytes() == 0) return;
      Block block;
      read_block<Lanes, T>(static_cast<const typename T::Bits*>(values) + first, count, coding.reciprocal, coding.mode,
                           block);
      if (rate.outlier_bytes) {
        std::memcpy(payload, block.magnitude, rate.outlier_bytes);
        payload += rate.outlier_bytes;
        block.magnitude[0] = 0;
      }
      Lanes::put_planes(block.negative, 1, payload);
      Lanes::put_planes(block.magnitude, rate.planes, payload + 4);
      payload += 4 + 4 * size_t(rate.planes);
    });
  });
}

template <class Lanes>
void decode_chunk(DType output, void* out, size_t n, const CuszpCoding& coding, const uint8_t* codes,
                  const uint8_t* payload) {
  with_dtype(output, [&](auto type) {
    using T = decltype(type);
    for_blocks(n, [&](size_t first, size_t count) {
      const CuszpRate rate = CuszpRate::from_code(codes[first / kCuszpBlock]);
      auto* const to = static_cast<typename T::Bits*>(out) + first;
      if (rate.n_bytes() == 0) {
        std::memset(to, 0, count * sizeof *to);
        return;
      }
      typename T::Bits values[kCuszpBlock];
      Lanes::decode_block(T{}, payload, rate, coding, values);
      std::memcpy(to, values, count * sizeof *to);
      payload += rate.n_bytes();
    });
  });
}

// Without any instruction set in particular.
struct AnyLanes {
  template <class T>
  MOEBOUND_INLINE static void widen(T, const typename T::Bits* values, float* x) {
    for (size_t i = 0; i < kCuszpBlock; ++i) x[i] = T::value(values[i]);
  }

  // n_planes words: bit p of value i is bit 7 - i % 8 of byte i / 8 of word p.
  MOEBOUND_INLINE static void put_planes(const uint32_t* values, uint32_t n_planes, uint8_t* planes) {
    for (uint32_t base = 0; base < n_planes; base += 8) {
      for (size_t byte = 0; byte < 4; ++byte) {
        uint64_t rows = 0;
        for (size_t i = 0; i < 8; ++i) rows |= uint64_t(uint8_t(values[8 * byte + i] >> base)) << (8 * (7 - i));
        const uint64_t columns = transpose_bits(rows);
        for (uint32_t p = base; p < std::min(n_planes, base + 8); ++p) {
          planes[4 * p + byte] = uint8_t(columns >> (8 * (p - base)));
        }
      }
    }
  }

  MOEBOUND_INLINE static void get_planes(const uint8_t* planes, uint32_t n_planes, uint32_t* values) {
    std::fill_n(values, kCuszpBlock, 0u);
    for (uint32_t base = 0; base < n_planes; base += 8) {
      for (size_t byte = 0; byte < 4; ++byte) {
        uint64_t columns = 0;
        for (uint32_t p = base; p < std::min(n_planes, base + 8); ++p) {
          columns |= uint64_t(planes[4 * p + byte]) << (8 * (p - base));
        }
        const uint64_t rows = transpose_bits(columns);
        for (size_t i = 0; i < 8; ++i) values[8 * byte + i] |= uint32_t(uint8_t(rows >> (8 * (7 - i)))) << base;
      }
    }
  }

  template <class T>
  MOEBOUND_INLINE static void decode_block(T, const uint8_t* payload, CuszpRate rate, const CuszpCoding& coding,
                                           typename T::Bits* out) {
    uint32_t values[kCuszpBlock], negative[kCuszpBlock];
    get_planes(payload + rate.outlier_bytes, 1, negative);
    get_planes(payload + rate.outlier_bytes + 4, rate.planes, values);
    if (rate.outlier_bytes) {
      values[0] = 0;
      std::memcpy(values, payload, rate.outlier_bytes);
    }
    uint32_t sum = 0;
    for (size_t i = 0; i < kCuszpBlock; ++i) {
      const uint32_t difference = (values[i] ^ (0 - negative[i])) + negative[i];
      sum = coding.mode == CuszpMode::kFixed ? difference : sum + difference;
      out[i] = nearest(T{}, float(int32_t(sum)) * coding.step);
    }
  }

  // The pattern of the nearest number, ties to even. x is not NaN.
  MOEBOUND_INLINE static uint32_t nearest(F32, float x) { return std::bit_cast<uint32_t>(x); }
  MOEBOUND_INLINE static uint16_t nearest(BF16, float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
  }
  MOEBOUND_INLINE static uint16_t nearest(F16, float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude >= 0x47800000u) return uint16_t(sign | 0x7C00u);  // from 2^16
    if (magnitude < 0x38800000u) {  // below 2^-14, whole multiples of 2^-24: those that 0.5 + x can be
      const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
      return uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3F000000u));
    }
    return uint16_t(sign | (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13);
  }
};

}  // namespace
}  // namespace moebound
