// 32 lanes in four vectors of eight, of up to two segments in lock step. Compiled for AVX2; called only
// where the CPU has it.
//
// Table look-ups are eight scalar loads, not vpgatherdd: as quick on Intel, and a third quicker on
// AMD's Zen, where the gather is microcode. Values come from byte shuffles while there are at most
// 128 symbols, else from one scalar look-up a weight.
#include <immintrin.h>

#include <algorithm>

#include "base/bytes.h"
#include "bound/rans/streams.h"

namespace moebound {
namespace {

// For each mask of lanes that emit: the emitting lanes in order at the end of the vector.
struct GatherTable {
  alignas(32) uint32_t index[256][8];
  constexpr GatherTable() : index() {
    for (uint32_t mask = 0; mask < 256; ++mask) {
      uint32_t next = 8;
      for (uint32_t lane = 8; lane-- > 0;) {
        if (mask >> lane & 1u) index[mask][--next] = lane;
      }
    }
  }
};
constexpr GatherTable kGather;

// For each mask of lanes that read: which of the next words each lane gets.
struct SpreadTable {
  alignas(32) uint32_t index[256][8];
  constexpr SpreadTable() : index() {
    for (uint32_t mask = 0; mask < 256; ++mask) {
      uint32_t next = 0;
      for (uint32_t lane = 0; lane < 8; ++lane) index[mask][lane] = (mask >> lane & 1u) ? next++ : 0;
    }
  }
};
constexpr SpreadTable kSpread;

// tables[index[lane]] of eight lanes.
__attribute__((always_inline)) inline __m256i look_up(const uint32_t* tables, __m256i index) {
  const uint64_t a = uint64_t(_mm256_extract_epi64(index, 0)), b = uint64_t(_mm256_extract_epi64(index, 1));
  const uint64_t c = uint64_t(_mm256_extract_epi64(index, 2)), d = uint64_t(_mm256_extract_epi64(index, 3));
  __m128i low = _mm_cvtsi32_si128(int(tables[uint32_t(a)]));
  low = _mm_insert_epi32(low, int(tables[a >> 32]), 1);
  low = _mm_insert_epi32(low, int(tables[uint32_t(b)]), 2);
  low = _mm_insert_epi32(low, int(tables[b >> 32]), 3);
  __m128i high = _mm_cvtsi32_si128(int(tables[uint32_t(c)]));
  high = _mm_insert_epi32(high, int(tables[c >> 32]), 1);
  high = _mm_insert_epi32(high, int(tables[uint32_t(d)]), 2);
  high = _mm_insert_epi32(high, int(tables[d >> 32]), 3);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// Vector v's part of the first n_active of 32 lanes, as all ones.
__attribute__((always_inline)) inline __m256i first_lanes(size_t n_active, size_t v) {
  const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(int(8 * v)));
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n_active)), lane);
}

// Eight lanes decode, those in `active` if kMasked, and read words as needed. A state is never
// below 2^16 here, so lanes that stand still do not read.
template <bool kMasked>
__attribute__((always_inline)) inline void advance(__m256i& x, __m256i entry, __m256i active,
                                                   __m128i table_log, const uint8_t*& word) {
  const __m256i twelve_bits = _mm256_set1_epi32(0xFFF), one = _mm256_set1_epi32(1);
  const __m256i frequency =
      _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(entry, 8), twelve_bits), one);
  __m256i next = _mm256_add_epi32(_mm256_mullo_epi32(frequency, _mm256_srl_epi32(x, table_log)),
                                  _mm256_srli_epi32(entry, 20));
  if constexpr (kMasked) next = _mm256_blendv_epi8(x, next, active);
  const __m256i reads = _mm256_cmpeq_epi32(_mm256_srli_epi32(next, 16), _mm256_setzero_si256());
  const uint32_t mask = uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(reads)));
  const __m256i words = _mm256_permutevar8x32_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(word))),
      _mm256_load_si256(reinterpret_cast<const __m256i*>(kSpread.index[mask])));
  x = _mm256_blendv_epi8(next, _mm256_or_si256(_mm256_slli_epi32(next, 16), words), reads);
  word += 2 * size_t(_mm_popcnt_u32(mask));
}

