// 32 lanes in two vectors of sixteen, of up to four segments in lock step. Compiled for AVX-512 F,
// BW, VL, DQ; called only where the CPU has them.
//
// A slot becomes a symbol in one of two ways. Small alphabets with one table a row are searched: a
// vector of cumulative frequencies is a table of 32 entries, so a binary search takes one permute a
// step for all 32 lanes at once, and needs no memory. Others are looked up with gathers. Values of
// up to 512 bins come from word permutes, others from gathers.
#include <immintrin.h>

#include <algorithm>

#include "base/bytes.h"
#include "base/words_avx512.h"
#include "bound/rans/streams.h"

namespace moebound {
namespace {

using States = __m512i[2];

// What 32 slots say. symbols: words, in order of lanes. bias: what is added to
// frequency · (state >> table_log).
struct Found {
  __m512i frequency[2], bias[2], symbols;
};

// Searches tables of up to kWidth symbols. Lane i is in word 2i, lane 16 + i in word 2i + 1: where
// the low halves of the two state vectors are once one is moved up by a word.
template <size_t kWidth, size_t K>
struct SearchFinder {
  Words<kWidth> cumulative[K], frequency[K];
  __m512i slot_mask, order;

  explicit SearchFinder(const DecodeSetup& setup)
      : slot_mask(_mm512_set1_epi16(short((1u << setup.layout->table_log) - 1))) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    order = pack_words(even, _mm512_add_epi32(even, _mm512_set1_epi32(1)));
  }

  void start_row(const DecodeSetup& setup, size_t k, size_t row) {
    const uint16_t* const table = setup.search_table(row);
    cumulative[k].load(table);
    frequency[k].load(table + kWidth);
  }
  // The steps of all streams alternate: each waits for its own last one.
  __attribute__((always_inline)) void operator()(const States (&x)[K], size_t, Found (&found)[K]) const {
    __m512i slot[K], symbol[K];
#pragma GCC unroll 4
    for (size_t k = 0; k < K; ++k) {
      const __m512i upper = _mm512_slli_epi32(x[k][1], 16);
      slot[k] = _mm512_and_si512(_mm512_mask_mov_epi16(x[k][0], 0xAAAAAAAA, upper), slot_mask);
      symbol[k] = _mm512_setzero_si512();
    }
#pragma GCC unroll 8
    for (size_t step = kWidth / 2; step > 0; step /= 2) {
#pragma GCC unroll 4
      for (size_t k = 0; k < K; ++k) {
        const __m512i higher = _mm512_or_si512(symbol[k], _mm512_set1_epi16(short(step)));
        const __mmask32 goes = _mm512_cmpge_epu16_mask(slot[k], cumulative[k][higher]);
        symbol[k] = _mm512_mask_mov_epi16(symbol[k], goes, higher);
      }
    }
    const __m512i low_half = _mm512_set1_epi32(0xFFFF);
#pragma GCC unroll 4
    for (size_t k = 0; k < K; ++k) {
      const __m512i f = frequency[k][symbol[k]];
      const __m512i bias = _mm512_sub_epi16(slot[k], cumulative[k][symbol[k]]);
      found[k].frequency[0] = _mm512_and_si512(f, low_half);
      found[k].frequency[1] = _mm512_srli_epi32(f, 16);
      found[k].bias[0] = _mm512_and_si512(bias, low_half);
      found[k].bias[1] = _mm512_srli_epi32(bias, 16);
      found[k].symbols = _mm512_permutexvar_epi16(order, symbol[k]);
    }
  }
};

// Looks up tables of any kind.
template <size_t K>
struct GatherFinder {
  const uint32_t* tables;
  __m512i slot_mask;
  const uint32_t* offsets[K];

  explicit GatherFinder(const DecodeSetup& setup)
      : tables(setup.tables.data()), slot_mask(_mm512_set1_epi32(int((1u << setup.layout->table_log) - 1))) {}

  void start_row(const DecodeSetup& setup, size_t k, size_t row) { offsets[k] = setup.offsets(row); }

