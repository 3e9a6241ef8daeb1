// Sixteen lanes of float32 in one vector. Included by files compiled for AVX-512 F, BW, VL, DQ alone.
#pragma once
#include <immintrin.h>

#include <cstddef>

namespace moebound {
namespace {

struct LanesAvx512 {
  using F = __m512;

  static F zero() { return _mm512_setzero_ps(); }
  static F all(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F f) { _mm512_storeu_ps(p, f); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // Lanes i and i + 8 are added, then i and i + 4, i + 2, i + 1.
  static float sum(F f) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(f), _mm512_extractf32x8_ps(f, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  // 32 patterns of bfloat16: the even ones, then the odd ones.
  __attribute__((always_inline)) static void widen(const void* p, F& even, F& odd) {
    const __m512i words = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xFFFF0000u))));
  }
};

}  // namespace
}  // namespace moebound
