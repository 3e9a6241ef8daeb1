// Stands in for the compiler's <immintrin.h>: AVX-512 in plain C, by SIMDe and, where it stops, by
// hand. Slow, and right on any CPU: how the AVX-512 paths are checked on machines without AVX-512.
#pragma once
#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

using __mmask16 = simde__mmask16;
using __mmask32 = simde__mmask32;

// Newer versions of SIMDe have some of these themselves.
#undef _mm_popcnt_u32
#undef _mm512_i32gather_epi32
#undef _mm512_cmplt_epu32_mask
#undef _mm512_maskz_expand_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_mask_cmpge_epu32_mask
#undef _mm512_cmpneq_epi32_mask
#undef _mm512_srai_epi32
#undef _mm512_mask_srli_epi32
#undef _mm512_cvttps_epi32
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepu32_ps
#undef _mm512_rcp14_ps
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepu8_epi16
#undef _mm512_cvtepi16_epi8
#undef _mm512_cvtph_ps
#undef _mm512_i32gather_ps
#undef _mm256_mask_storeu_epi16
#undef _mm512_cvtps_ph
#undef _MM_FROUND_TO_NEAREST_INT
#undef _MM_FROUND_NO_EXC
#define _MM_FROUND_TO_NEAREST_INT 0
#define _MM_FROUND_NO_EXC 8

inline int _mm_popcnt_u32(uint32_t x) { return std::popcount(x); }

inline __m512i _mm512_i32gather_epi32(__m512i index, const void* base, int scale) {
  int32_t at[16], found[16];
  simde_mm512_storeu_si512(at, index);
  for (int i = 0; i < 16; ++i) {
    std::memcpy(&found[i], static_cast<const char*>(base) + int64_t(at[i]) * scale, 4);
  }
  return simde_mm512_loadu_si512(found);
}