// The low bytes of four entry vectors, in order.
__attribute__((always_inline)) inline __m256i pack_symbols(const __m256i (&entry)[4]) {
  const __m256i byte = _mm256_set1_epi32(0xFF);
  const __m256i a = _mm256_packus_epi32(_mm256_and_si256(entry[0], byte), _mm256_and_si256(entry[1], byte));
  const __m256i b = _mm256_packus_epi32(_mm256_and_si256(entry[2], byte), _mm256_and_si256(entry[3], byte));
  const __m256i both = _mm256_packus_epi16(a, b);  // dwords: 0a 1a 2a 3a | 0b 1b 2b 3b
  return _mm256_permutevar8x32_epi32(both, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Writes 32 values a turn with store(symbols, planes, group, out), symbols being bytes, those of a ragged
// end by way of a buffer.
template <class Value, class Store>
__attribute__((always_inline)) inline void emit_groups(const DecodeSetup& setup, const uint16_t* symbols,
                                                       const uint8_t* planes, size_t n, uint8_t* bytes,
                                                       const Store& store) {
  const auto* symbol = reinterpret_cast<const uint8_t*>(symbols);
  const size_t plane_bytes = 4 * size_t(setup.layout->low_bits);
  auto* out = reinterpret_cast<Value*>(bytes);
  for (size_t i = 0; i < n; i += kLanes, planes += plane_bytes) {
    Value ragged[kLanes];
    const bool full = i + kLanes <= n;
    store(symbol + i, planes, i, full ? out + i : ragged);
    if (!full) std::copy_n(ragged, n - i, out + i);
  }
}

__attribute__((always_inline)) inline __m256i load32(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// Emits 16-bit values by shuffles: block b of the tables serves symbols 16b .. 16b + 15.
template <size_t kBlocks>
void emit_by_shuffles(const DecodeSetup& setup, const uint16_t* symbols, const uint8_t* planes, const float*, size_t n,
                      uint8_t* out) {
  const uint8_t *const low = setup.shuffle_low.data(), *const high = setup.shuffle_high.data();
  emit_groups<uint16_t>(setup, symbols, planes, n, out, [&](const uint8_t* symbol, const uint8_t*, size_t, uint16_t* to)
                                                            __attribute__((always_inline)) {
    const __m256i some = load32(symbol);
    __m256i lows = _mm256_setzero_si256(), highs = lows;
    __m256i block_start = lows;
#pragma GCC unroll 8
    for (size_t b = 0; b < kBlocks; ++b) {
      // In this block: index 0x70 .. 0x7F, a shuffle by its low nibble. Outside: high bit, zero.
      const __m256i index = _mm256_adds_epu8(_mm256_sub_epi8(some, block_start), _mm256_set1_epi8(0x70));
      lows = _mm256_or_si256(lows, _mm256_shuffle_epi8(load32(low + 32 * b), index));
      highs = _mm256_or_si256(highs, _mm256_shuffle_epi8(load32(high + 32 * b), index));
      block_start = _mm256_add_epi8(block_start, _mm256_set1_epi8(16));
    }
    // Quarters 0 2 1 3: so that unpacking within halves gives them in order.
    lows = _mm256_permute4x64_epi64(lows, 0xD8);
    highs = _mm256_permute4x64_epi64(highs, 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_unpacklo_epi8(lows, highs));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), _mm256_unpackhi_epi8(lows, highs));
  });
}

// Bit i of a plane as byte i: all ones where it is set.
__attribute__((always_inline)) inline __m256i spread_bits(uint32_t plane) {
  const __m256i byte_of = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                           2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bit_of = _mm256_set1_epi64x(int64_t(0x8040201008040201ull));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(int(plane)), byte_of);
  return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit_of), bit_of);
}

// The low bits of 32 bins as bytes.
__attribute__((always_inline)) inline __m256i low_bytes(const uint8_t* planes, uint32_t low_bits) {
  __m256i low = _mm256_setzero_si256();
  for (uint32_t b = 0; b < low_bits; ++b) {
    const __m256i set = spread_bits(load<uint32_t>(planes + 4 * b));
    low = _mm256_or_si256(low, _mm256_and_si256(set, _mm256_set1_epi8(char(1u << b))));
  }
  return low;
}

