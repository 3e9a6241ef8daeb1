// Sixteen lanes in four vectors of four. For AArch64, where every CPU has NEON and fused multiply-add.
#include "base/bytes_neon.h"
#include "base/lanes_neon.h"
#include "product/gate.h"
#include "product/rows.h"

namespace moebound {
namespace {

struct Neon : LanesNeon {
  static constexpr size_t kRows = 2, kRowsOfOne = 2, kFew = 2, kMostByFew = 8, kTokens = 2;
};

// 32 codes of a byte: the even ones, then the odd ones.
struct OfBytes {
  static constexpr size_t kGroupBytes = kProductGroup;
  __attribute__((always_inline)) static uint8x16x2_t load(const uint8_t* codes) { return vld2q_u8(codes); }
};

// The same, of four bits each.
struct OfHalves {
  static constexpr size_t kGroupBytes = kProductGroup / 2;
  __attribute__((always_inline)) static uint8x16x2_t load(const uint8_t* codes) {
    const uint8x16_t pairs = vld1q_u8(codes);
    return {{vandq_u8(pairs, vdupq_n_u8(15)), vshrq_n_u8(pairs, 4)}};
  }
};

// Tables of bfloat16, by shuffles of their bytes.
template <size_t kParts, class Codes>
struct FromShuffles {
  static constexpr size_t kGroupBytes = Codes::kGroupBytes;
  ByteTable<kParts> low, high;

  explicit FromShuffles(const ProductSetup& setup) : low(bytes(setup, 0)), high(bytes(setup, 8)) {}
  static ByteTable<kParts> bytes(const ProductSetup& setup, int shift) {
    uint8_t table[64 * kParts];
    for (size_t c = 0; c < sizeof table; ++c) table[c] = uint8_t(setup.words[c] >> shift);
    return {table, 4 * kParts, 16};
  }
  void begin_row(size_t, size_t) {}
  __attribute__((always_inline)) Sixteen weights(uint8x16_t codes) const {
    const uint8x16_t lows = low[codes], highs = high[codes];
    const uint16x8_t first = vreinterpretq_u16_u8(vzip1q_u8(lows, highs));
    const uint16x8_t second = vreinterpretq_u16_u8(vzip2q_u8(lows, highs));
    return {{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(first), 16)),
             vreinterpretq_f32_u32(vshll_high_n_u16(first, 16)),
             vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(second), 16)),
             vreinterpretq_f32_u32(vshll_high_n_u16(second, 16))}};
  }
  __attribute__((always_inline)) void operator()(size_t, const uint8_t* codes, const float*, Sixteen& even, Sixteen& odd) const {
    const uint8x16x2_t some = Codes::load(codes);
    even = weights(some.val[0]);
    odd = weights(some.val[1]);
  }
};

// Tables of any numbers, and long ones: scalar look-ups.
template <class Codes>
struct FromTable {
  static constexpr size_t kGroupBytes = Codes::kGroupBytes;
  const float* table;

  explicit FromTable(const ProductSetup& setup) : table(setup.matrix->table) {}
  void begin_row(size_t, size_t) {}
  __attribute__((always_inline)) float32x4_t four(const uint8_t* c) const {
    float32x4_t found = vld1q_dup_f32(table + c[0]);
    found = vld1q_lane_f32(table + c[1], found, 1);
    found = vld1q_lane_f32(table + c[2], found, 2);
    return vld1q_lane_f32(table + c[3], found, 3);
  }
  __attribute__((always_inline)) void operator()(size_t, const uint8_t* codes, const float*, Sixteen& even, Sixteen& odd) const {
    uint8_t some[2][kProductLanes];
    const uint8x16x2_t both = Codes::load(codes);
    vst1q_u8(some[0], both.val[0]);
    vst1q_u8(some[1], both.val[1]);
    even = {{four(some[0]), four(some[0] + 4), four(some[0] + 8), four(some[0] + 12)}};
    odd = {{four(some[1]), four(some[1] + 4), four(some[1] + 8), four(some[1] + 12)}};
  }
};