  __attribute__((always_inline)) void operator()(const States (&x)[K], size_t j, Found (&found)[K]) const {
    __m512i entry[K][2];
#pragma GCC unroll 4
    for (size_t k = 0; k < K; ++k) {
#pragma GCC unroll 2
      for (size_t v = 0; v < 2; ++v) {
        __m512i index = _mm512_and_si512(x[k][v], slot_mask);
        if (offsets[k]) index = _mm512_add_epi32(index, _mm512_loadu_si512(offsets[k] + j + 16 * v));
        entry[k][v] = _mm512_i32gather_epi32(index, tables, 4);
      }
    }
#pragma GCC unroll 4
    for (size_t k = 0; k < K; ++k) {
      for (size_t v = 0; v < 2; ++v) {
        const __m512i less_one = _mm512_and_si512(_mm512_srli_epi32(entry[k][v], 8), _mm512_set1_epi32(0xFFF));
        found[k].frequency[v] = _mm512_add_epi32(less_one, _mm512_set1_epi32(1));
        found[k].bias[v] = _mm512_srli_epi32(entry[k][v], 20);
      }
      const __m512i byte = _mm512_set1_epi32(0xFF);
      found[k].symbols = pack_words(_mm512_and_si512(entry[k][0], byte), _mm512_and_si512(entry[k][1], byte));
    }
  }
};

// The lanes of `active` take their new states and read words as needed. A state is never below 2^16
// here, so lanes that stand still do not read.
__attribute__((always_inline)) inline void advance(States& x, const Found& found, uint32_t active, __m128i table_log,
                                                   const uint8_t*& word) {
  const __m512i least = _mm512_set1_epi32(int(kStateLow));
  __m512i next[2];
  __mmask16 reads[2];
#pragma GCC unroll 2
  for (size_t v = 0; v < 2; ++v) {
    const __m512i scaled = _mm512_mullo_epi32(found.frequency[v], _mm512_srl_epi32(x[v], table_log));
    next[v] = _mm512_mask_add_epi32(x[v], __mmask16(active >> 16 * v), scaled, found.bias[v]);
    reads[v] = _mm512_cmplt_epu32_mask(next[v], least);
  }
#pragma GCC unroll 2
  for (size_t v = 0; v < 2; ++v) {
    const __m512i words = _mm512_maskz_expand_epi32(
        reads[v], _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(word))));
    x[v] = _mm512_mask_or_epi32(next[v], reads[v], _mm512_slli_epi32(next[v], 16), words);
    word += 2 * size_t(_mm_popcnt_u32(uint32_t(reads[v])));
  }
}

// 32 bins, in order: symbols with the low bits that the planes' words hold for them.
__attribute__((always_inline)) inline __m512i bins(const uint16_t* symbols, const uint8_t* planes, uint32_t low_bits) {
  __m512i bin = _mm512_sll_epi16(_mm512_loadu_si512(symbols), _mm_cvtsi32_si128(int(low_bits)));
  for (uint32_t b = 0; b < low_bits; ++b) {
    bin = _mm512_mask_add_epi16(bin, load<uint32_t>(planes + 4 * b), bin, _mm512_set1_epi16(short(1u << b)));
  }
  return bin;
}

// Writes 32 values a turn with store(bins, out), those of a ragged end by way of a buffer.
template <class Value, bool kLow = true, class Store>
__attribute__((always_inline)) inline void emit_groups(const DecodeSetup& setup, const uint16_t* symbols,
                                                       const uint8_t* planes, size_t n, uint8_t* bytes,
                                                       const Store& store) {
  const uint32_t low_bits = setup.layout->low_bits;
  auto* out = reinterpret_cast<Value*>(bytes);
  for (size_t i = 0; i < n; i += kLanes, planes += 4 * low_bits) {
    Value ragged[kLanes];
    const bool full = i + kLanes <= n;
    store(kLow ? bins(symbols + i, planes, low_bits) : _mm512_loadu_si512(symbols + i), full ? out + i : ragged);
    if (!full) std::copy_n(ragged, n - i, out + i);
  }
}

// 16-bit values of up to kWidth bins.
template <size_t kWidth>
void emit_by_permutes(const DecodeSetup& setup, const uint16_t* symbols, const uint8_t* planes, const float*,
                      size_t n, uint8_t* out) {
  Words<kWidth> values;
  values.load(setup.values16.data());
  emit_groups<uint16_t>(setup, symbols, planes, n, out, [&](__m512i bin, uint16_t* to) __attribute__((always_inline)) {
    _mm512_storeu_si512(to, values[bin]);
  });
}

