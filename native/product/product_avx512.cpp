// Sixteen lanes in one vector. Compiled for AVX-512 F, BW, VL, DQ; called only where the CPU has them.
#include "base/lanes_avx512.h"
#include "base/words_avx512.h"
#include "product/gate.h"
#include "product/rows.h"

namespace moebound {
namespace {

struct Avx512 : LanesAvx512 {
  static constexpr size_t kRows = 4, kRowsOfOne = 8, kFew = 4, kMostByFew = 32, kTokens = 5;
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
  static constexpr size_t kGroupBytes = kProductGroup;
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
  static constexpr size_t kGroupBytes = kProductGroup;
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

// The bins of 32 codes of a byte, as numbers.
struct Bins {
  static constexpr size_t kGroupBytes = kProductGroup;
  __m512i first;

  explicit Bins(const CodeMatrix& matrix) : first(_mm512_set1_epi32(matrix.first)) {}
  __attribute__((always_inline)) void operator()(const uint8_t* codes, __m512& even, __m512& odd) const {
    const __m512i words = load_words(codes);
    even = _mm512_cvtepi32_ps(_mm512_add_epi32(even_words(words), first));
    odd = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_srli_epi32(words, 16), first));
  }
};

// Sixteen numbers in a register, for codes of four bits.
struct Sixteen {
  static constexpr size_t kGroupBytes = kProductGroup / 2;
  __m512 numbers;

  explicit Sixteen(const float* from) : numbers(_mm512_loadu_ps(from)) {}
  explicit Sixteen(const CodeMatrix& matrix)
      : numbers(_mm512_cvtepi32_ps(_mm512_add_epi32(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(matrix.first)))) {}
  __attribute__((always_inline)) void operator()(const uint8_t* codes, __m512& even, __m512& odd) const {
    // Of an index the lower four bits count.
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    even = _mm512_permutexvar_ps(pairs, numbers);
    odd = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), numbers);
  }
};

struct FromSixteen {
  static constexpr size_t kGroupBytes = Sixteen::kGroupBytes;
  Sixteen table;

  explicit FromSixteen(const ProductSetup& setup) : table(setup.matrix->table) {}
  void begin_row(size_t, size_t) {}
  __attribute__((always_inline)) void operator()(size_t, const uint8_t* codes, const float*, __m512& even, __m512& odd) const {
    table(codes, even, odd);
  }
};

template <class T, StepsOf kOf, class Codes>
struct Stepped {
  static constexpr size_t kGroupBytes = Codes::kGroupBytes;
  const float* of_rows;  // steps, or factors
  Codes bins;
  __m512 of_row[Avx512::kRowsOfOne];

  explicit Stepped(const ProductSetup& setup)
      : of_rows(kOf == StepsOf::kBoth ? setup.matrix->factors : setup.matrix->steps), bins(*setup.matrix) {}
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
    bins(codes, even, odd);
    even = cast<T>(_mm512_mul_ps(even, step_of(r, steps, 0)));
    odd = cast<T>(_mm512_mul_ps(odd, step_of(r, steps, kProductLanes)));
  }
};
template <class T, StepsOf kOf>
using FromSteps = Stepped<T, kOf, Bins>;
template <class T, StepsOf kOf>
using FromPackedSteps = Stepped<T, kOf, Sixteen>;

// The weights themselves.
struct FromPlain {
  static constexpr size_t kGroupBytes = 2 * kProductGroup;

  void begin_row(size_t, size_t) {}
  __attribute__((always_inline)) void operator()(size_t, const uint8_t* codes, const float*, __m512& even, __m512& odd) const {
    Avx512::widen(codes, even, odd);
  }
};

void rows_of_products(const ProductSetup& setup, size_t begin, size_t end) {
  const CodeMatrix& matrix = *setup.matrix;
  if (matrix.plain()) {
    all_rows<Avx512>(setup, FromPlain(), begin, end);
  } else if (matrix.bits == 4) {
    if (matrix.table) all_rows<Avx512>(setup, FromSixteen(setup), begin, end);
    else all_rows_of_steps<Avx512, FromPackedSteps>(setup, begin, end);
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

}  // namespace

const ProductPath product_avx512{rows_of_products, gate_of};

}  // namespace moebound
