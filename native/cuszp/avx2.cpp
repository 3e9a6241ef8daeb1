#include <immintrin.h>

#include "cuszp/chunks.h"

namespace moebound {
namespace {

// Eight values a register, four registers a block.
constexpr size_t kWide = 8, kRegisters = kCuszpBlock / kWide;

MOEBOUND_INLINE __m256i load8(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
MOEBOUND_INLINE void store8(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
MOEBOUND_INLINE __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

MOEBOUND_INLINE __m256 widen(F32, const uint32_t* p) { return _mm256_castsi256_ps(load8(p)); }
MOEBOUND_INLINE __m256 widen(BF16, const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16));
}
MOEBOUND_INLINE __m256 widen(F16, const uint16_t* p) { return _mm256_cvtph_ps(load_half(p)); }

MOEBOUND_INLINE __m256i bins_of(__m256 x, __m256 reciprocal) {
  const __m256i infinite = _mm256_set1_epi32(0x7F800000);
  const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF));
  const __m256 finite = _mm256_castsi256_ps(_mm256_cmpgt_epi32(infinite, magnitude));
  const __m256 y = _mm256_mul_ps(_mm256_and_ps(x, finite), reciprocal);
  __m256 shifted = _mm256_add_ps(y, _mm256_set1_ps(0.5f));
  shifted = _mm256_min_ps(_mm256_max_ps(shifted, _mm256_set1_ps(-kSaturated)), _mm256_set1_ps(kSaturated));
  const __m256 below = _mm256_cmp_ps(y, _mm256_set1_ps(-0.5f), _CMP_LT_OQ);
  return _mm256_add_epi32(_mm256_cvttps_epi32(shifted), _mm256_castps_si256(below));
}

// 32 bytes in the order of a block, turned around in every eight: the first value has the highest
// bit of a byte.
MOEBOUND_INLINE __m256i turned(__m256i bytes) {
  return _mm256_shuffle_epi8(
      bytes, _mm256_broadcastsi128_si256(_mm_set_epi64x(0x08090A0B0C0D0E0F, 0x0001020304050607)));
}

