// Static rANS (Duda, arXiv:1311.2540) over interleaved lanes, fused with dequantize and cast.
//
// A state x is in [2^16, 2^32). Column j of a row belongs to lane j mod lanes. To decode a weight:
//   entry = table[x mod 2^T];  x = entry.frequency · (x >> T) + entry.bias;
//   if x < 2^16: x = x << 16 | next 16-bit word
// in row-major order, so one sequence of words serves all lanes, and any vector of lanes can take
// its words with one prefix count. After the last weight every state is 2^16 again and every word
// is used: damage that a decoder survives shows here.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/bytes.h"
#include "base/dtype.h"
#include "bound/layout.h"

namespace moebound {

constexpr uint32_t kStateLow = 1u << 16;

// Whether the first states are ones that an encoder can end with. With them no later state is
// below 2^16, whatever the words are.
inline bool states_are_valid(const Layout& layout, const SegmentBytes& segment) {
  for (uint32_t lane = 0; lane < layout.lanes(); ++lane) {
    if (load<uint32_t>(segment.states + 4 * lane) < kStateLow) return false;
  }
  return true;
}

// A table entry: symbol | (frequency - 1) << 8 | (slot - cumulative frequency) << 20.
inline uint32_t table_entry(uint32_t symbol, uint32_t frequency, uint32_t bias) {
  return symbol | (frequency - 1) << 8 | bias << 20;
}

// So many values fit the registers of the AVX-512 path.
constexpr size_t kMostPermuted = 512;

// What all segments of a payload share, unpacked for speed.
struct DecodeSetup {
  const Layout* layout = nullptr;
  size_t n = 0;
  DType output = DType::kBF16;
  bool codes = false;            // write bins, below 256, as bytes, in place of values
  std::vector<uint32_t> tables;  // [n_tables << table_log]
  TableStarts starts;  // in units of table entries
  // Instead of tables and starts, where a decoder searches: [n_tables][2][search_width] cumulative
  // frequencies, then frequencies, by symbol. A cumulative frequency beyond the symbols is 0xFFFF.
  size_t search_width = 0;
  std::vector<uint16_t> search_tables;
  // Output patterns by symbol << low_bits | low, as 32-bit words and, of 16-bit dtypes, as they are.
  // The narrow ones have at least kMostPermuted places.
  std::vector<uint16_t> values16;
  std::vector<uint32_t> values32;
  // A scaled payload has steps instead: of all columns, padded to whole groups, or of all rows. A weight
  // is (first_bin + its place among the bins) · step, rounded to the output. Steps of columns are
  // multiplied by the factors of rows first, if there are any.
  bool scaled = false, by_row = false;
  int32_t first_bin = 0;
  std::vector<float> steps, row_factors;
  // values16 cut into bytes by blocks of 16, twice each, for byte shuffles: [block][32].
  std::vector<uint8_t> shuffle_low, shuffle_high;

  size_t value_bytes() const { return codes ? 1 : item_size(output); }
  // Nothing to add to a state's slot if there is one table.
  const uint32_t* offsets(size_t row) const {
    return layout->n_tables == 1 ? nullptr : starts.of_row(row);
  }
  // The one table of a row, if search_width is not 0.
  const uint16_t* search_table(size_t row) const {
    return search_tables.data() + 2 * search_width * layout->table_of(row, 0);
  }
};

// One segment to decode: its rows [first, last) go to `out`.
struct SegmentJob {
  const SegmentBytes* bytes;
  size_t first, last;
  void* out;
};

// Decodes n segments that follow one another. Returns false if the bytes of one are damaged; what
// was to be written may then be anything.
using DecodeSegments = bool (*)(const DecodeSetup&, const SegmentJob*, size_t n);

bool decode_segments_scalar(const DecodeSetup&, const SegmentJob*, size_t);
bool decode_segments_avx2(const DecodeSetup&, const SegmentJob*, size_t);
bool decode_segments_avx512(const DecodeSetup&, const SegmentJob*, size_t);
bool decode_segments_neon(const DecodeSetup&, const SegmentJob*, size_t);

// More than this many segments together are of no use to any path.
constexpr size_t kMostTogether = 4;

// The widths of tables that a path may search instead of looking up.
constexpr size_t kLeastSearch = 32, kWidestSearch = 128;

// What all segments share at the other end.
struct EncodeSetup {
  const Layout* layout = nullptr;
  size_t n = 0;
  const uint8_t* symbols = nullptr;  // [n]
  std::vector<uint32_t> entries;     // [n_tables][n_symbols]: (frequency - 1) | cumulative << 12
  TableStarts starts;                // in units of entries
};

constexpr size_t kWordSlack = 8;  // words in front of the buffer that an encoder may spoil

// Encodes rows [first, last), the last weight first, words downwards from words_end. Sets the
// states that the decoder begins with and returns the first word. The buffer below words_end has
// room for a word a weight and kWordSlack more.
using EncodeSegment = uint16_t* (*)(const EncodeSetup&, size_t first, size_t last, uint32_t* states,
                                    uint16_t* words_end);

uint16_t* encode_segment_scalar(const EncodeSetup&, size_t, size_t, uint32_t*, uint16_t*);
uint16_t* encode_segment_avx2(const EncodeSetup&, size_t, size_t, uint32_t*, uint16_t*);
uint16_t* encode_segment_avx512(const EncodeSetup&, size_t, size_t, uint32_t*, uint16_t*);
uint16_t* encode_segment_neon(const EncodeSetup&, size_t, size_t, uint32_t*, uint16_t*);

}  // namespace moebound
