// The plain path: every lane count, every dtype, every machine.
#include <algorithm>

#include "bound/rans/coder.h"

namespace moebound {
namespace {

// Values from a table, each as soon as its bin is known.
template <class Value>
struct LookUp {
  using Out = Value;
  static constexpr bool kScaled = false;
  const Value* values;
};

// Bins as they are, which are below 256.
struct Codes {
  using Out = uint8_t;
  static constexpr bool kScaled = false;
  struct {
    uint8_t operator[](uint32_t bin) const { return uint8_t(bin); }
  } values;
};

// Bins times steps, a group at a time: the second loop is one for vectors.
template <class T>
struct Scaled {
  using Out = typename T::Bits;
  static constexpr bool kScaled = true;

  void operator()(const int32_t* bins, size_t n, const DecodeSetup& setup, size_t row, size_t start, Out* out) const {
    if (setup.by_row) {
      const float step = setup.steps[row];
      for (size_t i = 0; i < n; ++i) out[i] = pattern_of<T>(float(bins[i]) * step);
    } else {
      const float* const steps = setup.steps.data() + start;
      const float factor = setup.row_factors.empty() ? 1.0f : setup.row_factors[row];
      for (size_t i = 0; i < n; ++i) out[i] = pattern_of<T>(float(bins[i]) * (steps[i] * factor));
    }
  }
};

template <class Emit>
bool decode(const DecodeSetup& setup, const SegmentJob& job, const Emit emit) {
  const Layout& layout = *setup.layout;
  const SegmentBytes& segment = *job.bytes;
  const uint32_t lanes = layout.lanes(), mask = (1u << layout.table_log) - 1;
  const uint32_t low_bits = layout.low_bits;
  if (!states_are_valid(layout, segment)) return false;
  uint32_t states[1u << kMaxLanesLog];
  for (uint32_t lane = 0; lane < lanes; ++lane) states[lane] = load<uint32_t>(segment.states + 4 * lane);
  const uint8_t* word = segment.words;
  const uint8_t* const words_end = word + 2 * size_t(segment.n_words);
  const uint8_t* plane = segment.planes;
  auto* out = static_cast<typename Emit::Out*>(job.out);
  for (size_t row = job.first; row < job.last; ++row) {
    const uint32_t* offsets = setup.offsets(row);
    const size_t columns = std::min<size_t>(layout.columns, setup.n - row * layout.columns);
    for (size_t start = 0; start < columns; start += kGroup) {
      uint32_t planes[kMaxLowBits];
      for (uint32_t b = 0; b < low_bits; ++b, plane += 4) planes[b] = load<uint32_t>(plane);
      const size_t end = std::min<size_t>(start + kGroup, columns);
      [[maybe_unused]] int32_t bins[kGroup];
      for (size_t j = start; j < end; ++j) {
        uint32_t& x = states[j & (lanes - 1)];
        const uint32_t entry = setup.tables[(offsets ? offsets[j] : 0u) + (x & mask)];
        x = ((entry >> 8 & 0xFFF) + 1) * (x >> layout.table_log) + (entry >> 20);
        if (x < kStateLow) {
          if (word == words_end) return false;
          x = x << 16 | load<uint16_t>(word);
          word += 2;
        }
        uint32_t bin = entry & 0xFF;
        for (uint32_t b = low_bits; b-- > 0;) bin = bin << 1 | (planes[b] >> (j - start) & 1u);
        if constexpr (Emit::kScaled) bins[j - start] = int32_t(bin) + setup.first_bin;
        else *out++ = emit.values[bin];
      }
      if constexpr (Emit::kScaled) {
        emit(bins, end - start, setup, row, start, out);
        out += end - start;
      }
    }
  }
  bool whole = word == words_end;
  for (uint32_t lane = 0; lane < lanes; ++lane) whole &= states[lane] == kStateLow;
  return whole;
}

}  // namespace

bool decode_segments_scalar(const DecodeSetup& setup, const SegmentJob* jobs, size_t n) {
  return std::all_of(jobs, jobs + n, [&](const SegmentJob& job) {
    if (setup.codes) return decode(setup, job, Codes{});
    if (setup.scaled) {
      return with_dtype(setup.output, [&](auto t) { return decode(setup, job, Scaled<decltype(t)>{}); });
    }
    return setup.output == DType::kF32 ? decode(setup, job, LookUp<uint32_t>{setup.values32.data()})
                                       : decode(setup, job, LookUp<uint16_t>{setup.values16.data()});
  });
}

uint16_t* encode_segment_scalar(const EncodeSetup& setup, size_t first, size_t last, uint32_t* states,
                                uint16_t* words_end) {
  const Layout& layout = *setup.layout;
  const uint32_t lanes = layout.lanes(), table_log = layout.table_log;
  std::fill_n(states, lanes, kStateLow);
  uint16_t* word = words_end;
  for (size_t row = last; row-- > first;) {
    const uint32_t* start = setup.starts.of_row(row);
    const uint8_t* symbol = setup.symbols + row * layout.columns;
    for (size_t j = std::min<size_t>(layout.columns, setup.n - row * layout.columns); j-- > 0;) {
      const uint32_t entry = setup.entries[start[j] + symbol[j]];
      const uint32_t frequency = (entry & 0xFFF) + 1;
      uint32_t& x = states[j & (lanes - 1)];
      if (x >> (32 - table_log) >= frequency) {
        *--word = uint16_t(x);
        x >>= 16;
      }
      x = (x / frequency << table_log) + x % frequency + (entry >> 12);
    }
  }
  return word;
}

}  // namespace moebound