// Bins as they are, which are below 256.
void emit_codes(const DecodeSetup& setup, const uint16_t* symbols, const uint8_t* planes, const float*, size_t n,
                uint8_t* out) {
  emit_groups<uint8_t>(setup, symbols, planes, n, out, [](__m512i bin, uint8_t* to) __attribute__((always_inline)) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(bin));
  });
}

template <class Value>
void emit_by_gathers(const DecodeSetup& setup, const uint16_t* symbols, const uint8_t* planes, const float*, size_t n,
                     uint8_t* out) {
  const uint32_t* const values = setup.values32.data();
  emit_groups<Value>(setup, symbols, planes, n, out, [&](__m512i bin, Value* to) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (size_t v = 0; v < 2; ++v) {
      const __m256i half = v ? _mm512_extracti64x4_epi64(bin, 1) : _mm512_castsi512_si256(bin);
      const __m512i found = _mm512_i32gather_epi32(_mm512_cvtepu16_epi32(half), values, 4);
      if constexpr (sizeof(Value) == 4) {
        _mm512_storeu_si512(to + 16 * v, found);
      } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * v), _mm512_cvtepi32_epi16(found));
      }
    }
  });
}

// Bins times steps. 32 floats are their upper halves, which are bfloat16, and their lower ones, which say
// whether to round up: beyond the middle, or in it if the upper is odd.
template <class T, bool kLow, bool kByRow>
void emit_scaled(const DecodeSetup& setup, const uint16_t* symbols, const uint8_t* planes, const float* steps, size_t n,
                 uint8_t* out) {
  const __m512i first_bin = _mm512_set1_epi32(setup.first_bin), one = _mm512_set1_epi16(1);
  const __m512 of_row = _mm512_set1_ps(*steps);
  __m512i lower = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  lower = pack_words(lower, _mm512_add_epi32(lower, _mm512_set1_epi32(32)));
  const __m512i upper = _mm512_add_epi16(lower, one);
  emit_groups<typename T::Bits, kLow>(setup, symbols, planes, n, out, [&](__m512i bin, auto* to) __attribute__((always_inline)) {
    __m512 value[2];
#pragma GCC unroll 2
    for (size_t v = 0; v < 2; ++v) {
      const __m256i half = v ? _mm512_extracti64x4_epi64(bin, 1) : _mm512_castsi512_si256(bin);
      const __m512 q = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_cvtepu16_epi32(half), first_bin));
      value[v] = _mm512_mul_ps(q, kByRow ? of_row : _mm512_loadu_ps(steps + 16 * v));
      if constexpr (T::kDType == DType::kF32) _mm512_storeu_ps(to + 16 * v, value[v]);
      if constexpr (T::kDType == DType::kF16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * v),
                            _mm512_cvtps_ph(value[v], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      }
    }
    if constexpr (T::kDType == DType::kBF16) {
      const __m512i first = _mm512_castps_si512(value[0]), second = _mm512_castps_si512(value[1]);
      const __m512i high = _mm512_permutex2var_epi16(first, upper, second);
      const __m512i low = _mm512_permutex2var_epi16(first, lower, second);
      const __m512i with_odd = _mm512_ternarylogic_epi32(low, high, one, 0xF8);  // low | (high & one)
      const __mmask32 up = _mm512_cmpge_epu16_mask(with_odd, _mm512_set1_epi16(short(0x8001)));
      _mm512_storeu_si512(to, _mm512_mask_add_epi16(high, up, high, one));
    }
    if constexpr (!kByRow) steps += kLanes;
  });
}

Emit emit_for(const DecodeSetup& setup) {
  if (setup.codes) return emit_codes;
  if (setup.scaled) {
    return with_dtype(setup.output, [&](auto t) -> Emit {
      using T = decltype(t);
      if (setup.layout->low_bits) return setup.by_row ? emit_scaled<T, true, true> : emit_scaled<T, true, false>;
      return setup.by_row ? emit_scaled<T, false, true> : emit_scaled<T, false, false>;
    });
  }
  const size_t n_bins = size_t(setup.layout->n_symbols) << setup.layout->low_bits;
  if (setup.output == DType::kF32) return emit_by_gathers<uint32_t>;
  if (n_bins <= 64) return emit_by_permutes<64>;
  if (n_bins <= 128) return emit_by_permutes<128>;
  if (n_bins <= 256) return emit_by_permutes<256>;
  if (n_bins <= 512) return emit_by_permutes<512>;
  return emit_by_gathers<uint16_t>;
}

