// Stands in for the compiler's <immintrin.h>: AVX-512 in plain C, by SIMDe and, where it stops, by
// hand. Slow, and right on any CPU: how rans_avx512.cpp is checked on machines without AVX-512.
#pragma once
#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <bit>
#include <cstdint>
#include <cstring>

using __mmask16 = simde__mmask16;
using __mmask32 = simde__mmask32;

inline int _mm_popcnt_u32(uint32_t x) { return std::popcount(x); }

inline __m512i _mm512_i32gather_epi32(__m512i index, const void* base, int scale) {
  int32_t at[16], found[16];
  simde_mm512_storeu_si512(at, index);
  for (int i = 0; i < 16; ++i) {
    std::memcpy(&found[i], static_cast<const char*>(base) + int64_t(at[i]) * scale, 4);
  }
  return simde_mm512_loadu_si512(found);
}

inline __mmask16 _mm512_cmplt_epu32_mask(__m512i a, __m512i b) {
  uint32_t x[16], y[16];
  simde_mm512_storeu_si512(x, a);
  simde_mm512_storeu_si512(y, b);
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= uint32_t(x[i] < y[i]) << i;
  return __mmask16(mask);
}

inline __m512i _mm512_maskz_expand_epi32(__mmask16 mask, __m512i a) {
  int32_t in[16], out[16];
  simde_mm512_storeu_si512(in, a);
  for (int i = 0, next = 0; i < 16; ++i) out[i] = (mask >> i & 1) ? in[next++] : 0;
  return simde_mm512_loadu_si512(out);
}

inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  uint16_t in[16];
  uint32_t out[16];
  simde_mm256_storeu_si256(reinterpret_cast<__m256i*>(in), a);
  for (int i = 0; i < 16; ++i) out[i] = in[i];
  return simde_mm512_loadu_si512(out);
}

inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  uint32_t in[16];
  uint16_t out[16];
  simde_mm512_storeu_si512(in, a);
  for (int i = 0; i < 16; ++i) out[i] = uint16_t(in[i]);
  return simde_mm256_loadu_si256(reinterpret_cast<const __m256i*>(out));
}