// A product rounded to the dtype, as pattern_of does it.
template <class T>
__attribute__((always_inline)) inline float32x4_t cast(float32x4_t value) {
  if constexpr (T::kDType == DType::kBF16) {
    return vreinterpretq_f32_u32(vandq_u32(rounded_bf16(value), vdupq_n_u32(0xFFFF0000u)));
  } else if constexpr (T::kDType == DType::kF16) {
    return vcvt_f32_f16(vcvt_f16_f32(value));
  } else {
    return value;
  }
}

template <class T, StepsOf kOf, class Codes>
struct Stepped {
  static constexpr size_t kGroupBytes = Codes::kGroupBytes;
  const float* of_rows;  // steps, or factors
  int32x4_t first;
  float32x4_t of_row[Neon::kRowsOfOne];

  explicit Stepped(const ProductSetup& setup)
      : of_rows(kOf == StepsOf::kBoth ? setup.matrix->factors : setup.matrix->steps),
        first(vdupq_n_s32(setup.matrix->first)) {}
  void begin_row(size_t r, size_t row) {
    if constexpr (kOf != StepsOf::kColumns) of_row[r] = vdupq_n_f32(of_rows[row]);
  }
  __attribute__((always_inline)) float32x4_t step_of(size_t r, const float* steps, size_t at) const {
    if constexpr (kOf == StepsOf::kRows) return of_row[r];
    else if constexpr (kOf == StepsOf::kColumns) return vld1q_f32(steps + at);
    else return vmulq_f32(vld1q_f32(steps + at), of_row[r]);
  }
  __attribute__((always_inline)) Sixteen weights(size_t r, uint8x16_t codes, const float* steps) const {
    const uint16x8_t words[2] = {vmovl_u8(vget_low_u8(codes)), vmovl_high_u8(codes)};
    Sixteen found;
#pragma GCC unroll 4
    for (size_t q = 0; q < 4; ++q) {
      const uint32x4_t code = q % 2 ? vmovl_high_u16(words[q / 2]) : vmovl_u16(vget_low_u16(words[q / 2]));
      const float32x4_t whole = vcvtq_f32_s32(vaddq_s32(vreinterpretq_s32_u32(code), first));
      found.four[q] = cast<T>(vmulq_f32(whole, step_of(r, steps, 4 * q)));
    }
    return found;
  }
  __attribute__((always_inline)) void operator()(size_t r, const uint8_t* codes, const float* steps, Sixteen& even,
                                                 Sixteen& odd) const {
    const uint8x16x2_t some = Codes::load(codes);
    even = weights(r, some.val[0], steps);
    odd = weights(r, some.val[1], kOf == StepsOf::kRows ? steps : steps + kProductLanes);
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
    Neon::widen(codes, even, odd);
  }
};

void rows_of_products(const ProductSetup& setup, size_t begin, size_t end) {
  const CodeMatrix& matrix = *setup.matrix;
  const bool bf16 = matrix.dtype == DType::kBF16;
  if (matrix.plain()) {
    all_rows<Neon>(setup, FromPlain(), begin, end);
  } else if (matrix.bits == 4) {
    if (!matrix.table) all_rows_of_steps<Neon, FromPackedSteps>(setup, begin, end);
    else if (bf16) all_rows<Neon>(setup, FromShuffles<1, OfHalves>(setup), begin, end);
    else all_rows<Neon>(setup, FromTable<OfHalves>(setup), begin, end);
  } else if (!matrix.table) {
    all_rows_of_steps<Neon, FromSteps>(setup, begin, end);
  } else if (!bf16 || matrix.n_codes > 128) {
    all_rows<Neon>(setup, FromTable<OfBytes>(setup), begin, end);
  } else if (matrix.n_codes <= 64) {
    all_rows<Neon>(setup, FromShuffles<1, OfBytes>(setup), begin, end);
  } else {
    all_rows<Neon>(setup, FromShuffles<2, OfBytes>(setup), begin, end);
  }
}

}  // namespace

const ProductPath product_neon{rows_of_products, gate_of};

}  // namespace moebound