// Emits bins as they are, which are below 256: no bit of a symbol moves into the byte beside it.
void emit_codes(const DecodeSetup& setup, const uint16_t* symbols, const uint8_t* planes, const float*, size_t n,
                uint8_t* out) {
  const uint32_t low_bits = setup.layout->low_bits;
  if (low_bits == 0) {
    std::copy_n(reinterpret_cast<const uint8_t*>(symbols), n, out);
    return;
  }
  emit_groups<uint8_t>(setup, symbols, planes, n, out, [&](const uint8_t* symbol, const uint8_t* plane, size_t, uint8_t* to)
                                                           __attribute__((always_inline)) {
    const __m256i high = _mm256_sll_epi16(load32(symbol), _mm_cvtsi32_si128(int(low_bits)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_or_si256(high, low_bytes(plane, low_bits)));
  });
}

// Emits values of any width by look-ups, with low bits from planes if there are any.
template <class Value>
void emit_by_look_ups(const DecodeSetup& setup, const uint16_t* symbols, const uint8_t* planes, const float*, size_t n,
                      uint8_t* out) {
  const uint32_t low_bits = setup.layout->low_bits;
  const Value* values;
  if constexpr (sizeof(Value) == 4) values = setup.values32.data();
  else values = setup.values16.data();
  emit_groups<Value>(setup, symbols, planes, n, out, [&](const uint8_t* symbol, const uint8_t* plane, size_t, Value* to)
                                                         __attribute__((always_inline)) {
    const __m256i some = load32(symbol), low = low_bytes(plane, low_bits);
    const auto bins = [&](__m128i high_part, __m128i low_part) {
      return _mm256_or_si256(_mm256_slli_epi16(_mm256_cvtepu8_epi16(high_part), int(low_bits)),
                             _mm256_cvtepu8_epi16(low_part));
    };
    alignas(32) uint16_t bin[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(bin), bins(_mm256_castsi256_si128(some), _mm256_castsi256_si128(low)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(bin + 16),
                       bins(_mm256_extracti128_si256(some, 1), _mm256_extracti128_si256(low, 1)));
#pragma GCC unroll 32
    for (size_t i = 0; i < kLanes; ++i) to[i] = values[bin[i]];
  });
}

// A float's bits as a bfloat16 in the upper half, rounded to even; below it is anything.
__attribute__((always_inline)) inline __m256i rounded(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
}

// Emits bins times steps.
template <class T, bool kLow, bool kByRow>
void emit_scaled(const DecodeSetup& setup, const uint16_t* symbols, const uint8_t* planes, const float* steps, size_t n,
                 uint8_t* out) {
  using Value = typename T::Bits;
  const uint32_t low_bits = setup.layout->low_bits;
  const __m256i first_bin = _mm256_set1_epi32(setup.first_bin);
  const __m256 of_row = _mm256_set1_ps(*steps);
  emit_groups<Value>(setup, symbols, planes, n, out, [&](const uint8_t* symbol, const uint8_t* plane, size_t i, Value* to)
                                                         __attribute__((always_inline)) {
    const auto eight = [](const uint8_t* from) __attribute__((always_inline)) {
      return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    };
    alignas(32) [[maybe_unused]] uint8_t low[kLanes];
    if constexpr (kLow) _mm256_store_si256(reinterpret_cast<__m256i*>(low), low_bytes(plane, low_bits));
    __m256 value[4];
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; ++v) {
      __m256i bin = eight(symbol + 8 * v);
      if constexpr (kLow) {
        bin = _mm256_or_si256(_mm256_sll_epi32(bin, _mm_cvtsi32_si128(int(low_bits))), eight(low + 8 * v));
      }
      bin = _mm256_add_epi32(bin, first_bin);
      value[v] = _mm256_mul_ps(_mm256_cvtepi32_ps(bin), kByRow ? of_row : _mm256_loadu_ps(steps + i + 8 * v));
    }
    if constexpr (T::kDType == DType::kF32) {
      for (size_t v = 0; v < 4; ++v) _mm256_storeu_ps(reinterpret_cast<float*>(to + 8 * v), value[v]);
    } else if constexpr (T::kDType == DType::kF16) {
      for (size_t v = 0; v < 4; ++v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * v),
                         _mm256_cvtps_ph(value[v], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      }
    } else {
#pragma GCC unroll 2
      for (size_t v = 0; v < 4; v += 2) {
        const __m256i both = _mm256_packus_epi32(_mm256_srli_epi32(rounded(value[v]), 16),
                                                 _mm256_srli_epi32(rounded(value[v + 1]), 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * v), _mm256_permute4x64_epi64(both, 0xD8));
      }
    }
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
  if (setup.output == DType::kF32) return emit_by_look_ups<uint32_t>;
  switch (setup.shuffle_low.size() / 32) {
    case 1: return emit_by_shuffles<1>;
    case 2: return emit_by_shuffles<2>;
    case 3: return emit_by_shuffles<3>;
    case 4: return emit_by_shuffles<4>;
    case 5: return emit_by_shuffles<5>;
    case 6: return emit_by_shuffles<6>;
    case 7: return emit_by_shuffles<7>;
    case 8: return emit_by_shuffles<8>;
    default: return emit_by_look_ups<uint16_t>;
  }
}

using States = __m256i[4];
constexpr size_t kTogether = 2;

// n_rows rows of `columns` weights of K segments under way.
template <size_t K>
bool decode_rows(const DecodeSetup& setup, Stream* streams, States* states, size_t n_rows, size_t columns) {
  const __m128i table_log = _mm_cvtsi32_si128(int(setup.layout->table_log));
  const __m256i slot_mask = _mm256_set1_epi32(int((1u << setup.layout->table_log) - 1));
  const uint32_t* const tables = setup.tables.data();
  const uint32_t* offsets[K];
  States x[K];
  for (size_t k = 0; k < K; ++k) std::copy_n(states[k], 4, x[k]);
  const auto start_row = [&](size_t k) { offsets[k] = setup.offsets(streams[k].row); };
  const auto group = [&](size_t j, uint32_t active, size_t g) __attribute__((always_inline)) {
    __m256i entry[K][4];
#pragma GCC unroll 2
    for (size_t k = 0; k < K; ++k) {
#pragma GCC unroll 4
      for (size_t v = 0; v < 4; ++v) {
        __m256i index = _mm256_and_si256(x[k][v], slot_mask);
        if (offsets[k]) {
          const auto* at = reinterpret_cast<const __m256i*>(offsets[k] + j + 8 * v);
          index = _mm256_add_epi32(index, _mm256_loadu_si256(at));
        }
        entry[k][v] = look_up(tables, index);
      }
    }
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; ++v) {
#pragma GCC unroll 2
      for (size_t k = 0; k < K; ++k) {
        if (active == ~0u) [[likely]] {
          advance<false>(x[k][v], entry[k][v], _mm256_setzero_si256(), table_log, streams[k].word);
        } else {
          const size_t n_active = size_t(_mm_popcnt_u32(active));
          advance<true>(x[k][v], entry[k][v], first_lanes(n_active, v), table_log, streams[k].word);
        }
      }
    }
    for (size_t k = 0; k < K; ++k) {
      auto* const symbols = reinterpret_cast<uint8_t*>(streams[k].symbols) + kLanes * g;
      _mm256_store_si256(reinterpret_cast<__m256i*>(symbols), pack_symbols(entry[k]));
    }
  };
  if (!walk<K>(setup, streams, n_rows, columns, emit_for(setup), start_row, group)) return false;
  for (size_t k = 0; k < K; ++k) std::copy_n(x[k], 4, states[k]);
  return true;
}

// Whole rows of K segments together, as many as the shortest has.
template <size_t K>
bool decode_together(const DecodeSetup& setup, Stream* streams, States* states) {
  return decode_rows<K>(setup, streams, states, common_rows<K>(setup, streams), setup.layout->columns);
}

bool decode(const DecodeSetup& setup, const SegmentJob* jobs, size_t n) {
  Stream streams[kTogether];
  States states[kTogether];
  for (size_t k = 0; k < n; ++k) {
    if (!states_are_valid(*setup.layout, *jobs[k].bytes)) return false;
    streams[k].begin(jobs[k]);
    for (size_t v = 0; v < 4; ++v) states[k][v] = load32(jobs[k].bytes->states + 32 * v);
  }
  // All whole rows that they have in common; each goes on alone.
  if (n == kTogether && !decode_together<kTogether>(setup, streams, states)) return false;
  const size_t last_columns = setup.n % setup.layout->columns;
  const __m256i low = _mm256_set1_epi32(int(kStateLow));
  for (size_t k = 0; k < n; ++k) {
    if (!decode_together<1>(setup, streams + k, states + k)) return false;
    if (streams[k].row < streams[k].last_row && !decode_rows<1>(setup, streams + k, states + k, 1, last_columns)) {
      return false;
    }
    if (streams[k].word != streams[k].words_end) return false;
    for (const __m256i& x : states[k]) {
      if (_mm256_movemask_epi8(_mm256_cmpeq_epi32(x, low)) != -1) return false;
    }
  }
  return true;
}

}  // namespace

bool decode_segments_avx2(const DecodeSetup& setup, const SegmentJob* jobs, size_t n) {
  if (setup.layout->lanes() != kLanes) return decode_segments_scalar(setup, jobs, n);
  for (size_t i = 0; i < n; i += kTogether) {
    if (!decode(setup, jobs + i, std::min(kTogether, n - i))) return false;
  }
  return true;
}

namespace {

// Eight lanes encode, those in `active`: words down from `word`, then x = (x / f << T) + x mod f + c.
__attribute__((always_inline)) inline void retreat(__m256i& x, __m256i entry, __m256i active, __m128i table_log,
                                                   __m128i limit_shift, uint16_t*& word) {
  const __m256i frequency =
      _mm256_add_epi32(_mm256_and_si256(entry, _mm256_set1_epi32(0xFFF)), _mm256_set1_epi32(1));
  const __m256i cumulative = _mm256_srli_epi32(entry, 12);
  const __m256i stays = _mm256_cmpgt_epi32(frequency, _mm256_srl_epi32(x, limit_shift));
  const __m256i emits = _mm256_andnot_si256(stays, active);
  const uint32_t mask = uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(emits)));
  const __m256i low_half = _mm256_and_si256(x, _mm256_set1_epi32(0xFFFF));
  const __m256i packed = _mm256_permutevar8x32_epi32(
      low_half, _mm256_load_si256(reinterpret_cast<const __m256i*>(kGather.index[mask])));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(word - 8),
                   _mm_packus_epi32(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1)));
  word -= _mm_popcnt_u32(mask);
  const __m256i y = _mm256_blendv_epi8(x, _mm256_srli_epi32(x, 16), emits);
  // y / f in float is at most one off, because the quotient is below 2^22: mend it in integers.
  const __m256 whole = _mm256_add_ps(
      _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(y, 16)), _mm256_set1_ps(65536.0f)),
      _mm256_cvtepi32_ps(_mm256_and_si256(y, _mm256_set1_epi32(0xFFFF))));
  __m256i quotient = _mm256_cvttps_epi32(_mm256_div_ps(whole, _mm256_cvtepi32_ps(frequency)));
  __m256i rest = _mm256_sub_epi32(y, _mm256_mullo_epi32(quotient, frequency));
  const __m256i too_high = _mm256_srai_epi32(rest, 31);  // -1 where the rest is negative
  quotient = _mm256_add_epi32(quotient, too_high);
  rest = _mm256_add_epi32(rest, _mm256_and_si256(too_high, frequency));
  const __m256i fits = _mm256_cmpgt_epi32(frequency, rest);
  quotient = _mm256_add_epi32(_mm256_sub_epi32(quotient, _mm256_set1_epi32(-1)), fits);
  rest = _mm256_sub_epi32(rest, _mm256_andnot_si256(fits, frequency));
  const __m256i next =
      _mm256_add_epi32(_mm256_sll_epi32(quotient, table_log), _mm256_add_epi32(rest, cumulative));
  x = _mm256_blendv_epi8(x, next, active);
}

}  // namespace

