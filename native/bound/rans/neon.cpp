// 32 lanes in eight vectors of four, of up to two segments in lock step. For AArch64, where every CPU has
// NEON and byte order is little.
//
// Table look-ups are scalar loads: NEON has no gather. Which lanes read a word is asked of all 32 at once,
// because moving a mask out of a vector takes long. Values come from byte shuffles while there are at most
// 128 symbols, else from one scalar look-up a weight.
#include <arm_neon.h>

#include <algorithm>

#include "base/bytes.h"
#include "base/bytes_neon.h"
#include "bound/rans/streams.h"

namespace moebound {
namespace {

constexpr size_t kVectors = 8, kTogether = 2;
using States = uint32x4_t[kVectors];

// For each mask of eight lanes that read: which bytes of the next words each lane gets; none makes zero.
struct SpreadTable {
  alignas(16) uint8_t index[256][16];
  uint8_t n_bytes[256];
  constexpr SpreadTable() : index(), n_bytes() {
    for (uint32_t mask = 0; mask < 256; ++mask) {
      uint8_t next = 0;
      for (uint32_t lane = 0; lane < 8; ++lane) {
        for (uint32_t half = 0; half < 2; ++half) index[mask][2 * lane + half] = (mask >> lane & 1u) ? next++ : 0xFF;
      }
      n_bytes[mask] = next;
    }
  }
};
constexpr SpreadTable kSpread;

// For each mask of eight lanes that emit: the bytes of their words, in order at the end of the vector.
struct GatherTable {
  alignas(16) uint8_t index[256][16];
  constexpr GatherTable() : index() {
    for (uint32_t mask = 0; mask < 256; ++mask) {
      uint32_t next = 8;
      for (uint32_t lane = 8; lane-- > 0;) {
        if (!(mask >> lane & 1u)) continue;
        --next;
        index[mask][2 * next] = uint8_t(2 * lane);
        index[mask][2 * next + 1] = uint8_t(2 * lane + 1);
      }
    }
  }
};
constexpr GatherTable kGather;

// table[index[lane]] of four lanes.
__attribute__((always_inline)) inline uint32x4_t look_up(const uint32_t* table, uint32x4_t index) {
  const uint64_t a = vgetq_lane_u64(vreinterpretq_u64_u32(index), 0);
  const uint64_t b = vgetq_lane_u64(vreinterpretq_u64_u32(index), 1);
  uint32x4_t found = vdupq_n_u32(0);
  found = vld1q_lane_u32(table + uint32_t(a), found, 0);
  found = vld1q_lane_u32(table + (a >> 32), found, 1);
  found = vld1q_lane_u32(table + uint32_t(b), found, 2);
  return vld1q_lane_u32(table + (b >> 32), found, 3);
}

// Vector v's part of the first n_active of 32 lanes, as all ones.
__attribute__((always_inline)) inline uint32x4_t first_lanes(size_t n_active, size_t v) {
  constexpr uint32_t kCount[4] = {0, 1, 2, 3};
  return vcltq_u32(vaddq_u32(vld1q_u32(kCount), vdupq_n_u32(uint32_t(4 * v))), vdupq_n_u32(uint32_t(n_active)));
}

// The low halves of two vectors' lanes, and the low bytes of four vectors' lanes, in order.
__attribute__((always_inline)) inline uint16x8_t low_halves(uint32x4_t a, uint32x4_t b) {
  return vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
}
__attribute__((always_inline)) inline uint8x16_t low_bytes(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
  return vuzp1q_u8(vreinterpretq_u8_u16(low_halves(a, b)), vreinterpretq_u8_u16(low_halves(c, d)));
}

// A bit for each of 32 lanes that are all ones or all zeros.
__attribute__((always_inline)) inline uint32_t mask_of(uint8x16_t first, uint8x16_t second) {
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201ull));
  const uint8x16_t pairs = vpaddq_u8(vandq_u8(first, bit), vandq_u8(second, bit));
  const uint8x16_t fours = vpaddq_u8(pairs, pairs);
  return vgetq_lane_u32(vreinterpretq_u32_u8(vpaddq_u8(fours, fours)), 0);
}
__attribute__((always_inline)) inline uint32_t mask_of(const States& lanes) {
  return mask_of(low_bytes(lanes[0], lanes[1], lanes[2], lanes[3]), low_bytes(lanes[4], lanes[5], lanes[6], lanes[7]));
}

