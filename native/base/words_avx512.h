// Tables of words in AVX-512 registers. Included by files compiled for AVX-512 F, BW, VL, DQ alone.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace moebound {
namespace {

// Two vectors of dwords below 2^16 as words, in order.
__attribute__((always_inline)) inline __m512i pack_words(__m512i low, __m512i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)), _mm512_cvtepi32_epi16(high), 1);
}

// A table of kWidth words in registers.
template <size_t kWidth>
struct Words {
  static constexpr size_t kRegisters = kWidth / 32;
  __m512i part[kRegisters];

  void load(const uint16_t* from) {
#pragma GCC unroll 16
    for (size_t i = 0; i < kRegisters; ++i) part[i] = _mm512_loadu_si512(from + 32 * i);
  }
  __attribute__((always_inline)) __m512i operator[](__m512i index) const {
    if constexpr (kRegisters == 1) return _mm512_permutexvar_epi16(index, part[0]);
    if constexpr (kRegisters > 1) {
      __m512i found = _mm512_permutex2var_epi16(part[0], index, part[1]);
#pragma GCC unroll 8
      for (size_t i = 2; i < kRegisters; i += 2) {
        const __mmask32 beyond = _mm512_cmpge_epu16_mask(index, _mm512_set1_epi16(short(32 * i)));
        found = _mm512_mask_mov_epi16(found, beyond, _mm512_permutex2var_epi16(part[i], index, part[i + 1]));
      }
      return found;
    }
  }
};

}  // namespace
}  // namespace moebound
