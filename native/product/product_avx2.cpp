// Sixteen lanes in two vectors of eight. Compiled for AVX2 and FMA; called only where the CPU has them.
#include "base/lanes_avx2.h"
#include "product/gate.h"
#include "product/rows.h"

namespace moebound {
namespace {

struct Avx2 : LanesAvx2 {
  static constexpr size_t kRows = 2, kRowsOfOne = 2, kFew = 2, kMostByFew = 8, kTokens = 3;
};

__attribute__((always_inline)) inline __m256i load32(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
// 16 codes as words.
__attribute__((always_inline)) inline __m256i load_words(const uint8_t* codes) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}
__attribute__((always_inline)) inline __m256i even_words(__m256i words) {
  return _mm256_and_si256(words, _mm256_set1_epi32(0xFFFF));
}

// Tables of bfloat16, by shuffles of their bytes: a block serves 16 codes.
template <size_t kBlocks>
struct FromShuffles {
  static constexpr size_t kGroupBytes = kProductGroup;
  alignas(32) uint8_t low[32 * kBlocks], high[32 * kBlocks];

  explicit FromShuffles(const ProductSetup& setup) {
    for (size_t c = 0; c < 16 * kBlocks; ++c) {
      for (size_t half = 0; half < 32; half += 16) {
        low[c / 16 * 32 + half + c % 16] = uint8_t(setup.words[c]);
        high[c / 16 * 32 + half + c % 16] = uint8_t(setup.words[c] >> 8);
      }
    }
  }
  void begin_row(size_t, size_t) {}
  __attribute__((always_inline)) void operator()(size_t, const uint8_t* codes, const float*, Sixteen& even, Sixteen& odd) const {
    const __m256i some = load32(codes);
    __m256i lows = _mm256_setzero_si256(), highs = lows, start = lows;
#pragma GCC unroll 8
    for (size_t b = 0; b < kBlocks; ++b) {
      // In this block: index 0x70 .. 0x7F, a shuffle by its low nibble. Outside: high bit, zero.
      const __m256i index = _mm256_adds_epu8(_mm256_sub_epi8(some, start), _mm256_set1_epi8(0x70));
      lows = _mm256_or_si256(lows, _mm256_shuffle_epi8(load32(low + 32 * b), index));
      highs = _mm256_or_si256(highs, _mm256_shuffle_epi8(load32(high + 32 * b), index));
      start = _mm256_add_epi8(start, _mm256_set1_epi8(16));
    }
    // Quarters 0 2 1 3: so that unpacking within halves gives them in order.
    lows = _mm256_permute4x64_epi64(lows, 0xD8);
    highs = _mm256_permute4x64_epi64(highs, 0xD8);
    const __m256i upper = _mm256_set1_epi32(int(0xFFFF0000u));
    const __m256i first = _mm256_unpacklo_epi8(lows, highs), second = _mm256_unpackhi_epi8(lows, highs);
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(first, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(second, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(first, upper)), _mm256_castsi256_ps(_mm256_and_si256(second, upper))};
  }
};

// The codes of 16 bytes of two each: the even ones, then the odd ones.
__attribute__((always_inline)) inline __m256i load_halves(const uint8_t* codes) {
  const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(pairs, 4), pairs), _mm256_set1_epi8(15));
}
// Sixteen words as the upper halves of numbers.
__attribute__((always_inline)) inline __m256 upper_halves(__m128i words) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

// Tables of 16 numbers of bfloat16.
struct FromSixteen {
  static constexpr size_t kGroupBytes = kProductGroup / 2;
  __m256i low, high;

