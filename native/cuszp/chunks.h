// How a path walks a chunk of cuSZp's stream: 1024 blocks of 32 values. What a block does is the
// path's own, its Lanes; each path gets its own copy of everything here.
//
//   Lanes::Block                              a block's differences, as magnitudes and signs
//   Lanes::read(T, values, coding, keep)      makes one from 32 patterns of T; all but the first
//                                             `keep` differences are 0
//   .all(), .others()                         bits that any magnitude has, and any but the first
//   .first(), .drop_first()                   the first magnitude, and making it 0
//   .put(n_planes, to)                        writes signs and planes
//   Lanes::decode(T, payload, rate, coding, to)   writes 32 patterns of T
#pragma once
#include <algorithm>
#include <bit>
#include <cstring>

#include "base/bytes.h"
#include "cuszp/paths.h"

namespace moebound {
namespace {

constexpr float kSaturated = 0x1p30f - 64;  // the largest float below 2^30

MOEBOUND_INLINE uint32_t bit_length(uint32_t x) { return uint32_t(std::bit_width(x)); }

template <class Block>
MOEBOUND_INLINE CuszpRate rate_of(const Block& block, CuszpMode mode) {
  const CuszpRate plain{bit_length(block.all()), 0};
  if (mode != CuszpMode::kOutlier) return plain;
  const CuszpRate with_outlier{bit_length(block.others()), (bit_length(block.first()) + 7) / 8};
  return with_outlier.n_bytes() < plain.n_bytes() ? with_outlier : plain;
}

// The block whose values begin at `values`, `count` of them in the array.
template <class Lanes, class T>
MOEBOUND_INLINE typename Lanes::Block read_block(const typename T::Bits* values, size_t count,
                                                 const CuszpCoding& coding) {
  if (count >= kCuszpBlock) [[likely]] return Lanes::read(T{}, values, coding, kCuszpBlock);
  typename T::Bits padded[kCuszpBlock] = {};
  std::memcpy(padded, values, count * sizeof *values);
  return Lanes::read(T{}, padded, coding, count);
}

template <class Lanes>
size_t measure_chunk(DType source, const void* values, size_t n, const CuszpCoding& coding, uint8_t* codes) {
  size_t n_bytes = 0;
  with_dtype(source, [&](auto type) {
    using T = decltype(type);
    const auto* const from = static_cast<const typename T::Bits*>(values);
    for (size_t first = 0; first < n; first += kCuszpBlock) {
      const CuszpRate rate = rate_of(read_block<Lanes, T>(from + first, n - first, coding), coding.mode);
      codes[first / kCuszpBlock] = rate.code();
      n_bytes += rate.n_bytes();
    }
  });
  return n_bytes;
}

template <class Lanes>
void write_chunk(DType source, const void* values, size_t n, const CuszpCoding& coding, const uint8_t* codes,
                 uint8_t* payload) {
  with_dtype(source, [&](auto type) {
    using T = decltype(type);
    const auto* const from = static_cast<const typename T::Bits*>(values);
    for (size_t first = 0; first < n; first += kCuszpBlock) {
      const CuszpRate rate = CuszpRate::from_code(codes[first / kCuszpBlock]);
      if (rate.n_bytes() == 0) continue;
      auto block = read_block<Lanes, T>(from + first, n - first, coding);
      if (rate.outlier_bytes) {
        const uint32_t outlier = block.first();
        std::memcpy(payload, &outlier, rate.outlier_bytes);
        block.drop_first();
      }
      block.put(rate.planes, payload + rate.outlier_bytes);
      payload += rate.n_bytes();
    }
  });
}

template <class Lanes>
void decode_chunk(DType output, void* out, size_t n, const CuszpCoding& coding, const uint8_t* codes,
                  const uint8_t* payload) {
  with_dtype(output, [&](auto type) {
    using T = decltype(type);
    for (size_t first = 0; first < n; first += kCuszpBlock) {
      const CuszpRate rate = CuszpRate::from_code(codes[first / kCuszpBlock]);
      auto* const to = static_cast<typename T::Bits*>(out) + first;
      const size_t count = std::min(kCuszpBlock, n - first);
      if (rate.n_bytes() == 0) {
        std::memset(to, 0, count * sizeof *to);
      } else if (count == kCuszpBlock) [[likely]] {
        Lanes::decode(T{}, payload, rate, coding, to);
      } else {
        typename T::Bits whole[kCuszpBlock];
        Lanes::decode(T{}, payload, rate, coding, whole);
        std::memcpy(to, whole, count * sizeof *to);
      }
      payload += rate.n_bytes();
    }
  });
}

template <class Lanes>
CuszpPath path_with() {
  return {measure_chunk<Lanes>, write_chunk<Lanes>, decode_chunk<Lanes>};
}

// The first value of a block, from the bytes in front of its signs.
MOEBOUND_INLINE uint32_t outlier_of(const uint8_t* payload, CuszpRate rate) {
  uint32_t outlier = 0;
  std::memcpy(&outlier, payload, rate.outlier_bytes);
  return outlier;
}

}  // namespace
}  // namespace moebound