// n_rows rows of `columns` weights of K segments under way.
template <size_t K, template <size_t> class Finder>
bool decode_rows(const DecodeSetup& setup, Stream* streams, States* states, size_t n_rows, size_t columns) {
  const __m128i table_log = _mm_cvtsi32_si128(int(setup.layout->table_log));
  Finder<K> finder(setup);
  States x[K];
  for (size_t k = 0; k < K; ++k) std::copy_n(states[k], 2, x[k]);
  const auto start_row = [&](size_t k) { finder.start_row(setup, k, streams[k].row); };
  const auto group = [&](size_t j, uint32_t active, size_t g) __attribute__((always_inline)) {
    Found found[K];
    finder(x, j, found);
#pragma GCC unroll 4
    for (size_t k = 0; k < K; ++k) {
      advance(x[k], found[k], active, table_log, streams[k].word);
      _mm512_store_si512(streams[k].symbols + kLanes * g, found[k].symbols);
    }
  };
  if (!walk<K>(setup, streams, n_rows, columns, emit_for(setup), start_row, group)) return false;
  for (size_t k = 0; k < K; ++k) std::copy_n(x[k], 2, states[k]);
  return true;
}

// Whole rows of K segments together, as many as the shortest has.
template <size_t K, template <size_t> class Finder>
bool decode_together(const DecodeSetup& setup, Stream* streams, States* states) {
  return decode_rows<K, Finder>(setup, streams, states, common_rows<K>(setup, streams), setup.layout->columns);
}

template <template <size_t> class Finder>
bool decode(const DecodeSetup& setup, const SegmentJob* jobs, size_t n) {
  Stream streams[kMostTogether];
  States states[kMostTogether];
  for (size_t k = 0; k < n; ++k) {
    if (!states_are_valid(*setup.layout, *jobs[k].bytes)) return false;
    streams[k].begin(jobs[k]);
    for (size_t v = 0; v < 2; ++v) states[k][v] = _mm512_loadu_si512(jobs[k].bytes->states + 64 * v);
  }
  // All whole rows that they have in common; each goes on alone.
  const bool good = n == 4   ? decode_together<4, Finder>(setup, streams, states)
                    : n == 3 ? decode_together<3, Finder>(setup, streams, states)
                    : n == 2 ? decode_together<2, Finder>(setup, streams, states)
                             : true;
  if (!good) return false;
  const size_t last_columns = setup.n % setup.layout->columns;
  const __m512i low = _mm512_set1_epi32(int(kStateLow));
  for (size_t k = 0; k < n; ++k) {
    if (!decode_together<1, Finder>(setup, streams + k, states + k)) return false;
    if (streams[k].row < streams[k].last_row &&
        !decode_rows<1, Finder>(setup, streams + k, states + k, 1, last_columns)) {
      return false;
    }
    if (streams[k].word != streams[k].words_end) return false;
    for (const __m512i& x : states[k]) {
      if (_mm512_cmpneq_epi32_mask(x, low)) return false;
    }
  }
  return true;
}

template <size_t K>
using SearchFinder32 = SearchFinder<32, K>;
template <size_t K>
using SearchFinder64 = SearchFinder<64, K>;
template <size_t K>
using SearchFinder128 = SearchFinder<128, K>;

}  // namespace

bool decode_segments_avx512(const DecodeSetup& setup, const SegmentJob* jobs, size_t n) {
  if (setup.layout->lanes() != kLanes) return decode_segments_scalar(setup, jobs, n);
  switch (setup.search_width) {
    case 32: return decode<SearchFinder32>(setup, jobs, n);
    case 64: return decode<SearchFinder64>(setup, jobs, n);
    case 128: return decode<SearchFinder128>(setup, jobs, n);
    default: return decode<GatherFinder>(setup, jobs, n);
  }
}

}  // namespace moebound
