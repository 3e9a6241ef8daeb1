#include <algorithm>
#include <numeric>

#include "bound.h"
#include "bound_layout.h"
#include "bound_model.h"
#include "bytes.h"
#include "parallel.h"
#include "quantize.h"
#include "rans.h"

namespace moebound {
namespace {

constexpr size_t kAlphabetSample = 1 << 16;  // weights that choose the alphabet
constexpr size_t kClassSample = 1 << 15;     // weights that judge the classes

// What encoding a symbol needs. x / frequency is the high word of x · reciprocal, exact for every
// 32-bit x; frequency 1 has no such reciprocal and gets one that is 1 short, made good in `bias`
// (Fabian Giesen's form: x' = x + bias + quotient · (2^T - frequency)).
struct EncodeEntry {
  uint64_t reciprocal;
  uint32_t bias, frequency;
};

std::vector<EncodeEntry> encode_entries(const Layout& layout) {
  const uint32_t sum = 1u << layout.table_log;
  std::vector<EncodeEntry> entries(layout.frequencies.size());
  for (uint32_t t = 0; t < layout.n_tables; ++t) {
    uint32_t cumulative = 0;
    for (uint32_t s = 0; s < layout.n_symbols; ++s) {
      const uint32_t f = layout.frequencies[t * layout.n_symbols + s];
      auto& entry = entries[t * layout.n_symbols + s];
      if (f > 1) entry = {~uint64_t(0) / f + 1, cumulative, f};
      if (f == 1) entry = {~uint64_t(0), cumulative + sum - 1, f};
      cumulative += f;
    }
  }
  return entries;
}

uint64_t high_word(uint64_t a, uint64_t b) {
  return uint64_t((static_cast<unsigned __int128>(a) * b) >> 64);
}

// Eight bytes as an 8 × 8 matrix of bits, transposed (Hacker's Delight, section 7-3).
uint64_t transpose_bits(uint64_t x) {
  uint64_t t = (x ^ x >> 7) & 0x00AA00AA00AA00AAull;
  x ^= t ^ t << 7;
  t = (x ^ x >> 14) & 0x0000CCCC0000CCCCull;
  x ^= t ^ t << 14;
  t = (x ^ x >> 28) & 0x00000000F0F0F0F0ull;
  return x ^ t ^ t << 28;
}

// Low bits of one group, as planes: bit i of plane b is bit b of weight i.
void append_planes(const uint8_t* low, size_t count, uint32_t low_bits, std::vector<uint8_t>& out) {
  uint8_t padded[kGroup] = {};
  std::memcpy(padded, low, count);
  uint8_t planes[8][4];
  for (size_t v = 0; v < 4; ++v) {
    const uint64_t bits = transpose_bits(load<uint64_t>(padded + 8 * v));
    for (size_t b = 0; b < 8; ++b) planes[b][v] = uint8_t(bits >> (8 * b));
  }
  out.insert(out.end(), &planes[0][0], &planes[0][0] + 4 * low_bits);
}

struct Segment {
  std::vector<uint8_t> bytes;
  uint32_t n_words = 0;
};

// The starts of each column's table in `entries`, for every row class.
std::vector<std::vector<uint32_t>> table_starts(const Layout& layout) {
  std::vector<std::vector<uint32_t>> starts;
  if (layout.n_tables == 1) {
    starts.emplace_back(layout.columns, 0u);
    return starts;
  }
  starts.resize(size_t(*std::max_element(layout.row_classes.begin(), layout.row_classes.end())) + 1);
  for (size_t row = 0; row < layout.row_classes.size(); ++row) {
    auto& at = starts[layout.row_classes[row]];
    if (!at.empty()) continue;
    for (size_t j = 0; j < layout.columns; ++j) at.push_back(layout.table_of(row, j) * layout.n_symbols);
  }
  return starts;
}

// rANS runs backwards: the last weight first, words from the end of the buffer to its front.
Segment encode_segment(const Layout& layout, const std::vector<EncodeEntry>& entries,
                       const std::vector<std::vector<uint32_t>>& starts, const Symbols& symbols, size_t n,
                       size_t first, size_t last) {
  const uint32_t lanes = layout.lanes(), lane_mask = lanes - 1, table_log = layout.table_log;
  const uint32_t sum = 1u << table_log, limit_shift = 32 - table_log;
  const size_t begin = first * layout.columns, end = std::min(n, last * layout.columns);
  uint32_t states[1u << kMaxLanesLog];
  std::fill_n(states, lanes, kStateLow);
  std::vector<uint16_t> words(end - begin + 1);
  uint16_t* const words_end = words.data() + words.size();
  uint16_t* word = words_end;
  const EncodeEntry* const all = entries.data();
  for (size_t row = last; row-- > first;) {
    const uint32_t* start = starts[layout.n_tables == 1 ? 0 : layout.row_classes[row]].data();
    const uint8_t* symbol = symbols.symbol.data() + row * layout.columns;
    for (size_t j = std::min<size_t>(layout.columns, n - row * layout.columns); j-- > 0;) {
      const EncodeEntry& e = all[start[j] + symbol[j]];
      uint32_t x = states[j & lane_mask];
      const uint32_t emit = (x >> limit_shift) >= e.frequency;
      word[-1] = uint16_t(x);
      word -= emit;
      x >>= 16 * emit;
      const uint32_t quotient = uint32_t(high_word(x, e.reciprocal));
      states[j & lane_mask] = x + e.bias + quotient * (sum - e.frequency);
    }
  }
  Segment segment;
  segment.n_words = uint32_t(words_end - word);
  segment.bytes.resize(segment_n_bytes(layout, segment.n_words, 0));
  for (uint32_t lane = 0; lane < lanes; ++lane) store(segment.bytes.data() + 4 * lane, states[lane]);
  std::memcpy(segment.bytes.data() + 4 * lanes, word, 2 * size_t(segment.n_words));
  if (layout.low_bits) {
    for (size_t row = first; row < last; ++row) {
      const size_t row_stop = std::min(n, (row + 1) * layout.columns);
      for (size_t i = row * layout.columns; i < row_stop; i += kGroup) {
        append_planes(symbols.low.data() + i, std::min<size_t>(kGroup, row_stop - i), layout.low_bits, segment.bytes);
      }
    }
  }
  return segment;
}

// Few lanes for few weights: each state costs about 24 bits.
uint32_t lanes_log_for(size_t n) { return n < 1u << 13 ? 0 : n < 1u << 15 ? 2 : kMaxLanesLog; }

// Every weight's cell, and the alphabet that is cheapest for them.
Symbols symbols_within_bound(const ArrayInfo& info, const void* source, Alphabet& alphabet) {
  const Quantizer quantizer(info, source);
  uint64_t n_counted = 0;
  const auto counts = quantizer.histogram(sample_rows(info, kAlphabetSample), n_counted);
  alphabet = choose_alphabet(counts, n_counted, info.n, uint32_t(8 * item_size(info.output)) + 2);
  return quantizer.symbols(alphabet);
}

// Every weight's pattern: the top byte is the symbol, the other is stored as it is.
Symbols exact_symbols(const ArrayInfo& info, const void* source, Alphabet& alphabet) {
  const auto* patterns = static_cast<const uint16_t*>(source);
  Symbols symbols;
  symbols.symbol.resize(info.n);
  symbols.low.resize(info.n);
  for (size_t i = 0; i < info.n; ++i) {
    const uint16_t bin = rotated(patterns[i]);
    symbols.symbol[i] = uint8_t(bin >> kExactLowBits);
    symbols.low[i] = uint8_t(bin);
  }
  const auto [lowest, highest] = std::minmax_element(symbols.symbol.begin(), symbols.symbol.end());
  alphabet.symbol_low = *lowest;
  alphabet.n_symbols = uint32_t(*highest - *lowest) + 1;
  alphabet.low_bits = kExactLowBits;
  for (uint8_t& symbol : symbols.symbol) symbol = uint8_t(symbol - alphabet.symbol_low);
  return symbols;
}

}  // namespace

EncodedBound encode_bound(const ArrayInfo& info, const void* source, const EncodeOptions& options) {
  const size_t n = info.n;
  Alphabet alphabet;
  Symbols symbols = info.bound > 0 ? symbols_within_bound(info, source, alphabet)
                                   : exact_symbols(info, source, alphabet);

  Layout layout;
  layout.columns = info.columns;
  layout.lanes_log = lanes_log_for(n);
  layout.low_bits = alphabet.low_bits;
  layout.symbol_low = alphabet.symbol_low;
  layout.n_symbols = alphabet.n_symbols;
  const size_t rows = layout.rows(n);
  const size_t most_rows = std::max<size_t>(1, options.segment_weights / layout.columns);
  const size_t n_segments = (rows + most_rows - 1) / most_rows;
  layout.rows_per_segment = uint32_t((rows + n_segments - 1) / n_segments);
  choose_classes(symbols, alphabet, n, sample_rows(info, kClassSample), layout);
  choose_tables(symbols.symbol, n, layout);

  const auto entries = encode_entries(layout);
  const auto starts = table_starts(layout);
  std::vector<Segment> segments(layout.segments(n));
  for_each_index(segments.size(), options.threads, [&](size_t i) {
    const size_t first = i * layout.rows_per_segment;
    segments[i] = encode_segment(layout, entries, starts, symbols, n, first,
                                 std::min(first + layout.rows_per_segment, rows));
  });

  EncodedBound encoded;
  for (const Segment& segment : segments) layout.segment_words.push_back(segment.n_words);
  write_layout(layout, encoded.payload);
  for (const Segment& segment : segments) {
    encoded.payload.insert(encoded.payload.end(), segment.bytes.begin(), segment.bytes.end());
  }
  encoded.misses = std::move(symbols.misses);
  return encoded;
}

}  // namespace moebound