uint16_t* encode_segment_avx2(const EncodeSetup& setup, size_t first, size_t last, uint32_t* states,
                              uint16_t* words_end) {
  const Layout& layout = *setup.layout;
  if (layout.lanes() != kLanes || layout.table_log < kLeastEncodedTableLog) {
    return encode_segment_scalar(setup, first, last, states, words_end);
  }
  const __m128i table_log = _mm_cvtsi32_si128(int(layout.table_log));
  const __m128i limit_shift = _mm_cvtsi32_si128(int(32 - layout.table_log));
  __m256i x[4];
  for (auto& lanes : x) lanes = _mm256_set1_epi32(int(kStateLow));
  uint16_t* word = words_end;
  const auto group = [&](const uint32_t* start, const uint8_t* symbols, size_t n_active)
                         __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (size_t v = 4; v-- > 0;) {
      const __m256i index = _mm256_add_epi32(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start + 8 * v)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(symbols + 8 * v))));
      retreat(x[v], look_up(setup.entries.data(), index), first_lanes(n_active, v), table_log, limit_shift, word);
    }
  };
  for (size_t row = last; row-- > first;) {
    const uint32_t* start = setup.starts.of_row(row);
    const uint8_t* symbols = setup.symbols + row * layout.columns;
    size_t j = std::min<size_t>(layout.columns, setup.n - row * layout.columns);
    if (const size_t left = j % kLanes; left) {
      j -= left;
      uint8_t padded[kLanes] = {};
      std::copy_n(symbols + j, left, padded);
      group(start + j, padded, left);
    }
    while (j > 0) {
      j -= kLanes;
      group(start + j, symbols + j, kLanes);
    }
  }
  for (size_t v = 0; v < 4; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(states + 8 * v), x[v]);
  return word;
}

}  // namespace moebound