// 32 lanes decode, the first n_active if kMasked, and read words as needed. A state is never below 2^16
// here, so lanes that stand still do not read.
template <bool kMasked>
__attribute__((always_inline)) inline void advance(States& x, const States& entry, size_t n_active,
                                                   int32x4_t down_by_table_log, const uint8_t*& word) {
  States next, reads;
#pragma GCC unroll 8
  for (size_t v = 0; v < kVectors; ++v) {
    const uint32x4_t less_one = vandq_u32(vshrq_n_u32(entry[v], 8), vdupq_n_u32(0xFFF));
    const uint32x4_t shifted = vshlq_u32(x[v], down_by_table_log);
    // frequency · shifted + bias
    next[v] = vmlaq_u32(vaddq_u32(shifted, vshrq_n_u32(entry[v], 20)), less_one, shifted);
    if constexpr (kMasked) next[v] = vbslq_u32(first_lanes(n_active, v), next[v], x[v]);
    reads[v] = vcltq_u32(next[v], vdupq_n_u32(kStateLow));
  }
  const uint32_t mask = mask_of(reads);
#pragma GCC unroll 4
  for (size_t v = 0; v < kVectors; v += 2) {
    const uint32_t eight = mask >> 4 * v & 0xFF;
    const uint16x8_t words = vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(word), vld1q_u8(kSpread.index[eight])));
    word += kSpread.n_bytes[eight];
    const uint32x4_t pair[2] = {vmovl_u16(vget_low_u16(words)), vmovl_high_u16(words)};
#pragma GCC unroll 2
    for (size_t h = 0; h < 2; ++h) {
      // By 16 where a word comes in, by 0 where none does: then the word is zero.
      const uint32x4_t up = vandq_u32(reads[v + h], vdupq_n_u32(16));
      x[v + h] = vorrq_u32(vshlq_u32(next[v + h], vreinterpretq_s32_u32(up)), pair[h]);
    }
  }
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

// Emits 16-bit values by shuffles.
template <size_t kParts>
void emit_by_shuffles(const DecodeSetup& setup, const uint16_t* symbols, const uint8_t* planes, const float*, size_t n,
                      uint8_t* out) {
  const size_t n_blocks = setup.shuffle_low.size() / 32;
  const ByteTable<kParts> low(setup.shuffle_low.data(), n_blocks, 32), high(setup.shuffle_high.data(), n_blocks, 32);
  emit_groups<uint16_t>(setup, symbols, planes, n, out, [&](const uint8_t* symbol, const uint8_t*, size_t, uint16_t* to)
                                                            __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (size_t h = 0; h < 2; ++h) {
      const uint8x16_t some = vld1q_u8(symbol + 16 * h);
      const uint8x16x2_t both = {{low[some], high[some]}};
      vst2q_u8(reinterpret_cast<uint8_t*>(to + 16 * h), both);
    }
  });
}

// The low bits of 16 bins as bytes; planes begin at the byte of the first.
__attribute__((always_inline)) inline uint8x16_t low_bits_of(const uint8_t* planes, uint32_t low_bits) {
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201ull));
  uint8x16_t low = vdupq_n_u8(0);
  for (uint32_t b = 0; b < low_bits; ++b) {
    const uint8x16_t bytes = vcombine_u8(vld1_dup_u8(planes + 4 * b), vld1_dup_u8(planes + 4 * b + 1));
    low = vorrq_u8(low, vandq_u8(vtstq_u8(bytes, bit), vdupq_n_u8(uint8_t(1u << b))));
  }
  return low;
}