// To the nearest, ties to even; no NaN comes here.
inline __m256i _mm512_cvtps_ph(__m512 a, int) {
  float in[16];
  uint16_t out[16];
  simde_mm512_storeu_ps(in, a);
  for (int i = 0; i < 16; ++i) {
    const float magnitude = in[i] < 0 ? -in[i] : in[i];
    uint16_t found = 0x7C00;
    if (magnitude < 0x1p-14f) {
      found = uint16_t(std::bit_cast<uint32_t>(magnitude + 0.5f) - std::bit_cast<uint32_t>(0.5f));
    } else if (magnitude < 65520.0f) {
      const uint32_t bits = std::bit_cast<uint32_t>(magnitude) - (112u << 23);
      found = uint16_t((bits + 0xFFF + (bits >> 13 & 1)) >> 13);
    }
    out[i] = uint16_t(found | (std::bit_cast<uint32_t>(in[i]) >> 16 & 0x8000));
  }
  return simde_mm256_loadu_si256(reinterpret_cast<const simde__m256i*>(out));
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

// What follows works lane by lane: out[i] = f(a[i], b[i], ...) for sixteen lanes of 32 bits.
template <class T, class... Vectors>
inline auto each_lane(auto f, Vectors... vectors) {
  constexpr auto lanes = [](auto v) {
    std::array<T, 16> a;
    std::memcpy(a.data(), &v, sizeof a);
    return a;
  };
  return [&](auto... in) {
    using Out = decltype(f(in[0]...));
    std::array<Out, 16> out;
    for (size_t i = 0; i < 16; ++i) out[i] = f(in[i]...);
    return out;
  }(lanes(vectors)...);
}
template <class Vector>
inline Vector as_vector(const auto& lanes) {
  static_assert(sizeof(Vector) == sizeof lanes);
  Vector v;
  std::memcpy(&v, lanes.data(), sizeof v);
  return v;
}
inline __mmask16 as_mask(const std::array<bool, 16>& lanes) {
  uint32_t mask = 0;
  for (uint32_t i = 0; i < 16; ++i) mask |= uint32_t(lanes[i]) << i;
  return __mmask16(mask);
}

inline __mmask16 _mm512_mask_cmpge_epu32_mask(__mmask16 mask, __m512i a, __m512i b) {
  return __mmask16(mask & as_mask(each_lane<uint32_t>([](auto x, auto y) { return x >= y; }, a, b)));
}
inline __mmask16 _mm512_cmpneq_epi32_mask(__m512i a, __m512i b) {
  return as_mask(each_lane<uint32_t>([](auto x, auto y) { return x != y; }, a, b));
}
inline __m512i _mm512_srai_epi32(__m512i a, int by) {
  return as_vector<__m512i>(each_lane<int32_t>([by](auto x) { return x >> by; }, a));
}
inline __m512i _mm512_mask_srli_epi32(__m512i from, __mmask16 mask, __m512i a, int by) {
  return simde_mm512_mask_mov_epi32(from, mask, simde_mm512_srli_epi32(a, unsigned(by)));
}
inline __m512i _mm512_cvttps_epi32(__m512 a) {
  return as_vector<__m512i>(each_lane<float>([](auto x) { return int32_t(x); }, a));
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  return as_vector<__m512>(each_lane<int32_t>([](auto x) { return float(x); }, a));
}
inline __m512 _mm512_cvtepu32_ps(__m512i a) {
  return as_vector<__m512>(each_lane<uint32_t>([](auto x) { return float(x); }, a));
}
// As wrong as the instruction may be: 2^-14, now above, now below.
inline __m512 _mm512_rcp14_ps(__m512 a) {
  return as_vector<__m512>(each_lane<float>(
      [](auto x) { return 1.0f / x * (std::bit_cast<uint32_t>(x) & 0x2000 ? 1.0f + 0x1p-14f : 1.0f - 0x1p-14f); }, a));
}
inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
  std::array<uint8_t, 16> in;
  std::memcpy(in.data(), &a, sizeof in);
  std::array<uint32_t, 16> out;
  for (size_t i = 0; i < 16; ++i) out[i] = in[i];
  return as_vector<__m512i>(out);
}
inline void _mm256_mask_storeu_epi16(void* to, __mmask16 mask, __m256i a) {
  uint16_t in[16];
  simde_mm256_storeu_si256(reinterpret_cast<__m256i*>(in), a);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<char*>(to) + 2 * i, &in[i], 2);
  }
}

inline __m512i _mm512_cvtepu8_epi16(__m256i a) {
  uint8_t in[32];
  uint16_t out[32];
  std::memcpy(in, &a, sizeof in);
  for (int i = 0; i < 32; ++i) out[i] = in[i];
  return simde_mm512_loadu_si512(out);
}

inline __m256i _mm512_cvtepi16_epi8(__m512i a) {
  uint16_t in[32];
  uint8_t out[32];
  simde_mm512_storeu_si512(in, a);
  for (int i = 0; i < 32; ++i) out[i] = uint8_t(in[i]);
  __m256i found;
  std::memcpy(&found, out, sizeof found);
  return found;
}

inline __m512 _mm512_cvtph_ps(__m256i a) {
  uint16_t in[16];
  float out[16];
  std::memcpy(in, &a, sizeof in);
  for (int i = 0; i < 16; ++i) {
    const uint32_t exponent = in[i] >> 10 & 31, mantissa = in[i] & 1023;
    const uint32_t bits = exponent == 31 ? 0x7F800000u | mantissa << 13 : (exponent + 112) << 23 | mantissa << 13;
    const float magnitude = exponent == 0 ? float(mantissa) * 0x1p-24f : std::bit_cast<float>(bits);
    out[i] = in[i] & 0x8000 ? -magnitude : magnitude;
  }
  return simde_mm512_loadu_ps(out);
}

inline __m512 _mm512_i32gather_ps(__m512i index, const void* base, int scale) {
  const __m512i found = _mm512_i32gather_epi32(index, base, scale);
  float out[16];
  simde_mm512_storeu_si512(out, found);
  return simde_mm512_loadu_ps(out);
}
