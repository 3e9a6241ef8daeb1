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

#include "bound_layout.h"
#include "bytes.h"
#include "dtype.h"

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

// What all segments of a payload share, unpacked for speed.
struct DecodePlan {
  const Layout* layout = nullptr;
  size_t n = 0;
  DType output = DType::kBF16;
  std::vector<uint32_t> tables;  // [n_tables << table_log]
  // For each row class, the tables' offsets by column, padded to whole groups: offset of column j
  // of row r is row_offsets[row_slot[r]][j]. Empty if there is one table.
  std::vector<std::vector<uint16_t>> row_offsets;
  std::vector<uint8_t> row_slot;
  // Output patterns by symbol << low_bits | low, as 32-bit words and, of 16-bit dtypes, as they are.
  std::vector<uint16_t> values16;
  std::vector<uint32_t> values32;
  // values16 cut into bytes by blocks of 16, twice each, for byte shuffles: [block][32].
  std::vector<uint8_t> shuffle_low, shuffle_high;

  const uint16_t* offsets(size_t row) const {
    return row_slot.empty() ? nullptr : row_offsets[row_slot[row]].data();
  }
};

// Decodes rows [first, last) into out (the pattern of weight 0 of row `first`). Returns false if
// the segment's bytes are damaged; out may then hold anything.
using DecodeSegment = bool (*)(const DecodePlan&, const SegmentBytes&, size_t first, size_t last,
                               void* out);

bool decode_segment_scalar(const DecodePlan&, const SegmentBytes&, size_t, size_t, void*);
bool decode_segment_avx2(const DecodePlan&, const SegmentBytes&, size_t, size_t, void*);
bool decode_segment_avx512(const DecodePlan&, const SegmentBytes&, size_t, size_t, void*);

}  // namespace moebound
