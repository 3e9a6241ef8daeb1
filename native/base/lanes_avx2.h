// Sixteen lanes of float32 in two vectors of eight. Included by files compiled for AVX2 and FMA alone.
#pragma once
#include <immintrin.h>

#include <cstddef>

namespace moebound {
namespace {

struct Sixteen {
  __m256 low, high;  // lanes 0 .. 7, and 8 .. 15
};

struct LanesAvx2 {
  using F = Sixteen;

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F f) {
    _mm256_storeu_ps(p, f.low);
    _mm256_storeu_ps(p + 8, f.high);
  }
  static F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
  // Lanes i and i + 8 are added, then i and i + 4, i + 2, i + 1.
  static float sum(F f) {
    const __m256 eight = _mm256_add_ps(f.low, f.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  // 32 patterns of bfloat16: the even ones, then the odd ones.
  __attribute__((always_inline)) static void widen(const void* p, F& even, F& odd) {
    const auto* const from = static_cast<const __m256i*>(p);
    const __m256i low = _mm256_loadu_si256(from), high = _mm256_loadu_si256(from + 1);
    const __m256i upper = _mm256_set1_epi32(int(0xFFFF0000u));
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(low, upper)), _mm256_castsi256_ps(_mm256_and_si256(high, upper))};
  }
};

}  // namespace
}  // namespace moebound