// Emits bins as they are, which are below 256.
void emit_codes(const DecodeSetup& setup, const uint16_t* symbols, const uint8_t* planes, const float*, size_t n,
                uint8_t* out) {
  const uint32_t low_bits = setup.layout->low_bits;
  const int8x16_t up = vdupq_n_s8(int8_t(low_bits));
  emit_groups<uint8_t>(setup, symbols, planes, n, out, [&](const uint8_t* symbol, const uint8_t* plane, size_t, uint8_t* to)
                                                           __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (size_t h = 0; h < 2; ++h) {
      const uint8x16_t high = vshlq_u8(vld1q_u8(symbol + 16 * h), up);
      vst1q_u8(to + 16 * h, vorrq_u8(high, low_bits_of(plane + 2 * h, low_bits)));
    }
  });
}

// Two vectors of 8 bins: symbols with their low bits.
__attribute__((always_inline)) inline uint16x8x2_t bins_of(const uint8_t* symbol, const uint8_t* planes,
                                                          uint32_t low_bits) {
  const uint8x16_t some = vld1q_u8(symbol), low = low_bits_of(planes, low_bits);
  const int16x8_t up = vdupq_n_s16(int16_t(low_bits));
  return {{vorrq_u16(vshlq_u16(vmovl_u8(vget_low_u8(some)), up), vmovl_u8(vget_low_u8(low))),
           vorrq_u16(vshlq_u16(vmovl_high_u8(some), up), vmovl_high_u8(low))}};
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
    uint16_t bin[kLanes];
    for (size_t h = 0; h < 2; ++h) {
      const uint16x8x2_t bins = bins_of(symbol + 16 * h, plane + 2 * h, low_bits);
      vst1q_u16(bin + 16 * h, bins.val[0]);
      vst1q_u16(bin + 16 * h + 8, bins.val[1]);
    }
#pragma GCC unroll 32
    for (size_t i = 0; i < kLanes; ++i) to[i] = values[bin[i]];
  });
}

// Emits bins times steps.
template <class T, bool kByRow>
void emit_scaled(const DecodeSetup& setup, const uint16_t* symbols, const uint8_t* planes, const float* steps, size_t n,
                 uint8_t* out) {
  using Value = typename T::Bits;
  const uint32_t low_bits = setup.layout->low_bits;
  const int32x4_t first_bin = vdupq_n_s32(setup.first_bin);
  const float32x4_t of_row = vdupq_n_f32(*steps);
  emit_groups<Value>(setup, symbols, planes, n, out, [&](const uint8_t* symbol, const uint8_t* plane, size_t i, Value* to)
                                                         __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (size_t h = 0; h < 2; ++h) {
      const uint16x8x2_t bins = bins_of(symbol + 16 * h, plane + 2 * h, low_bits);
#pragma GCC unroll 2
      for (size_t q = 0; q < 2; ++q) {
        const size_t at = 16 * h + 8 * q;
        const auto times_step = [&](uint32x4_t bin, size_t j) __attribute__((always_inline)) {
          const int32x4_t whole = vaddq_s32(vreinterpretq_s32_u32(bin), first_bin);
          return vmulq_f32(vcvtq_f32_s32(whole), kByRow ? of_row : vld1q_f32(steps + i + at + j));
        };
        const float32x4_t a = times_step(vmovl_u16(vget_low_u16(bins.val[q])), 0);
        const float32x4_t b = times_step(vmovl_high_u16(bins.val[q]), 4);
        if constexpr (T::kDType == DType::kF32) {
          vst1q_f32(reinterpret_cast<float*>(to + at), a);
          vst1q_f32(reinterpret_cast<float*>(to + at + 4), b);
        } else if constexpr (T::kDType == DType::kF16) {
          const float16x8_t both = vcvt_high_f16_f32(vcvt_f16_f32(a), b);
          vst1q_u16(to + at, vreinterpretq_u16_f16(both));
        } else {
          vst1q_u16(to + at, vuzp2q_u16(vreinterpretq_u16_u32(rounded_bf16(a)),
                                     vreinterpretq_u16_u32(rounded_bf16(b))));
        }
      }
    }
  });
}

