// The loops of compare.cpp with AVX2, two vectors of four doubles: the same lanes, the same sums.
#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "measure/compare.h"

namespace moebound {
namespace {

constexpr size_t kWide = 8;

template <class T>
__attribute__((always_inline)) inline __m256 load_floats(const typename T::Bits* p) {
  if constexpr (T::kDType == DType::kBF16) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  } else if constexpr (T::kDType == DType::kF16) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  } else {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
  }
}

__attribute__((always_inline)) inline __m256d half(__m256 x, int which) {
  return _mm256_cvtps_pd(which ? _mm256_extractf128_ps(x, 1) : _mm256_castps256_ps128(x));
}
__attribute__((always_inline)) inline __m256d magnitude(__m256d x) {
  return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x);
}
__attribute__((always_inline)) inline __m256d is_finite(__m256d x) {
  return _mm256_cmp_pd(magnitude(x), _mm256_set1_pd(std::numeric_limits<double>::max()), _CMP_LE_OQ);
}
__attribute__((always_inline)) inline int bits_of(__m256d mask) { return _mm256_movemask_pd(mask); }

// Which of eight finite originals break the bound, as one mask. error: 0 where not finite.
__attribute__((always_inline)) inline uint32_t judge(__m256 w, __m256 d, __m256d bound, __m256d (&error)[2],
                                                     uint32_t& finite) {
  uint32_t beyond = 0;
  finite = 0;
  for (int h = 0; h < 2; ++h) {
    const __m256d original = half(w, h), mask = is_finite(original);
    const __m256d distance = magnitude(_mm256_sub_pd(original, half(d, h)));
    const __m256d counted = _mm256_blendv_pd(_mm256_set1_pd(std::numeric_limits<double>::infinity()), distance,
                                             is_finite(distance));
    error[h] = _mm256_and_pd(counted, mask);
    beyond |= uint32_t(bits_of(_mm256_cmp_pd(counted, bound, _CMP_NLE_UQ))) << (4 * h);
    finite |= uint32_t(bits_of(mask)) << (4 * h);
  }
  return finite & beyond;
}

// How many of eight non-finite originals did not come back. Rare, and not for vcvtph2ps, which
// makes signalling NaNs quiet.
template <class W, class D>
unsigned n_lost(const typename W::Bits* w, const typename D::Bits* d, uint32_t finite) {
  unsigned lost = 0;
  for (uint32_t left = ~finite & 0xFF; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    lost += std::bit_cast<uint32_t>(W::value(w[i])) != std::bit_cast<uint32_t>(D::value(d[i]));
  }
  return lost;
}

double total(const __m256d (&sums)[2]) {
  alignas(32) double v[kWide];
  _mm256_store_pd(v, sums[0]);
  _mm256_store_pd(v + 4, sums[1]);
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

template <class W, class D>
Comparison compare_loop(const typename W::Bits* w, const typename D::Bits* d, size_t n, double bound) {
  const __m256d limit = _mm256_set1_pd(bound);
  __m256d squares[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()}, worst = _mm256_setzero_pd();
  Comparison result;
  const auto take = [&](const typename W::Bits* a, const typename D::Bits* b) __attribute__((always_inline)) {
    __m256d error[2];
    uint32_t finite;
    result.n_broken += unsigned(_mm_popcnt_u32(judge(load_floats<W>(a), load_floats<D>(b), limit, error, finite)));
    if (finite != 0xFF) result.n_broken += n_lost<W, D>(a, b, finite);
    result.n_finite += unsigned(_mm_popcnt_u32(finite));
    for (int h = 0; h < 2; ++h) {
      squares[h] = _mm256_add_pd(squares[h], _mm256_mul_pd(error[h], error[h]));
      worst = _mm256_max_pd(worst, error[h]);
    }
  };
  size_t i = 0;
  for (; i + kWide <= n; i += kWide) take(w + i, d + i);
  if (i < n) {
    typename W::Bits left_w[kWide] = {};
    typename D::Bits left_d[kWide] = {};
    for (size_t k = 0; i + k < n; ++k) left_w[k] = w[i + k], left_d[k] = d[i + k];
    take(left_w, left_d);
    result.n_finite -= i + kWide - n;  // the padding counted as finite, and exact
  }
  result.square_sum = total(squares);
  alignas(32) double lanes[4];
  _mm256_store_pd(lanes, worst);
  for (const double lane : lanes) result.max_abs_error = lane > result.max_abs_error ? lane : result.max_abs_error;
  return result;
}

template <class W>
Stats stats_loop(const typename W::Bits* w, size_t n) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  __m256d sums[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()}, squares[2] = {sums[0], sums[1]};
  __m256d low = _mm256_set1_pd(kInf), high = _mm256_set1_pd(-kInf);
  uint64_t n_finite = 0;
  const auto take = [&](__m256 values) __attribute__((always_inline)) {
    for (int h = 0; h < 2; ++h) {
      const __m256d x = half(values, h), mask = is_finite(x), size = _mm256_and_pd(magnitude(x), mask);
      sums[h] = _mm256_add_pd(sums[h], size);
      squares[h] = _mm256_add_pd(squares[h], _mm256_mul_pd(size, size));
      low = _mm256_min_pd(low, _mm256_blendv_pd(low, x, mask));
      high = _mm256_max_pd(high, _mm256_blendv_pd(high, x, mask));
      n_finite += unsigned(_mm_popcnt_u32(uint32_t(bits_of(mask))));
    }
  };
  size_t i = 0;
  for (; i + kWide <= n; i += kWide) take(load_floats<W>(w + i));
  if (i < n) {
    typename W::Bits left[kWide];
    for (size_t k = 0; k < kWide; ++k) left[k] = i + k < n ? w[i + k] : typename W::Bits(~typename W::Bits(0));  // NaN
    take(load_floats<W>(left));
  }
  Stats result{n_finite, total(sums), total(squares), kInf, -kInf};
  alignas(32) double lows[4], highs[4];
  _mm256_store_pd(lows, low);
  _mm256_store_pd(highs, high);
  for (int lane = 0; lane < 4; ++lane) {
    result.lowest = lows[lane] < result.lowest ? lows[lane] : result.lowest;
    result.highest = highs[lane] > result.highest ? highs[lane] : result.highest;
  }
  return result;
}

}  // namespace

Comparison compare_avx2(DType a, const void* w, DType b, const void* d, size_t n, double bound) {
  return with_dtype(a, [&](auto wt) {
    return with_dtype(b, [&](auto dt) {
      return compare_loop<decltype(wt), decltype(dt)>(static_cast<const typename decltype(wt)::Bits*>(w),
                                                      static_cast<const typename decltype(dt)::Bits*>(d), n, bound);
    });
  });
}

Stats stats_avx2(DType dtype, const void* w, size_t n) {
  return with_dtype(dtype, [&](auto t) {
    return stats_loop<decltype(t)>(static_cast<const typename decltype(t)::Bits*>(w), n);
  });
}

}  // namespace moebound