// Four registers of eight 16-bit pairs, packed to bytes by halves, back in order.
MOEBOUND_INLINE __m256i in_order(__m256i packed) {
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

struct Avx2Lanes {
  struct Block {
    __m256i difference[kRegisters], magnitude[kRegisters];

    MOEBOUND_INLINE static uint32_t any_bits(__m256i a, __m256i b, __m256i c, __m256i d) {
      const __m256i all = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
      __m128i half = _mm_or_si128(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
      half = _mm_or_si128(half, _mm_unpackhi_epi64(half, half));
      const uint64_t pair = uint64_t(_mm_cvtsi128_si64(half));
      return uint32_t(pair) | uint32_t(pair >> 32);
    }
    MOEBOUND_INLINE uint32_t all() const { return any_bits(magnitude[0], magnitude[1], magnitude[2], magnitude[3]); }
    MOEBOUND_INLINE uint32_t others() const {
      return any_bits(without_first(), magnitude[1], magnitude[2], magnitude[3]);
    }
    MOEBOUND_INLINE __m256i without_first() const {
      return _mm256_blend_epi32(magnitude[0], _mm256_setzero_si256(), 1);
    }
    MOEBOUND_INLINE uint32_t first() const { return uint32_t(_mm256_cvtsi256_si32(magnitude[0])); }
    MOEBOUND_INLINE void drop_first() { magnitude[0] = without_first(); }

    MOEBOUND_INLINE void put(uint32_t n_planes, uint8_t* to) const {
      const __m256i signs = in_order(_mm256_packs_epi16(_mm256_packs_epi32(difference[0], difference[1]),
                                                        _mm256_packs_epi32(difference[2], difference[3])));
      store<int32_t>(to, _mm256_movemask_epi8(turned(signs)));
      for (uint32_t base = 0; base < n_planes; base += 8) {
        const __m128i by = _mm_cvtsi32_si128(int(base));
        const auto low = [&](size_t k) __attribute__((always_inline)) {
          return _mm256_and_si256(_mm256_srl_epi32(magnitude[k], by), _mm256_set1_epi32(0xFF));
        };
        const __m256i bytes = turned(in_order(
            _mm256_packus_epi16(_mm256_packs_epi32(low(0), low(1)), _mm256_packs_epi32(low(2), low(3)))));
        for (uint32_t p = base; p < std::min(n_planes, base + 8); ++p) {
          // The plane's bit becomes each byte's sign; what the shift brings in from the byte below is under it.
          const __m128i up = _mm_cvtsi32_si128(int(7 - (p - base)));
          store<int32_t>(to + 4 + 4 * p, _mm256_movemask_epi8(_mm256_sll_epi16(bytes, up)));
        }
      }
    }
  };

  template <class T>
  MOEBOUND_INLINE static Block read(T, const typename T::Bits* values, const CuszpCoding& coding, size_t keep) {
    const __m256 reciprocal = _mm256_set1_ps(coding.reciprocal);
    const __m256i one_up = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
    Block block;
    __m256i before = _mm256_setzero_si256();
    for (size_t k = 0; k < kRegisters; ++k) {
      __m256i difference = bins_of(widen(T{}, values + kWide * k), reciprocal);
      if (coding.mode != CuszpMode::kFixed) {
        const __m256i moved = _mm256_permutevar8x32_epi32(difference, one_up);
        difference = _mm256_sub_epi32(difference, _mm256_blend_epi32(moved, before, 1));
        before = moved;
      }
      if (keep < kCuszpBlock) {
        const __m256i left = _mm256_set1_epi32(int(keep) - int(kWide * k));
        const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        difference = _mm256_and_si256(difference, _mm256_cmpgt_epi32(left, place));
      }
      block.difference[k] = difference;
      block.magnitude[k] = _mm256_abs_epi32(difference);
    }
    return block;
  }

  // 32 bytes, all ones where a value's bit of the word is set.
  MOEBOUND_INLINE static __m256i bits_of(const uint8_t* word) {
    const __m256i of_byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x(0x0102040810204080);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(load<int32_t>(word)), of_byte);
    return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
  }

  // Planes [begin, end), at most eight of them, as bytes.
  MOEBOUND_INLINE static __m256i planes_of(const uint8_t* planes, uint32_t begin, uint32_t end) {
    __m256i bytes = _mm256_setzero_si256();
    for (uint32_t p = end; p > begin; --p) {
      bytes = _mm256_sub_epi8(_mm256_add_epi8(bytes, bytes), bits_of(planes + 4 * (p - 1)));
    }
    return bytes;
  }

  template <bool kWideRate, class T>
  MOEBOUND_INLINE static void decode_planes(T, const uint8_t* signs, CuszpRate rate, uint32_t outlier,
                                            const CuszpCoding& coding, typename T::Bits* out) {
    alignas(32) uint8_t bytes[4][kCuszpBlock], sign_bytes[kCuszpBlock];
    const size_t n_bytes = kWideRate ? (rate.planes + 7) / 8 : 1;
    for (uint32_t k = 0; k < n_bytes; ++k) {
      store8(bytes[k], planes_of(signs + 4, 8 * k, std::min(rate.planes, 8 * k + 8)));
    }
    store8(sign_bytes, bits_of(signs));
    const __m256 step = _mm256_set1_ps(coding.step);
    const __m256i highest = _mm256_set1_epi32(7);
    __m256i sum = _mm256_setzero_si256();
    __m256i values[kRegisters];
    for (size_t k = 0; k < kRegisters; ++k) {
      const auto byte = [&](size_t b) __attribute__((always_inline)) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes[b] + kWide * k)));
      };
      __m256i magnitude = byte(0);
      if constexpr (kWideRate) {
        for (uint32_t b = 1; b < n_bytes; ++b) {
          magnitude = _mm256_or_si256(magnitude, _mm256_sll_epi32(byte(b), _mm_cvtsi32_si128(int(8 * b))));
        }
      }
      if (k == 0 && rate.outlier_bytes) {
        magnitude = _mm256_blend_epi32(magnitude, _mm256_set1_epi32(int(outlier)), 1);
      }
      const __m256i sign =
          _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(sign_bytes + kWide * k)));
      __m256i bin = _mm256_sub_epi32(_mm256_xor_si256(magnitude, sign), sign);
      if (coding.mode != CuszpMode::kFixed) {
        bin = _mm256_add_epi32(bin, _mm256_slli_si256(bin, 4));
        bin = _mm256_add_epi32(bin, _mm256_slli_si256(bin, 8));
        const __m256i lower = _mm256_permute2x128_si256(bin, bin, 0x08);  // the low half, above zeros
        bin = _mm256_add_epi32(bin, _mm256_shuffle_epi32(lower, 0xFF));
        bin = _mm256_add_epi32(bin, sum);
        sum = _mm256_permutevar8x32_epi32(bin, highest);
      }
      values[k] = _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtepi32_ps(bin), step));
    }
    emit(T{}, values, out);
  }

  MOEBOUND_INLINE static void emit(F32, const __m256i* values, uint32_t* out) {
    for (size_t k = 0; k < kRegisters; ++k) store8(out + kWide * k, values[k]);
  }
  // To the nearest, ties to even; there is no NaN.
  MOEBOUND_INLINE static __m256i nearest_bf16(__m256i bits) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  }
  MOEBOUND_INLINE static void emit(BF16, const __m256i* values, uint16_t* out) {
    for (size_t k = 0; k < kRegisters; k += 2) {
      const __m256i packed = _mm256_packus_epi32(nearest_bf16(values[k]), nearest_bf16(values[k + 1]));
      store8(out + kWide * k, _mm256_permute4x64_epi64(packed, 0xD8));
    }
  }
  MOEBOUND_INLINE static void emit(F16, const __m256i* values, uint16_t* out) {
    for (size_t k = 0; k < kRegisters; ++k) {
      const __m128i half = _mm256_cvtps_ph(_mm256_castsi256_ps(values[k]), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + kWide * k), half);
    }
  }

  template <class T>
  MOEBOUND_INLINE static void decode(T, const uint8_t* payload, CuszpRate rate, const CuszpCoding& coding,
                                     typename T::Bits* out) {
    const uint32_t outlier = outlier_of(payload, rate);
    const uint8_t* const signs = payload + rate.outlier_bytes;
    if (rate.planes <= 8) [[likely]] {
      decode_planes<false>(T{}, signs, rate, outlier, coding, out);
    } else {
      decode_planes<true>(T{}, signs, rate, outlier, coding, out);
    }
  }
};

}  // namespace

CuszpPath cuszp_avx2() { return path_with<Avx2Lanes>(); }

}  // namespace moebound
