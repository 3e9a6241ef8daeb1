// The encoder: 32 lanes in two vectors of sixteen, of up to two segments in lock step. Compiled for
// AVX-512 F, BW, VL, DQ; called only where the CPU has them.
#include <immintrin.h>

#include <algorithm>

#include "base/bytes.h"
#include "bound/rans/coder.h"

namespace moebound {
namespace {

constexpr size_t kLanes = 32;

// Sixteen lanes encode, those in `active`: words down from `word`, then x = (x / f << T) + x mod f + c.
__attribute__((always_inline)) inline void retreat(__m512i& x, __m512i entry, __mmask16 active, __m128i table_log,
                                                   __m128i limit_shift, uint16_t*& word) {
  const __m512i frequency =
      _mm512_add_epi32(_mm512_and_si512(entry, _mm512_set1_epi32(0xFFF)), _mm512_set1_epi32(1));
  const __mmask16 emits = _mm512_mask_cmpge_epu32_mask(active, _mm512_srl_epi32(x, limit_shift), frequency);
  const uint32_t n_words = uint32_t(_mm_popcnt_u32(uint32_t(emits)));
  word -= n_words;
  const __m256i words = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(emits, x));
  _mm256_mask_storeu_epi16(word, __mmask16((1u << n_words) - 1), words);
  const __m512i y = _mm512_mask_srli_epi32(x, emits, x, 16);
  // y / f in float by a reciprocal of 14 bits and one step of Newton's. Its three roundings and the
  // step's rest make 0.8 at most, because the quotient is below 2^22: mend it in integers.
  const __m512 divisor = _mm512_cvtepi32_ps(frequency);
  const __m512 rough = _mm512_rcp14_ps(divisor);
  const __m512 reciprocal =
      _mm512_fmadd_ps(rough, _mm512_fnmadd_ps(divisor, rough, _mm512_set1_ps(1.0f)), rough);
  __m512i quotient = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_cvtepu32_ps(y), reciprocal));
  // The rest is between -f and 2f: its low 16 bits say which it is.
  __m512i rest = _mm512_sub_epi16(y, _mm512_mullo_epi16(quotient, frequency));
  rest = _mm512_srai_epi32(_mm512_slli_epi32(rest, 16), 16);
  const __mmask16 too_high = _mm512_movepi32_mask(rest);
  const __mmask16 too_low = _mm512_cmpge_epi32_mask(rest, frequency);
  const __m512i one = _mm512_set1_epi32(1);
  quotient = _mm512_mask_sub_epi32(quotient, too_high, quotient, one);
  quotient = _mm512_mask_add_epi32(quotient, too_low, quotient, one);
  rest = _mm512_mask_add_epi32(rest, too_high, rest, frequency);
  rest = _mm512_mask_sub_epi32(rest, too_low, rest, frequency);
  const __m512i base = _mm512_add_epi32(rest, _mm512_srli_epi32(entry, 12));
  x = _mm512_mask_add_epi32(x, active, _mm512_sll_epi32(quotient, table_log), base);
}

}  // namespace

uint16_t* encode_segment_avx512(const EncodeSetup& setup, size_t first, size_t last, uint32_t* states,
                                uint16_t* words_end) {
  const Layout& layout = *setup.layout;
  if (layout.lanes() != kLanes || layout.table_log < kLeastEncodedTableLog) {
    return encode_segment_scalar(setup, first, last, states, words_end);
  }
  const __m128i table_log = _mm_cvtsi32_si128(int(layout.table_log));
  const __m128i limit_shift = _mm_cvtsi32_si128(int(32 - layout.table_log));
  __m512i x[2] = {_mm512_set1_epi32(int(kStateLow)), _mm512_set1_epi32(int(kStateLow))};
  uint16_t* word = words_end;
  const auto group = [&](const uint32_t* start, const uint8_t* symbols, uint32_t active)
                         __attribute__((always_inline)) {
    __m512i entry[2];
#pragma GCC unroll 2
    for (size_t v = 0; v < 2; ++v) {
      const __m512i symbol =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(symbols + 16 * v)));
      entry[v] = _mm512_i32gather_epi32(_mm512_add_epi32(_mm512_loadu_si512(start + 16 * v), symbol),
                                        setup.entries.data(), 4);
    }
    retreat(x[1], entry[1], __mmask16(active >> 16), table_log, limit_shift, word);
    retreat(x[0], entry[0], __mmask16(active), table_log, limit_shift, word);
  };
  for (size_t row = last; row-- > first;) {
    const uint32_t* start = setup.starts.of_row(row);
    const uint8_t* symbols = setup.symbols + row * layout.columns;
    size_t j = std::min<size_t>(layout.columns, setup.n - row * layout.columns);
    if (const size_t left = j % kLanes; left) {
      j -= left;
      uint8_t padded[kLanes] = {};
      std::copy_n(symbols + j, left, padded);
      group(start + j, padded, (1u << left) - 1);
    }
    while (j > 0) {
      j -= kLanes;
      group(start + j, symbols + j, ~0u);
    }
  }
  for (size_t v = 0; v < 2; ++v) _mm512_storeu_si512(states + 16 * v, x[v]);
  return word;
}

}  // namespace moebound