Emit emit_for(const DecodeSetup& setup) {
  if (setup.codes) return emit_codes;
  if (setup.scaled) {
    return with_dtype(setup.output, [&](auto t) -> Emit {
      using T = decltype(t);
      return setup.by_row ? emit_scaled<T, true> : emit_scaled<T, false>;
    });
  }
  if (setup.output == DType::kF32) return emit_by_look_ups<uint32_t>;
  const size_t n_blocks = setup.shuffle_low.size() / 32;
  if (n_blocks == 0) return emit_by_look_ups<uint16_t>;
  return n_blocks <= 4 ? emit_by_shuffles<1> : emit_by_shuffles<2>;
}

// n_rows rows of `columns` weights of K segments under way.
template <size_t K>
bool decode_rows(const DecodeSetup& setup, Stream* streams, States* states, size_t n_rows, size_t columns) {
  const int32x4_t down_by_table_log = vdupq_n_s32(-int32_t(setup.layout->table_log));
  const uint32x4_t slot_mask = vdupq_n_u32((1u << setup.layout->table_log) - 1);
  const uint32_t* const tables = setup.tables.data();
  const uint32_t* offsets[K];
  States x[K];
  for (size_t k = 0; k < K; ++k) std::copy_n(states[k], kVectors, x[k]);
  const auto start_row = [&](size_t k) { offsets[k] = setup.offsets(streams[k].row); };
  const auto group = [&](size_t j, uint32_t active, size_t g) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (size_t k = 0; k < K; ++k) {
      States entry;
#pragma GCC unroll 8
      for (size_t v = 0; v < kVectors; ++v) {
        uint32x4_t index = vandq_u32(x[k][v], slot_mask);
        if (offsets[k]) index = vaddq_u32(index, vld1q_u32(offsets[k] + j + 4 * v));
        entry[v] = look_up(tables, index);
      }
      if (active == ~0u) [[likely]] {
        advance<false>(x[k], entry, kLanes, down_by_table_log, streams[k].word);
      } else {
        advance<true>(x[k], entry, size_t(__builtin_popcount(active)), down_by_table_log, streams[k].word);
      }
      auto* const symbols = reinterpret_cast<uint8_t*>(streams[k].symbols) + kLanes * g;
      vst1q_u8(symbols, low_bytes(entry[0], entry[1], entry[2], entry[3]));
      vst1q_u8(symbols + 16, low_bytes(entry[4], entry[5], entry[6], entry[7]));
    }
  };
  if (!walk<K>(setup, streams, n_rows, columns, emit_for(setup), start_row, group)) return false;
  for (size_t k = 0; k < K; ++k) std::copy_n(x[k], kVectors, states[k]);
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
    for (size_t v = 0; v < kVectors; ++v) {
      states[k][v] = vreinterpretq_u32_u8(vld1q_u8(jobs[k].bytes->states + 16 * v));
    }
  }
  // All whole rows that they have in common; each goes on alone.
  if (n == kTogether && !decode_together<kTogether>(setup, streams, states)) return false;
  const size_t last_columns = setup.n % setup.layout->columns;
  for (size_t k = 0; k < n; ++k) {
    if (!decode_together<1>(setup, streams + k, states + k)) return false;
    if (streams[k].row < streams[k].last_row && !decode_rows<1>(setup, streams + k, states + k, 1, last_columns)) {
      return false;
    }
    if (streams[k].word != streams[k].words_end) return false;
    for (const uint32x4_t& x : states[k]) {
      if (vminvq_u32(x) != kStateLow || vmaxvq_u32(x) != kStateLow) return false;
    }
  }
  return true;
}

}  // namespace

bool decode_segments_neon(const DecodeSetup& setup, const SegmentJob* jobs, size_t n) {
  if (setup.layout->lanes() != kLanes) return decode_segments_scalar(setup, jobs, n);
  for (size_t i = 0; i < n; i += kTogether) {
    if (!decode(setup, jobs + i, std::min(kTogether, n - i))) return false;
  }
  return true;
}