  explicit FromSixteen(const ProductSetup& setup) {
    alignas(16) uint8_t lows[16], highs[16];
    for (size_t c = 0; c < 16; ++c) {
      lows[c] = uint8_t(setup.words[c]);
      highs[c] = uint8_t(setup.words[c] >> 8);
    }
    low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(lows)));
    high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(highs)));
  }
  void begin_row(size_t, size_t) {}
  __attribute__((always_inline)) void operator()(size_t, const uint8_t* codes, const float*, Sixteen& even, Sixteen& odd) const {
    const __m256i some = load_halves(codes);
    const __m256i lows = _mm256_shuffle_epi8(low, some), highs = _mm256_shuffle_epi8(high, some);
    const __m256i first = _mm256_unpacklo_epi8(lows, highs), second = _mm256_unpackhi_epi8(lows, highs);
    even = {upper_halves(_mm256_castsi256_si128(first)), upper_halves(_mm256_castsi256_si128(second))};
    odd = {upper_halves(_mm256_extracti128_si256(first, 1)), upper_halves(_mm256_extracti128_si256(second, 1))};
  }
};

// The same of any numbers.
struct FromPackedTable {
  static constexpr size_t kGroupBytes = kProductGroup / 2;
  const float* table;

  explicit FromPackedTable(const ProductSetup& setup) : table(setup.matrix->table) {}
  void begin_row(size_t, size_t) {}
  __attribute__((always_inline)) __m256 eight(const uint8_t* c, int shift) const {
    const auto at = [&](size_t i) { return table[c[i] >> shift & 15]; };
    return _mm256_setr_ps(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
  }
  __attribute__((always_inline)) void operator()(size_t, const uint8_t* codes, const float*, Sixteen& even, Sixteen& odd) const {
    even = {eight(codes, 0), eight(codes + 8, 0)};
    odd = {eight(codes, 4), eight(codes + 8, 4)};
  }
};

// Tables of any numbers, and long ones: scalar look-ups, as quick as gathers or quicker.
struct FromTable {
  static constexpr size_t kGroupBytes = kProductGroup;
  const float* table;

  explicit FromTable(const ProductSetup& setup) : table(setup.matrix->table) {}
  void begin_row(size_t, size_t) {}
  __attribute__((always_inline)) __m256 eight(const uint8_t* c) const {
    return _mm256_setr_ps(table[c[0]], table[c[2]], table[c[4]], table[c[6]], table[c[8]], table[c[10]], table[c[12]],
                          table[c[14]]);
  }
  __attribute__((always_inline)) void operator()(size_t, const uint8_t* codes, const float*, Sixteen& even, Sixteen& odd) const {
    even = {eight(codes), eight(codes + 16)};
    odd = {eight(codes + 1), eight(codes + 17)};
  }
};

// A product rounded to the dtype, as pattern_of does it.
template <class T>
__attribute__((always_inline)) inline __m256 cast(__m256 value) {
  if constexpr (T::kDType == DType::kBF16) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(int(0xFFFF0000u))));
  } else if constexpr (T::kDType == DType::kF16) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else {
    return value;
  }
}

// Codes of a byte as numbers of 32 bits: the even ones, then the odd ones, in eights.
struct OfBytes {
  static constexpr size_t kGroupBytes = kProductGroup;
  __attribute__((always_inline)) static void load(const uint8_t* codes, __m256i (&numbers)[4]) {
    const __m256i low = load_words(codes), high = load_words(codes + 16);
    numbers[0] = even_words(low);
    numbers[1] = even_words(high);
    numbers[2] = _mm256_srli_epi32(low, 16);
    numbers[3] = _mm256_srli_epi32(high, 16);
  }
};

// The same, of four bits each.
struct OfHalves {
  static constexpr size_t kGroupBytes = kProductGroup / 2;
  __attribute__((always_inline)) static void load(const uint8_t* codes, __m256i (&numbers)[4]) {
    const __m256i some = load_halves(codes);
    const __m128i even = _mm256_castsi256_si128(some), odd = _mm256_extracti128_si256(some, 1);
    numbers[0] = _mm256_cvtepu8_epi32(even);
    numbers[1] = _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(even, even));
    numbers[2] = _mm256_cvtepu8_epi32(odd);
    numbers[3] = _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(odd, odd));
  }
};

