// Sixteen lanes in one vector. Compiled for AVX-512 F, BW, VL, DQ; called only where the CPU has them.
#include <immintrin.h>

#include "base/words_avx512.h"
#include "product/rows.h"

namespace moebound {
namespace {

struct Avx512 {
  using F = __m512;
  static constexpr size_t kRows = 4, kTokens = 5;

  static F zero() { return _mm512_setzero_ps(); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F f) { _mm512_storeu_ps(p, f); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(F f) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(f), _mm512_extractf32x8_ps(f, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

__attribute__((always_inline)) inline __m512i load_words(const uint8_t* codes) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
}
__attribute__((always_inline)) inline __m512i even_words(__m512i words) {
  return _mm512_and_si512(words, _mm512_set1_epi32(0xFFFF));
}

// Tables of bfloat16, in registers.
template <size_t kWidth>
struct FromWords {
  Words<kWidth> words;

  explicit FromWords(const ProductSetup& setup) { words.load(setup.words); }
  void begin_row(size_t, size_t) {}
  __attribute__((always_inline)) void operator()(size_t, const uint8_t* codes, const float*, __m512& even, __m512& odd) const {
    const __m512i found = words[load_words(codes)];
    even = _mm512_castsi512_ps(_mm512_slli_epi32(found, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(found, _mm512_set1_epi32(int(0xFFFF0000u))));
  }
};

// Tables of any numbers.
struct FromTable {
  const float* table;

  explicit FromTable(const ProductSetup& setup) : table(setup.matrix->table) {}
  void begin_row(size_t, size_t) {}
  __attribute__((always_inline)) void operator()(size_t, const uint8_t* codes, const float*, __m512& even, __m512& odd) const {
    const __m512i words = load_words(codes);
    even = _mm512_i32gather_ps(even_words(words), table, 4);
    odd = _mm512_i32gather_ps(_mm512_srli_epi32(words, 16), table, 4);
  }
};

// A product rounded to the dtype, as pattern_of does it.
template <class T>
__attribute__((always_inline)) inline __m512 cast(__m512 value) {
  if constexpr (T::kDType == DType::kBF16) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(0xFFFF0000u))));
  } else if constexpr (T::kDType == DType::kF16) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else {
    return value;
  }
}

template <class T, StepsOf kOf>
struct FromSteps {
  const float* of_rows;  // steps, or factors
  __m512i first;
  __m512 of_row[Avx512::kRows];

  explicit FromSteps(const ProductSetup& setup)
      : of_rows(kOf == StepsOf::kBoth ? setup.matrix->factors : setup.matrix->steps),
        first(_mm512_set1_epi32(setup.matrix->first)) {}
  void begin_row(size_t r, size_t row) {
    if constexpr (kOf != StepsOf::kColumns) of_row[r] = _mm512_set1_ps(of_rows[row]);
  }
  __attribute__((always_inline)) __m512 step_of(size_t r, const float* steps, size_t at) const {
    if constexpr (kOf == StepsOf::kRows) return of_row[r];
    else if constexpr (kOf == StepsOf::kColumns) return _mm512_loadu_ps(steps + at);
    else return _mm512_mul_ps(_mm512_loadu_ps(steps + at), of_row[r]);
  }
  __attribute__((always_inline)) void operator()(size_t r, const uint8_t* codes, const float* steps, __m512& even,
                                                 __m512& odd) const {
    const __m512i words = load_words(codes);
    const __m512 q_even = _mm512_cvtepi32_ps(_mm512_add_epi32(even_words(words), first));
    const __m512 q_odd = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_srli_epi32(words, 16), first));
    even = cast<T>(_mm512_mul_ps(q_even, step_of(r, steps, 0)));
    odd = cast<T>(_mm512_mul_ps(q_odd, step_of(r, steps, kProductLanes)));
  }
};

// The weights themselves.
struct FromPlain {
  static constexpr size_t kCodeBytes = 2;

  void begin_row(size_t, size_t) {}
  __attribute__((always_inline)) void operator()(size_t, const uint8_t* codes, const float*, __m512& even, __m512& odd) const {
    const __m512i words = _mm512_loadu_si512(codes);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xFFFF0000u))));
  }
};

}  // namespace

void product_rows_avx512(const ProductSetup& setup, size_t begin, size_t end) {
  const CodeMatrix& matrix = *setup.matrix;
  if (matrix.plain) {
    all_rows<Avx512>(setup, FromPlain(), begin, end);
  } else if (!matrix.table) {
    all_rows_of_steps<Avx512, FromSteps>(setup, begin, end);
  } else if (matrix.dtype != DType::kBF16) {
    all_rows<Avx512>(setup, FromTable(setup), begin, end);
  } else if (matrix.n_codes <= 64) {
    all_rows<Avx512>(setup, FromWords<64>(setup), begin, end);
  } else if (matrix.n_codes <= 128) {
    all_rows<Avx512>(setup, FromWords<128>(setup), begin, end);
  } else {
    all_rows<Avx512>(setup, FromWords<256>(setup), begin, end);
  }
}

}  // namespace moebound