namespace {

// 32 lanes encode, the first n_active of them: words down from `word`, the last lane's first, then
// x = (x / f << T) + x mod f + c.
__attribute__((always_inline)) inline void retreat(States& x, const States& entry, size_t n_active,
                                                   int32x4_t table_log, int32x4_t limit_shift, uint16_t*& word) {
  States frequency, emits;
#pragma GCC unroll 8
  for (size_t v = 0; v < kVectors; ++v) {
    frequency[v] = vaddq_u32(vandq_u32(entry[v], vdupq_n_u32(0xFFF)), vdupq_n_u32(1));
    emits[v] = vandq_u32(vcgeq_u32(vshlq_u32(x[v], limit_shift), frequency[v]), first_lanes(n_active, v));
  }
  const uint32_t mask = mask_of(emits);
#pragma GCC unroll 4
  for (size_t v = kVectors; v > 0; v -= 2) {
    const uint32_t eight = mask >> 4 * (v - 2) & 0xFF;
    const uint8x16_t words = vreinterpretq_u8_u16(low_halves(x[v - 2], x[v - 1]));
    vst1q_u8(reinterpret_cast<uint8_t*>(word - 8), vqtbl1q_u8(words, vld1q_u8(kGather.index[eight])));
    word -= kSpread.n_bytes[eight] / 2;
  }
#pragma GCC unroll 8
  for (size_t v = 0; v < kVectors; ++v) {
    const uint32x4_t y = vbslq_u32(emits[v], vshrq_n_u32(x[v], 16), x[v]);
    // y / f in float is at most one off, because the quotient is below 2^22: mend it in integers.
    uint32x4_t quotient = vcvtq_u32_f32(vdivq_f32(vcvtq_f32_u32(y), vcvtq_f32_u32(frequency[v])));
    uint32x4_t rest = vmlsq_u32(y, quotient, frequency[v]);
    const uint32x4_t too_high = vcltzq_s32(vreinterpretq_s32_u32(rest));  // all ones, -1
    quotient = vaddq_u32(quotient, too_high);
    rest = vaddq_u32(rest, vandq_u32(too_high, frequency[v]));
    const uint32x4_t too_low = vcgeq_u32(rest, frequency[v]);
    quotient = vsubq_u32(quotient, too_low);
    rest = vsubq_u32(rest, vandq_u32(too_low, frequency[v]));
    const uint32x4_t next = vaddq_u32(vshlq_u32(quotient, table_log), vaddq_u32(rest, vshrq_n_u32(entry[v], 12)));
    x[v] = vbslq_u32(first_lanes(n_active, v), next, x[v]);
  }
}

}  // namespace

uint16_t* encode_segment_neon(const EncodeSetup& setup, size_t first, size_t last, uint32_t* states,
                              uint16_t* words_end) {
  const Layout& layout = *setup.layout;
  if (layout.lanes() != kLanes || layout.table_log < kLeastEncodedTableLog) {
    return encode_segment_scalar(setup, first, last, states, words_end);
  }
  const int32x4_t table_log = vdupq_n_s32(int32_t(layout.table_log));
  const int32x4_t limit_shift = vdupq_n_s32(int32_t(layout.table_log) - 32);
  States x;
  for (auto& lanes : x) lanes = vdupq_n_u32(kStateLow);
  uint16_t* word = words_end;
  const auto group = [&](const uint32_t* start, const uint8_t* symbols, size_t n_active)
                         __attribute__((always_inline)) {
    States entry;
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; v += 2) {
      const uint16x8_t symbol = vmovl_u8(vld1_u8(symbols + 4 * v));
      const uint32x4_t low = vaddw_u16(vld1q_u32(start + 4 * v), vget_low_u16(symbol));
      const uint32x4_t high = vaddw_u16(vld1q_u32(start + 4 * v + 4), vget_high_u16(symbol));
      entry[v] = look_up(setup.entries.data(), low);
      entry[v + 1] = look_up(setup.entries.data(), high);
    }
    retreat(x, entry, n_active, table_log, limit_shift, word);
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
  for (size_t v = 0; v < kVectors; ++v) vst1q_u32(states + 4 * v, x[v]);
  return word;
}

}  // namespace moebound