template <class T, StepsOf kOf, class Codes>
struct Stepped {
  static constexpr size_t kGroupBytes = Codes::kGroupBytes;
  const float* of_rows;  // steps, or factors
  __m256i first;
  __m256 of_row[Avx2::kRowsOfOne];

  explicit Stepped(const ProductSetup& setup)
      : of_rows(kOf == StepsOf::kBoth ? setup.matrix->factors : setup.matrix->steps),
        first(_mm256_set1_epi32(setup.matrix->first)) {}
  void begin_row(size_t r, size_t row) {
    if constexpr (kOf != StepsOf::kColumns) of_row[r] = _mm256_set1_ps(of_rows[row]);
  }
  __attribute__((always_inline)) __m256 weights(__m256i codes, __m256 steps) const {
    return cast<T>(_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(codes, first)), steps));
  }
  __attribute__((always_inline)) void operator()(size_t r, const uint8_t* codes, const float* steps, Sixteen& even,
                                                 Sixteen& odd) const {
    __m256i numbers[4];
    Codes::load(codes, numbers);
    const auto step_of = [&](size_t at) __attribute__((always_inline)) {
      if constexpr (kOf == StepsOf::kRows) return of_row[r];
      else if constexpr (kOf == StepsOf::kColumns) return _mm256_loadu_ps(steps + at);
      else return _mm256_mul_ps(_mm256_loadu_ps(steps + at), of_row[r]);
    };
    even = {weights(numbers[0], step_of(0)), weights(numbers[1], step_of(8))};
    odd = {weights(numbers[2], step_of(16)), weights(numbers[3], step_of(24))};
  }
};
template <class T, StepsOf kOf>
using FromSteps = Stepped<T, kOf, OfBytes>;
template <class T, StepsOf kOf>
using FromPackedSteps = Stepped<T, kOf, OfHalves>;

// The weights themselves.
struct FromPlain {
  static constexpr size_t kGroupBytes = 2 * kProductGroup;

  void begin_row(size_t, size_t) {}
  __attribute__((always_inline)) void operator()(size_t, const uint8_t* codes, const float*, Sixteen& even, Sixteen& odd) const {
    Avx2::widen(codes, even, odd);
  }
};

void rows_of_products(const ProductSetup& setup, size_t begin, size_t end) {
  const CodeMatrix& matrix = *setup.matrix;
  if (matrix.plain()) {
    all_rows<Avx2>(setup, FromPlain(), begin, end);
  } else if (matrix.bits == 4 && !matrix.table) {
    all_rows_of_steps<Avx2, FromPackedSteps>(setup, begin, end);
  } else if (matrix.bits == 4) {
    if (matrix.dtype == DType::kBF16) all_rows<Avx2>(setup, FromSixteen(setup), begin, end);
    else all_rows<Avx2>(setup, FromPackedTable(setup), begin, end);
  } else if (!matrix.table) {
    all_rows_of_steps<Avx2, FromSteps>(setup, begin, end);
  } else if (matrix.dtype != DType::kBF16 || matrix.n_codes > 128) {
    all_rows<Avx2>(setup, FromTable(setup), begin, end);
  } else if (matrix.n_codes <= 32) {
    all_rows<Avx2>(setup, FromShuffles<2>(setup), begin, end);
  } else if (matrix.n_codes <= 64) {
    all_rows<Avx2>(setup, FromShuffles<4>(setup), begin, end);
  } else if (matrix.n_codes <= 96) {
    all_rows<Avx2>(setup, FromShuffles<6>(setup), begin, end);
  } else {
    all_rows<Avx2>(setup, FromShuffles<8>(setup), begin, end);
  }
}

}  // namespace

const ProductPath product_avx2{rows_of_products, gate_of};

}  // namespace moebound
