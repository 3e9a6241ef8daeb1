// 32 lanes in two vectors of sixteen. Compiled for AVX-512 F, BW, VL, DQ; called only where the CPU
// has them. Values of up to 256 symbols come from word permutes, others from gathers.
#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "bytes.h"
#include "rans_rows.h"

namespace moebound {
namespace {

// Sixteen lanes decode, those in `active`, and read words as needed. A state is never below 2^16
// here, so lanes that stand still do not read.
__attribute__((always_inline)) inline void advance(__m512i& x, __m512i entry, __mmask16 active,
                                                   __m128i table_log, const uint8_t*& word) {
  const __m512i frequency = _mm512_add_epi32(
      _mm512_and_si512(_mm512_srli_epi32(entry, 8), _mm512_set1_epi32(0xFFF)), _mm512_set1_epi32(1));
  const __m512i next = _mm512_mask_add_epi32(
      x, active, _mm512_mullo_epi32(frequency, _mm512_srl_epi32(x, table_log)), _mm512_srli_epi32(entry, 20));
  const __mmask16 reads = _mm512_cmplt_epu32_mask(next, _mm512_set1_epi32(int(kStateLow)));
  const __m512i words = _mm512_maskz_expand_epi32(
      reads, _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(word))));
  x = _mm512_mask_or_epi32(next, reads, _mm512_slli_epi32(next, 16), words);
  word += 2 * size_t(_mm_popcnt_u32(uint32_t(reads)));
}

// The low bytes of two entry vectors as 32 words, in order.
__attribute__((always_inline)) inline __m512i symbol_words(const __m512i (&entry)[2]) {
  const __m512i byte = _mm512_set1_epi32(0xFF);
  const __m256i low = _mm512_cvtepi32_epi16(_mm512_and_si512(entry[0], byte));
  const __m256i high = _mm512_cvtepi32_epi16(_mm512_and_si512(entry[1], byte));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Emits 16-bit values of up to 64 · kBlocks symbols by permutes of two registers each.
template <size_t kBlocks>
struct PermuteEmit {
  using Out = uint16_t;
  __m512i table[2 * kBlocks];

  explicit PermuteEmit(const std::vector<uint16_t>& values) {
    alignas(64) uint16_t padded[64 * kBlocks] = {};
    std::copy_n(values.begin(), std::min(values.size(), 64 * kBlocks), padded);
    for (size_t i = 0; i < 2 * kBlocks; ++i) table[i] = _mm512_load_si512(padded + 32 * i);
  }
  __attribute__((always_inline)) void operator()(const __m512i (&entry)[2], const uint8_t*, uint16_t* out) const {
    const __m512i symbols = symbol_words(entry);
    __m512i values = _mm512_permutex2var_epi16(table[0], symbols, table[1]);
#pragma GCC unroll 4
    for (size_t b = 1; b < kBlocks; ++b) {
      const __mmask32 beyond = _mm512_cmpge_epu16_mask(symbols, _mm512_set1_epi16(short(64 * b)));
      values = _mm512_mask_mov_epi16(
          values, beyond, _mm512_permutex2var_epi16(table[2 * b], symbols, table[2 * b + 1]));
    }
    _mm512_storeu_si512(out, values);
  }
};

// Sixteen bins: symbols with the low bits that the planes' words hold for them.
__attribute__((always_inline)) inline __m512i bins(__m512i entry, const uint8_t* planes, size_t v, uint32_t low_bits) {
  __m512i bin = _mm512_slli_epi32(_mm512_and_si512(entry, _mm512_set1_epi32(0xFF)), low_bits);
  for (uint32_t b = 0; b < low_bits; ++b) {
    const __mmask16 set = load<uint16_t>(planes + 4 * b + 2 * v);
    bin = _mm512_mask_or_epi32(bin, set, bin, _mm512_set1_epi32(int(1u << b)));
  }
  return bin;
}

// Emits 16-bit values by gathers from a table widened to 32 bits, or 32-bit ones as they are.
template <class Value>
struct GatherEmit {
  using Out = Value;
  const uint32_t* values;
  uint32_t low_bits;

  __attribute__((always_inline)) void operator()(const __m512i (&entry)[2], const uint8_t* planes, Value* out) const {
    for (size_t v = 0; v < 2; ++v) {
      const __m512i found = _mm512_i32gather_epi32(bins(entry[v], planes, v, low_bits), values, 4);
      if constexpr (sizeof(Value) == 4) {
        _mm512_storeu_si512(out + 16 * v, found);
      } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * v), _mm512_cvtepi32_epi16(found));
      }
    }
  }
};

template <class Emit>
bool decode(const DecodePlan& plan, const SegmentBytes& segment, size_t first, size_t last,
            typename Emit::Out* out, const Emit& emit) {
  if (!states_are_valid(*plan.layout, segment)) return false;
  const __m128i table_log = _mm_cvtsi32_si128(int(plan.layout->table_log));
  const __m512i slot_mask = _mm512_set1_epi32(int((1u << plan.layout->table_log) - 1));
  const uint32_t* const tables = plan.tables.data();
  __m512i x[2] = {_mm512_loadu_si512(segment.states), _mm512_loadu_si512(segment.states + 64)};
  const auto group = [&](const uint32_t* offsets, size_t n_active, auto all_active, const uint8_t*& word,
                         const uint8_t* planes, typename Emit::Out* to) __attribute__((always_inline)) {
    __m512i entry[2];
#pragma GCC unroll 2
    for (size_t v = 0; v < 2; ++v) {
      __m512i index = _mm512_and_si512(x[v], slot_mask);
      if (offsets) index = _mm512_add_epi32(index, _mm512_loadu_si512(offsets + 16 * v));
      entry[v] = _mm512_i32gather_epi32(index, tables, 4);
    }
    const uint32_t active = decltype(all_active)::value ? ~0u : (1u << n_active) - 1;
    advance(x[0], entry[0], __mmask16(active), table_log, word);
    advance(x[1], entry[1], __mmask16(active >> 16), table_log, word);
    emit(entry, planes, to);
  };
  if (!walk_rows(plan, segment, first, last, out, group)) return false;
  const __m512i low = _mm512_set1_epi32(int(kStateLow));
  return _mm512_cmpeq_epi32_mask(x[0], low) == 0xFFFF && _mm512_cmpeq_epi32_mask(x[1], low) == 0xFFFF;
}

}  // namespace

bool decode_segment_avx512(const DecodePlan& plan, const SegmentBytes& segment, size_t first, size_t last,
                           void* out) {
  const uint32_t low_bits = plan.layout->low_bits;
  if (plan.layout->lanes() != kLanes) return decode_segment_scalar(plan, segment, first, last, out);
  if (plan.output == DType::kF32) {
    return decode(plan, segment, first, last, static_cast<uint32_t*>(out),
                  GatherEmit<uint32_t>{plan.values32.data(), low_bits});
  }
  auto* out16 = static_cast<uint16_t*>(out);
  if (low_bits == 0) {
    const size_t n = plan.values16.size();
    if (n <= 64) return decode(plan, segment, first, last, out16, PermuteEmit<1>(plan.values16));
    if (n <= 128) return decode(plan, segment, first, last, out16, PermuteEmit<2>(plan.values16));
    return decode(plan, segment, first, last, out16, PermuteEmit<4>(plan.values16));
  }
  return decode(plan, segment, first, last, out16, GatherEmit<uint16_t>{plan.values32.data(), low_bits});
}

}  // namespace moebound
